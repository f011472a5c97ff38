"""The values that an exported program needs to be run node by node: those of its placeholders and buffers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Node

from surgery.kinds.fx.read import Reader
from surgery.kinds.fx.run import leaves_of
from surgery.kinds.inputs import Inputs

__all__ = ["bind_program", "buffer_of"]


def bind_program(program: ExportedProgram, reader: Reader, inputs: Inputs) -> dict[Node, Any]:
    """Return the values of all placeholders: inputs, parameters as the reader has them, buffers and constants."""
    given = iter(leaves_of(inputs, program.call_spec.in_spec))
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    values: dict[Node, Any] = {}
    for node in reader.graph.find_nodes(op="placeholder"):
        spec = specs.get(node.name)
        if node in reader.providers:
            values[node] = reader.parameters[reader.providers[node]].detach()
        elif spec is None or spec.kind is InputKind.USER_INPUT:
            values[node] = next(given)
        else:
            state = program.state_dict if spec.target in program.state_dict else program.constants
            value = state[str(spec.target)]
            values[node] = value.detach() if isinstance(value, nn.Parameter) else value
    return values


def buffer_of(program: ExportedProgram, node: Node) -> tuple[str, Tensor]:
    """Return the name and the tensor of the buffer that a placeholder provides."""
    name = program.graph_signature.inputs_to_buffers[node.name]
    return name, program.state_dict[name]
