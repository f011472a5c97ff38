"""Stages of a module or a graph of modules as programs, to be saved: the whole is exported stage by stage.

What is exported is the model itself, with its parameters and its signature; only what its ``forward`` does is done by
the stages, one after another. Each is called as a module of its own, so that torch.export notes on each node that it
captures which stage the node belongs to. The program is then cut by these notes:

    stage 0: conv, relu     stage 1: linear     ->     conv2d, relu | linear
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter

from surgery.errors import InputError
from surgery.kinds.base import Kind, Pieces
from surgery.kinds.inputs import Inputs
from surgery.kinds.module.cut import export_module
from surgery.kinds.registry import KINDS
from surgery.runtime.compare import evaluating
from surgery.sites.network import Network

__all__ = ["program_pieces"]

_STAGE = "surgery_stage_"


def program_pieces(kind: Kind, pieces: Pieces, example: Inputs) -> Pieces:
    """Return the stages of a module, in evaluation mode, as programs; ``example`` are inputs of the whole.

    Raises:
        CaptureError: torch.export cannot capture the stages.
        InputError: a stage has no operations once it is exported.
    """
    whole = _Whole(kind, pieces)
    with evaluating(whole):
        program = export_module(whole, *example)
    state = program.state_dict  # torch puts all buffers after all parameters
    ordered = {name: state[name] for name in (*whole.state_dict(), *state) if name in state}
    state.clear()
    state.update(ordered)
    notes = _take_notes(program)
    cuttable = KINDS["program"].cuttable(program, example)
    stage_of = _stages(cuttable.network, notes)
    if missing := set(range(len(pieces.stages))) - set(stage_of):
        what = f"stage {min(missing)} has no operations once it is exported"
        raise InputError(what, next_step="cut the model at other places, or export it with torch.export first")
    return cuttable.cut(stage_of)


class _Whole(nn.Module):
    """The model with its own modules, parameters and signature; its ``forward`` runs the stages."""

    def __init__(self, kind: Kind, pieces: Pieces) -> None:
        super().__init__()
        model = kind.join(pieces)
        for store in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[store] = copy.copy(model.__dict__[store])
        self._modules = dict(model._modules)
        self.training = model.training
        stages = [_Stage(self, piece.model) for piece in pieces.stages]
        self._modules |= {f"{_STAGE}{number}": stage for number, stage in enumerate(stages)}

        def forward(*args: Any, **kwargs: Any) -> Any:
            values = dict(zip(pieces.inputs, kind.leaves(pieces, args, kwargs), strict=True))
            for piece, stage in zip(pieces.stages, stages, strict=True):
                values |= zip(piece.outputs, stage(*(values[name] for name in piece.inputs)), strict=True)
            return kind.result(pieces, [values[name] for name in pieces.outputs])

        forward.__signature__ = inspect.signature(model.forward)  # type: ignore[attr-defined]
        self.__dict__["forward"] = forward


class _Stage(nn.Module):
    """A stage without parameters of its own: it runs on those of the whole, by their names."""

    def __init__(self, whole: nn.Module, stage: GraphModule) -> None:
        super().__init__()
        self.__dict__ |= {"whole": whole, "stage": stage}  # not as modules, which would give their weights more names

    def forward(self, *values: Any) -> Any:
        return _OnWhole(self.__dict__["whole"], self.__dict__["stage"]).run(*values)


class _OnWhole(Interpreter):
    """Runs a stage's graph on the modules and parameters of the whole; what only the stage has is taken from it."""

    def __init__(self, whole: nn.Module, stage: GraphModule) -> None:
        super().__init__(whole, graph=stage.graph)
        self._stage = stage

    def fetch_attr(self, target: str) -> Any:
        try:
            return super().fetch_attr(target)
        except RuntimeError:  # a constant of the capture
            found: Any = self._stage
            for name in target.split("."):
                found = getattr(found, name)
            return found


def _take_notes(program: ExportedProgram) -> dict[str, int]:
    """Return the stage of each node, by its name, and remove all that the program says of stages."""
    found = {}
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        for key, (path, _) in list(stack.items()):
            if path.startswith(_STAGE):
                found[node.name] = int(path.removeprefix(_STAGE).partition(".")[0])
                del stack[key]
    calls = program.module_call_graph
    calls[:] = [entry for entry in calls if not entry.fqn.startswith(_STAGE)]
    return found


def _stages(network: Network, notes: Mapping[str, int]) -> Sequence[int]:
    """Return the stage of each operation: as noted, or as early as what it reads allows.

    Operations that have to stay together are in the last of their stages, and what reads them is not before them.
    """
    stage_of = [notes.get(operation.name, 0) for operation in network.operations]
    # Stages only go up, and to no higher one than there is, so that the rounds come to an end.
    before: list[int] = []
    while before != stage_of:
        before = list(stage_of)
        for number, operation in enumerate(network.operations):
            reads = (network.producer[value] for value in operation.reads if value in network.producer)
            stage_of[number] = max([stage_of[number], *(stage_of[each] for each in reads)])
        for group in network.together:
            last = max(stage_of[number] for number in group)
            for number in group:
                stage_of[number] = last
    return stage_of
