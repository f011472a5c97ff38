"""The kind of nn.Modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule

from surgery.kinds.base import Access, Kind, Pieces
from surgery.kinds.fx.stages import CutGraph, graph_result, origin_of, run_stage, take_numbers
from surgery.kinds.inputs import Declared, Inputs, Signature, example_forms, forward_signature
from surgery.kinds.layers.unpacking import refuse_inplace
from surgery.kinds.module.cut import cut_module
from surgery.kinds.module.write import OpenModule

__all__ = ["ModuleKind"]


class ModuleKind(Kind):
    """nn.Modules: their layers are replaced."""

    name = "module"
    models = nn.Module
    label = "nn.Module"

    def open(self, model: nn.Module, inputs: Inputs, access: Access) -> OpenModule:
        """Open a module."""
        return OpenModule(model, *inputs, access)

    def signature(self, model: nn.Module, example: Inputs) -> Signature:
        """Return how a module is called, from its ``forward``."""
        return forward_signature(model, example)

    def declared_inputs(self, model: nn.Module, example: Inputs, signature: Signature) -> dict[str, Declared]:
        """Return dtype and shape of the example inputs."""
        return example_forms(model, example, signature)

    def refuse_inplace(self, model: nn.Module) -> str | None:
        """Refuse a model that consists only of a layer that has to be unpacked."""
        return refuse_inplace(model)

    def says_what_runs(self) -> bool:
        """Return False, because a module may reach a layer in other ways than by its name."""
        return False

    def cuttable(self, model: nn.Module, inputs: Inputs) -> CutGraph:
        """Capture the graph of a module, in the mode that it is in, to be cut into stages that share its parameters."""
        return cut_module(model, inputs)

    def join(self, pieces: Pieces) -> nn.Module:
        """Return the module of which the pieces are the stages."""
        origin = origin_of(pieces)
        take_numbers(origin, pieces)
        return origin.model

    def leaves(self, pieces: Pieces, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the inputs of a call of the whole, in the order of its graph."""
        return list(origin_of(pieces).bind(args, kwargs))

    def run_stage(self, model: GraphModule, values: Sequence[Any]) -> tuple[Any, ...]:
        """Run a stage on its inputs, in order."""
        return run_stage(model, values)

    def result(self, pieces: Pieces, leaves: Sequence[Any]) -> Any:
        """Return what the whole returns, made of its outputs."""
        return graph_result(origin_of(pieces), leaves)
