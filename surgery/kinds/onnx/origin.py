"""What nodes were, and what was said of them, before a chain took their place: recompose gives it back.

The last node of a chain keeps it in its metadata, as a graph of the nodes without attributes:

    MatMul "first" -> a, Add "second" -> b     ->     MatMul, MatMul, Add {surgery.was: first, a, second, b}
"""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx_ir as ir

__all__ = ["DESCRIBED", "Origin", "configure", "configured", "describe"]

DESCRIBED = "surgery.described"  # in the meta of an initializer of which its message says more than its numbers
_WAS = "surgery.was"
_QUANTIZED = "quant_parameter_tensor_names"  # in the meta of a value: the names of its scale and zero point


def describe(new: ir.Value | ir.TensorProtocol, old: ir.Value | ir.TensorProtocol) -> None:
    """Say of a value or of numbers what is said of those before: documentation and metadata."""
    new.doc_string = old.doc_string
    new.metadata_props.update(old.metadata_props)
    new.meta.update(old.meta)


def configure(node: ir.Node, said: onnx.NodeProto) -> None:
    """Say of a node on which devices its values lie, as was said of a node with the same inputs and outputs."""
    if configured := getattr(said, "device_configurations", ()):  # since ONNX 1.18
        values = dict(zip([*said.input, *said.output], [*node.inputs, *node.outputs], strict=False))
        read = ir.serde.deserialize_node_device_configuration
        node.device_configurations = tuple(read(each, values) for each in configured)


@contextlib.contextmanager
def configured(nodes: Iterable[ir.Node]) -> Iterator[None]:
    """Let nodes read other values; on which devices these lie is said as before."""
    said = [(node, ir.serde.serialize_node(node)) for node in nodes if node.device_configurations]
    yield
    for node, each in said:
        configure(node, each)


class Origin:
    """The nodes that a chain stands for, with their outputs, and the weight that they read."""

    def __init__(self, graph: onnx.GraphProto | None = None) -> None:
        self._graph = onnx.GraphProto() if graph is None else graph

    @classmethod
    def of(cls, nodes: Sequence[ir.Node], weight: ir.Value) -> Origin:
        """Return what recompose gives back of nodes that are removed."""
        graph = onnx.GraphProto()
        for node in nodes:
            said = ir.serde.serialize_node(node)
            del said.attribute[:]
            graph.node.append(said)
        graph.value_info.extend(ir.serde.serialize_value(node.outputs[0]) for node in nodes[:-1])
        tensor = weight.const_value
        if tensor is not None:
            said = graph.initializer.add(name=weight.name or "", doc_string=tensor.doc_string or "")
            for key, text in tensor.metadata_props.items():
                said.metadata_props.add(key=key, value=text)
        if weight.meta.get(DESCRIBED):
            graph.input.append(ir.serde.serialize_value(weight))
        if named := weight.meta.get(_QUANTIZED):
            note = graph.quantization_annotation.add(tensor_name=weight.name or "")
            for key, name in named.items():
                note.quant_parameter_tensor_names.add(key=key, value=name)
        return cls(graph)

    @classmethod
    def read(cls, node: ir.Node) -> Origin:
        """Return what the last node of a chain keeps; nothing if it keeps none, or if that is damaged."""
        graph = onnx.GraphProto()
        with contextlib.suppress(Exception):  # whatever a file says there; protobuf's errors have no base of their own
            graph = onnx.GraphProto.FromString(base64.b64decode(node.metadata_props.get(_WAS, ""), validate=True))
        return cls(graph)

    def keep(self, node: ir.Node) -> None:
        """Keep it in the last node of a chain."""
        node.metadata_props[_WAS] = base64.b64encode(self._graph.SerializeToString(deterministic=True)).decode()

    def restore_nodes(self, nodes: Sequence[ir.Node], taken: set[str | None]) -> None:
        """Give new nodes and the values between them their names again, unless another value has the name.

        An Add reads its bias first again, if it did.
        """
        if [node.op_type for node in nodes] != [said.op_type for said in self._graph.node]:
            return
        for node, said in zip(nodes, self._graph.node, strict=True):
            node.name, node.doc_string = said.name, said.doc_string or None
            node.metadata_props.update({each.key: each.value for each in said.metadata_props})
            if node.op_type == "Add" and [node.inputs[1].name] == said.input[:1]:  # type: ignore[union-attr]
                product, bias = node.inputs
                node.replace_input_with(0, bias)
                node.replace_input_with(1, product)
            configure(node, said)
        for node, info in zip(nodes, self._graph.value_info, strict=False):
            value = node.outputs[0]
            if info.name and info.name not in taken:
                if info.HasField("type"):
                    ir.serde.deserialize_value_info_proto(info, value)
                value.name = info.name
                taken.add(info.name)

    def restore_weight(self, weight: ir.Value) -> None:
        """Say of a weight and of its numbers what was said of them."""
        for info in self._graph.input:
            if info.name == weight.name:
                weight.meta[DESCRIBED] = True
                weight.doc_string = info.doc_string or None
                weight.metadata_props.update({each.key: each.value for each in info.metadata_props})
        for note in self._graph.quantization_annotation:
            if note.tensor_name == weight.name:
                weight.meta[_QUANTIZED] = {each.key: each.value for each in note.quant_parameter_tensor_names}
        for said in self._graph.initializer:
            if said.name == weight.name and weight.const_value is not None:
                weight.const_value.doc_string = said.doc_string
                weight.const_value.metadata_props.update({each.key: each.value for each in said.metadata_props})
