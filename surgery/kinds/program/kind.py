"""The kind of exported programs, and how one is called: its inputs by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument
from torch.fx import Node
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.kinds.base import Access, Kind, Pieces
from surgery.kinds.fx.kind import declare, first_size
from surgery.kinds.inputs import Declared, Inputs, Signature, given_inputs, input_like
from surgery.kinds.program.cut import CutProgram
from surgery.kinds.program.join import join_program
from surgery.kinds.program.read import input_arguments
from surgery.kinds.program.run import call_leaves, join_outputs, run_program
from surgery.kinds.program.write import OpenProgram

__all__ = ["ProgramKind", "declared_inputs", "fixed_batch", "program_inputs", "read_signature"]

_ANY = 2**31  # torch.export's own bounds on dynamic sizes are larger than this


def program_inputs(program: ExportedProgram, *, seed: int = 0) -> Inputs:
    """Return the program's own example inputs, or else random ones; a dynamic size is its size at the export, or 2.

    Raises:
        InputError: the program has no example inputs, and one of its inputs is not a tensor.
    """
    if program.example_inputs is not None:
        args, kwargs = program.example_inputs
        return tuple(args), dict(kwargs)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    leaves: list[Any] = []
    for index, argument in enumerate(input_arguments(program.graph_signature)):
        value = values.get(argument.name)
        if isinstance(argument, ConstantArgument):
            leaves.append(argument.value)
        elif isinstance(value, Tensor):
            leaves.append(input_like(value, argument.name, seed + index))
        else:
            what = f"the input {argument.name} of the program is not a tensor"
            raise InputError(what, next_step="give example_inputs")
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    return tuple(args), dict(kwargs)


def read_signature(program: ExportedProgram) -> Signature:
    """Return how a program is called."""
    args, kwargs = program_inputs(program)
    names = [argument.name for argument in input_arguments(program.graph_signature)]
    # inputs that are themselves tuples or dicts have several names each; then positions get names of their own
    flat = len(names) == len(args) + len(kwargs)
    first = names[: len(args)] if flat else [f"arg{i}" for i in range(len(args))]
    every = (*first, *kwargs)
    return Signature(every, len(args), frozenset(every), positional=len(args))


def _nodes(program: ExportedProgram) -> list[Node]:
    inputs = {argument.name for argument in input_arguments(program.graph_signature)}
    return [node for node in program.graph.find_nodes(op="placeholder") if node.name in inputs]


def fixed_batch(program: ExportedProgram) -> int | None:
    """Return the only batch size that a program accepts, or None if it accepts any."""
    return first_size(_nodes(program))


def declared_inputs(program: ExportedProgram, signature: Signature) -> dict[str, Declared]:
    """Return dtype, sizes and limits of the inputs that are tensors, by name: from the program, or its examples."""

    def limit(size: Any) -> int | None:
        known = program.range_constraints.get(size.node.expr)
        return int(known.upper) if known is not None and known.upper < _ANY else None

    given = given_inputs(program_inputs(program), signature)
    found = {
        name: Declared(value.dtype, (None,) * value.dim(), tuple(value.shape))
        for name, value in given.items()
        if isinstance(value, Tensor)
    }
    return found | declare(_names_in_order(program, signature), _nodes(program), limit)


def _names_in_order(program: ExportedProgram, signature: Signature) -> Sequence[str]:
    """Return the names in the order of the graph; inputs by name may come in another order."""
    if program.call_spec.in_spec is None:
        return signature.names
    return *signature.names[: signature.positional], *(program.call_spec.in_spec.child(1).context or [])


class ProgramKind(Kind):
    """ExportedPrograms: their ATen nodes are rewritten in a new program."""

    name = "program"
    models = ExportedProgram
    label = "torch.export.ExportedProgram"

    def open(self, model: ExportedProgram, inputs: Inputs, access: Access) -> OpenProgram:
        """Open a program; the program itself is never changed."""
        return OpenProgram(model, *inputs)

    def runnable(self, model: ExportedProgram) -> nn.Module:
        """Return the module of a program."""
        return model.module()

    def program(self, model: ExportedProgram) -> ExportedProgram | None:
        """Return the program itself."""
        return model

    def kept(self, model: ExportedProgram) -> Any:
        """Return what the graph module of a program has in its metadata."""
        return model.graph_module.meta.get("surgery")

    def keep(self, model: ExportedProgram, values: Mapping[str, Any]) -> None:
        """Put values into the metadata of the graph module."""
        model.graph_module.meta["surgery"] = dict(values)

    def tensors(self, model: ExportedProgram) -> Mapping[str, Any]:
        """Return the state of a program."""
        return model.state_dict

    def brought_inputs(self, model: ExportedProgram, *, seed: int = 0) -> Inputs | None:
        """Return the example inputs of a program, or else random ones."""
        return program_inputs(model, seed=seed)

    def brings_inputs(self) -> bool:
        """Return True: a program has example inputs, or declares shapes for random ones."""
        return True

    def signature(self, model: ExportedProgram, example: Inputs) -> Signature:
        """Return how a program is called."""
        return read_signature(model)

    def declared_inputs(self, model: ExportedProgram, example: Inputs, signature: Signature) -> dict[str, Declared]:
        """Return what the program says about its inputs."""
        return declared_inputs(model, signature)

    def fixed_batch(self, model: ExportedProgram) -> int | None:
        """Return the only batch size that a program accepts, or None."""
        return fixed_batch(model)

    def refuse_inplace(self, model: ExportedProgram) -> str | None:
        """Refuse, since a changed program is always a new program."""
        return "an exported program cannot be changed in place"

    def refuse_structure(self) -> str | None:
        """Refuse, since the chains of a program are nodes and not layers."""
        return "a graph"

    def cuttable(self, model: ExportedProgram, inputs: Inputs) -> CutProgram:
        """Open a program to be cut into stages."""
        return CutProgram(model, inputs)

    def join(self, pieces: Pieces) -> ExportedProgram:
        """Return the program of which the pieces are the stages."""
        return join_program(pieces, self.stages_of(pieces))

    def leaves(self, pieces: Pieces, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the inputs of a call of the whole program, flat."""
        return call_leaves(pieces, args, kwargs)

    def run_stage(self, model: ExportedProgram, values: Sequence[Any]) -> tuple[Any, ...]:
        """Run a stage on its inputs, in order."""
        return run_program(model, values)

    def result(self, pieces: Pieces, leaves: Sequence[Any]) -> Any:
        """Return what the whole program returns, made of its outputs."""
        return join_outputs(pieces, leaves)
