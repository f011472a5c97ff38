"""Write a chain into an ONNX graph: its nodes in front of a node, and each of its weights as one initializer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
from torch import Tensor

from surgery.algebra import Branches, Conv, Embedding, Flatten, Linear, Operator, Shape, Transpose, Unflatten
from surgery.errors import InputError
from surgery.kinds.onnx.graph import EditedGraph
from surgery.kinds.onnx.marks import FIRST, MARK, SHIFT, words_of
from surgery.kinds.onnx.nodes import (
    NodeWriter,
    write_conv,
    write_embedding,
    write_linear,
    write_ones,
    write_reshape,
    write_transpose,
)
from surgery.kinds.onnx.tensors import to_torch
from surgery.kinds.onnx.weights import View

__all__ = ["ChainWriter"]


_GEMM_WITHOUT_BIAS = 11  # the first opset that has it


class ChainWriter(NodeWriter):
    """Writes the nodes of a chain on values of a graph; each weight becomes one initializer.

    ``named`` has the name of each weight and its numbers, by the identity of the tensor. The weights of linear layers
    are stored transposed if ``turned``. ``views`` are those through which a weight is read, by its name.
    """

    def __init__(self, graph: EditedGraph, *, turned: bool) -> None:
        super().__init__()
        self._graph, self.turned = graph, turned
        self.named: dict[int, tuple[str, Tensor]] = {}
        self.views: dict[str, tuple[View, ...]] = {}
        self._known: dict[str, ir.Value] = {}
        self.inserted: list[ir.Node] = []  # by ``finish``
        self._marks: dict[int, str] = {}  # what a reshape does, for the reader
        self._before: ir.Node | None = None

    def start(self, source: ir.Value, before: ir.Node) -> None:
        """Begin with a value of the graph; all nodes will stand in front of the node ``before``."""
        self.nodes, self.constants, self._known, self._marks, self._before = [], [], {}, {}, before
        self.value = self._know(source)

    def _know(self, value: ir.Value) -> str:
        name = f"known_{len(self._known)}"
        self._known[name] = value
        return name

    def weight(self, tensor: Tensor, *, turned: bool = False) -> str:
        """Return the name of the initializer of a factor; it is added at its first use."""
        return self._know(self._made(tensor, lambda numbers: numbers.mT if turned else numbers))

    def gates(self, tensor: Tensor, directions: int) -> ir.Value:
        """Return the initializer of the input weight of a recurrent node, from that of its gates in all directions."""
        return self._made(tensor, lambda numbers: numbers.unflatten(0, (directions, -1)))

    def _made(self, tensor: Tensor, stand: Callable[[Tensor], Tensor]) -> ir.Value:
        name, numbers = self.named[id(tensor)]
        if id(numbers) not in self._graph.made:  # joint sites share a factor
            self._graph.made[id(numbers)] = (numbers, self._add(name, stand(numbers)))
        else:
            self._graph.tie(self._graph.made[id(numbers)][1].name or "", name)
        return self._graph.made[id(numbers)][1]

    def _add(self, name: str, numbers: Tensor) -> ir.Value:
        """Add a weight, and the views through which it is read; return the value of the last."""
        views = self.views.get(name, ())
        for view in reversed(views):
            numbers = view.undo(numbers)
        assert self._before is not None
        return self._graph.add_views(views, self._graph.add_parameter(name, numbers), self._before)

    def read(self, op_type: str, value: ir.Value) -> None:
        """Append a node on the current value and on a value of the graph."""
        self.apply(op_type, self._know(value))

    def operator(self, operator: Operator, *, gemm: bool, bias: ir.Value | None) -> None:
        """Append an operator; its bias is a value of the graph."""
        plain = operator.with_bias(None)
        if isinstance(plain, Linear):
            gemm = gemm and (bias is not None or self._graph.opset >= _GEMM_WITHOUT_BIAS)
            write_linear(self, plain, gemm=gemm, turned=self.turned)
            if bias is not None and not gemm:
                self.read("Add", bias)
                return
        elif isinstance(plain, Embedding):
            write_embedding(self, plain)
        elif isinstance(plain, Conv):
            write_conv(self, plain)
        else:
            raise InputError(f"there is no known ONNX node for {type(plain).__name__}")
        if bias is not None:
            self.nodes[-1].input.append(self._know(bias))

    def branches(self, step: Branches, *, gemm: bool, bias: ir.Value | None) -> None:
        """Append the rows of a sum, of which the last has the bias, and the sum."""
        source, values = self.value, []
        for row in step.rows:
            self.value = source
            for operator in row:
                last = operator is step.rows[-1][-1]
                self.operator(operator, gemm=gemm, bias=bias if last else None)
            values.append(self.value)
        self.value = values[0]
        for value in values[1:]:
            self.apply("Add", value)

    def reshape(self, step: Unflatten | Flatten | Transpose, shape: Shape) -> None:
        """Append a reshape or a transpose of a value with as many axes; all sizes but those of the step may vary.

        A 0 in Reshape is the size of the same axis of its input, so that axes of size 1 hold the places:

            (n, 8, h, w)    -> Unsqueeze -> (n, 8, 1, h, w) -> Reshape [0, 4, 2, 0, 0] -> (n, 4, 2, h, w)
            (n, 4, 2, h, w) -> Reshape [0, 8, 1, 0, 0] -> (n, 8, 1, h, w) -> Squeeze   -> (n, 8, h, w)
        """
        if isinstance(step, Transpose):
            write_transpose(self, len(shape), step.first, step.second)
            return
        split = isinstance(step, Unflatten)
        wide, narrow = (step.out_shape(shape), shape) if split else (shape, step.out_shape(shape))
        at = len(shape) + (step.dim if isinstance(step, Unflatten) else step.start)
        # In the first example at = 1, ones = [2] and after = 2. Without axes after it, the sizes
        # say all, and one node does.
        ones = range(at + 1, at + 1 + len(wide) - len(narrow))
        after = len(wide) - ones.stop
        sizes = [*wide[at : ones.stop]] if split else [narrow[at], *([1] * len(ones) if after else [])]
        if after and split:
            self._ones("Unsqueeze", ones)
            self._mark(FIRST)
        write_reshape(self, [0] * at + sizes + [0] * after)
        if after and not split:
            self._mark(FIRST)
            self._ones("Squeeze", ones)
        self._mark(words_of(step, two=after > 0))

    def _ones(self, op_type: str, axes: Sequence[int]) -> None:
        write_ones(self, op_type, axes, self._graph.opset)

    def _mark(self, words: str) -> None:
        self._marks[len(self.nodes) - 1] = words

    def shift(self, bias: ir.Value) -> None:
        """Append the addition of a bias to what a chain computes."""
        self.read("Add", bias)
        self._mark(SHIFT)

    def finish(self) -> ir.Value:
        """Insert the nodes, and return their last value."""
        before = self._before
        assert before is not None
        for constant in self.constants:
            name = self._graph.new_name("surgery.sizes")
            self._known[constant.name] = self._graph.add_parameter(
                name, to_torch(ir.serde.deserialize_tensor(constant)), weight=False
            )
        stem = before.outputs[0].name or before.op_type
        self.inserted = []
        last: ir.Value | None = None
        for number, proto in enumerate(self.nodes):
            marks = {MARK: self._marks[number]} if number in self._marks else None
            node = ir.Node(
                "",
                proto.op_type,
                [self._known[name] for name in proto.input],
                [ir.from_proto(attribute) for attribute in proto.attribute],
                num_outputs=len(proto.output),
                metadata_props=marks,
            )
            for name, output in zip(proto.output, node.outputs, strict=True):
                output.name = self._graph.note_name(self._graph.new_name(f"{stem}.{name}"))
                self._known[name] = output
            before.graph.insert_before(before, node)  # type: ignore[union-attr]
            self.inserted.append(node)
            last = node.outputs[0]
        assert last is not None  # a chain has a step
        return last
