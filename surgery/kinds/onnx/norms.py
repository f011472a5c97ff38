"""The batch norms of an ONNX graph, and how their statistics are set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from torch import Tensor

from surgery.kinds.onnx.graph import set_numbers
from surgery.kinds.onnx.read import Reader
from surgery.kinds.onnx.tensors import to_ir
from surgery.kinds.onnx.weights import Weight, is_plain

__all__ = ["KeepNorm", "NormNode", "norms_of", "set_in_model", "set_in_proto"]


@dataclass(frozen=True, eq=False)
class NormNode:
    """A BatchNormalization node, what it reads, and its running mean and variance."""

    node: ir.Node
    source: ir.Value
    mean: Weight
    variance: Weight

    @property
    def name(self) -> str:
        """The name of the mean, without what says that it is one."""
        return self.mean.name.removesuffix(".running_mean")


KeepNorm = Callable[[NormNode, tuple[Tensor, Tensor]], None]


def norms_of(reader: Reader) -> list[NormNode]:
    """Return the batch norms of a graph whose statistics are constants that nothing else reads."""
    found = []
    for node in reader.nodes:
        normal = node.op_type == "BatchNormalization" and is_plain(node) and "training_mode" not in node.attributes
        # statistics in a branch would have to be looked up there
        source = node.inputs[0] if normal and node.graph is reader.graph else None
        if source is not None and source in reader.numbers:
            mean, variance = (reader.weight(value) for value in node.inputs[3:5])
            if mean is not None and variance is not None and _alone(reader, node, mean, variance):
                found.append(NormNode(node, source, mean, variance))
    return found


def _alone(reader: Reader, node: ir.Node, mean: Weight, variance: Weight) -> bool:
    if (
        mean.root is variance.root
        or mean.form
        or variance.form
        or not {mean.name, variance.name} <= reader.parameters.keys()
    ):
        return False
    return all(reader.uses.get(each.name) == frozenset({reader.number(node)}) for each in (mean, variance))


def set_in_model(model: ir.Model, found: NormNode, pair: tuple[Tensor, Tensor]) -> None:
    """Give a batch norm in a model, of which the graph is a copy, other statistics."""
    roots = Reader(model).roots
    for weight, numbers in zip((found.mean, found.variance), pair, strict=True):
        set_numbers(roots[weight.name], numbers.clone())


def set_in_proto(model: onnx.ModelProto, found: NormNode, pair: tuple[Tensor, Tensor]) -> None:
    """Give a batch norm in a message other statistics."""
    for weight, numbers in zip((found.mean, found.variance), pair, strict=True):
        tensor = ir.to_proto(to_ir(numbers, weight.name))
        known = [each for each in model.graph.initializer if each.name == weight.name]
        nodes = (node for node in model.graph.node if weight.name in node.output)
        target = known[0] if known else next(nodes).attribute[0].t
        target.CopyFrom(tensor)
