"""Run a module while hooks watch its submodules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from surgery.kinds.inputs import Inputs
from surgery.kinds.layers.carried import copy_module
from surgery.kinds.layers.modules import buffers_of, is_tracked_norm
from surgery.kinds.layers.unpacking import has_packed, unpack_all
from surgery.kinds.layers.untouched import evaluation
from surgery.kinds.observed import Change, Hooks, Norm, Observed, See
from surgery.sites.flow import Call, Flow

__all__ = ["ObservedModule"]


class ObservedModule(Observed):
    """An nn.Module whose submodules have hooks while it runs."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        super().__init__(flow)
        self._model = model
        packed = has_packed(model)
        holder = nn.ModuleList([copy_module(model) if packed else model])
        if packed:
            unpack_all(holder)
        self.root = holder[0]
        self._hooks = Hooks(self._additions)

    def watch(self, call: Call, see: See) -> None:
        """Show the input of a module; one hook sees all its calls, so it is added once however many there are."""
        self._hooks.watch(str(call.path), see)

    def norms(self) -> list[Norm]:
        """Return the batch norms, by the path of their module."""
        paths = {id(module): path for path, module in self.root.named_modules() if is_tracked_norm(module)}
        return [self._norm(path) for path in paths.values()]

    def _norm(self, path: str) -> Norm:
        mean, variance = buffers_of(self.root, path)
        kept = None if self.root is self._model else buffers_of(self._model, path)
        return Norm(path, mean, variance, lambda see: self._hooks.watch(path, see), kept)

    def tap(self, call: Call, change: Change) -> None:
        """Change the output of a module."""
        self._hooks.taps[str(call.path)] = change

    def forget(self) -> None:
        """Have no hooks."""
        self._hooks, self._follows = Hooks(self._additions), False

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """The module's own."""
        return self.root.parameters()

    def execute(self, inputs: Inputs) -> Any:
        """Run with hooks, which are gone afterwards."""
        args, kwargs = inputs
        with self._hooks.on(self.root), evaluation(self.root):
            return self.root(*args, **kwargs)
