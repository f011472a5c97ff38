"""The kind of nn.Modules."""

from __future__ import annotations

from torch import nn

from surgery.kinds.base import Access, Kind
from surgery.kinds.inputs import Declared, Inputs, Signature, example_forms, forward_signature
from surgery.kinds.layers.unpacking import refuse_inplace
from surgery.kinds.module.write import OpenModule

__all__ = ["ModuleKind"]


class ModuleKind(Kind):
    """nn.Modules: what is found in them are layers, and layers are replaced."""

    name = "module"
    models = nn.Module

    def open(self, model: nn.Module, inputs: Inputs, access: Access) -> OpenModule:
        """Open a module."""
        return OpenModule(model, *inputs, access)

    def signature(self, model: nn.Module, example: Inputs) -> Signature:
        """Return how a module is called, by its ``forward``."""
        return forward_signature(model, example)

    def declared_inputs(self, model: nn.Module, example: Inputs, signature: Signature) -> dict[str, Declared]:
        """Return what the example inputs say."""
        return example_forms(model, example, signature)

    def refuse_inplace(self, model: nn.Module) -> str | None:
        """Refuse a model that is nothing but a layer which is taken apart."""
        return refuse_inplace(model)

    def says_what_runs(self) -> bool:
        """False: a module may reach a layer by other ways than by its name."""
        return False
