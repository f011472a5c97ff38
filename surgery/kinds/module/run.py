"""Run a module while hooks watch its submodules."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from surgery.kinds.inputs import Inputs
from surgery.kinds.layers.carried import copy_module
from surgery.kinds.layers.modules import buffers_of, is_tracked_norm
from surgery.kinds.layers.unpacking import has_packed, unpack_all
from surgery.kinds.layers.untouched import evaluation
from surgery.kinds.observed import Hooks, Norm, Observed, OutputChange, See
from surgery.sites import Call, Flow

__all__ = ["ObservedModule"]


class ObservedModule(Observed):
    """An nn.Module that runs with hooks on its submodules; packed layers are unpacked in a copy."""

    def __init__(self, model: nn.Module, flow: Callable[[], Flow]) -> None:
        super().__init__(flow)
        self._model = model
        packed = has_packed(model)
        holder = nn.ModuleList([copy_module(model) if packed else model])
        if packed:
            unpack_all(holder)
        self.root = holder[0]
        self._hooks = Hooks(self._additions)

    def watch(self, call: Call, see: See) -> None:
        """Call ``see`` with the inputs of a module; one hook sees all calls of the module, so it is added once."""
        self._hooks.watch(str(call.path), see)

    def norms(self) -> list[Norm]:
        """Return the batch norms, each under the last path of its module."""
        paths = {id(module): path for path, module in self.root.named_modules() if is_tracked_norm(module)}
        return [self._norm(path) for path in paths.values()]

    def _norm(self, path: str) -> Norm:
        mean, variance = buffers_of(self.root, path)

        def keep() -> None:
            for buffer, value in zip(buffers_of(self._model, path), (mean, variance), strict=True):
                buffer.copy_(value)

        keeps = None if self.root is self._model else keep
        return Norm(path, mean, variance, lambda see: self._hooks.watch(path, see), keeps)

    def tap(self, call: Call, change: OutputChange) -> None:
        """Replace the output of a module by what ``change`` returns."""
        self._hooks.taps[str(call.path)] = change

    def forget(self) -> None:
        """Remove all hooks."""
        self._hooks, self._follows = Hooks(self._additions), False

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters of the module that runs."""
        return self.root.parameters()

    def execute(self, inputs: Inputs) -> Any:
        """Run the module with its hooks, which are removed afterwards."""
        args, kwargs = inputs
        with self._hooks.on(self.root), evaluation(self.root):
            return self.root(*args, **kwargs)
