"""The kind of nn.Modules."""

from __future__ import annotations

from torch import nn

from surgery.kinds.base import Access, Kind
from surgery.kinds.inputs import Declared, Inputs, Signature, example_forms, forward_signature
from surgery.kinds.layers.unpacking import refuse_inplace
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
