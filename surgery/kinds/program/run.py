"""Run exported programs: node by node, and as stages of a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.kinds.base import Pieces
from surgery.kinds.fx.read import Reader
from surgery.kinds.fx.run import leaves_of
from surgery.kinds.inputs import Inputs
from surgery.kinds.program.read import input_arguments
from surgery.kinds.program.whole import Whole

__all__ = ["bind_program", "buffer_of", "call_leaves", "join_outputs", "run_program"]

_MODULES: WeakKeyDictionary[ExportedProgram, nn.Module] = WeakKeyDictionary()  # a module of each program that was run
_WHOLES: WeakKeyDictionary[Pieces, Whole] = WeakKeyDictionary()  # what their JSON values say, once it was read


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


def run_program(program: ExportedProgram, values: Sequence[Any]) -> tuple[Any, ...]:
    """Run a stage on its inputs, in order, and return its outputs, in order."""
    if program not in _MODULES:
        _MODULES[program] = program.module(check_guards=False)
    outputs: tuple[Any, ...] = _MODULES[program](*values)
    return outputs


def call_leaves(pieces: Pieces, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the inputs of a call of the whole program, flat.

    Raises:
        InputError: they are not those that the program takes.
    """
    spec = _signature(pieces).in_spec
    found = leaves_of((args, kwargs), spec)
    order = spec.child(1).context or []
    kwargs = {name: kwargs[name] for name in order} if set(order) == set(kwargs) else kwargs
    if pytree.tree_structure((args, kwargs)) != spec or len(found) != len(pieces.inputs):
        what = f"{len(args)} inputs by position and {len(kwargs)} by name"
        raise InputError(what, allowed=f"the {len(pieces.inputs)} inputs {', '.join(pieces.inputs)}, as in the export")
    _check_constants(pieces, dict(zip(pieces.inputs, found, strict=True)))
    return found


def _check_constants(pieces: Pieces, given: Mapping[str, Any]) -> None:
    """Refuse other values than those that the export has worked into the graph."""
    for argument in input_arguments(_whole(pieces).signature):
        if isinstance(argument, ConstantArgument):
            value = given.get(argument.name)
            if type(value) is not type(argument.value) or value != argument.value:
                what = f"the input {argument.name} is {value!r:.80}"
                raise InputError(what, allowed=f"{argument.value!r:.80}, as in the export")


def join_outputs(pieces: Pieces, leaves: Sequence[Any]) -> Any:
    """Return what the whole program returns, made of the outputs that the stages give, and those that are constants.

    Raises:
        InputError: they are not as many as the program returns.
    """
    specs = [s for s in _whole(pieces).signature.output_specs if s.kind is OutputKind.USER_OUTPUT]
    wanted, form = sum(not isinstance(spec.arg, ConstantArgument) for spec in specs), _signature(pieces).out_spec
    if wanted != len(leaves) or len(specs) != form.num_leaves:
        raise InputError(f"the stages give {len(leaves)} outputs", allowed=f"{form.num_leaves}, as the whole program")
    given = iter(leaves)
    every = [spec.arg.value if isinstance(spec.arg, ConstantArgument) else next(given) for spec in specs]
    return pytree.tree_unflatten(every, form)


def _whole(pieces: Pieces) -> Whole:
    if pieces not in _WHOLES:
        _WHOLES[pieces] = Whole.from_json(pieces.whole)
    return _WHOLES[pieces]


def _signature(pieces: Pieces) -> Any:
    return _whole(pieces).calls[0].signature
