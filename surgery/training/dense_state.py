"""Dense state dicts of modules that contain a factored network, for checkpoints.

Checkpoints are made in many ways: with or without callbacks, of the weights only, of an average. All of them call
``state_dict`` of a module, so a hook there composes the factors.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from surgery.training.hooks import WeakHook
from surgery.training.low_rank import LowRankTraining

__all__ = ["DenseStates"]


class DenseStates:
    """Makes ``state_dict`` of the watched modules return the dense architecture while a run is factored."""

    def __init__(self, run: LowRankTraining) -> None:
        self._run, self._on = run, True
        self._handles: dict[nn.Module, Any] = {}

    def watch(self, module: nn.Module) -> None:
        """Watch a module that contains the network of the run or a mirror of it; watching it twice changes nothing."""
        if module not in self._handles:
            self._handles[module] = module.register_state_dict_post_hook(WeakHook(self._compose))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Return states with their factors inside this context."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def release(self) -> None:
        """Remove the hooks."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()

    def _compose(self, module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        if not self._on or self._run.phase != "factored":
            return
        # A module may hold the network and its mirrors, each under several names; every one of them is replaced.
        for root in self._run.roots:
            names = [name for name, inside in module.named_modules(remove_duplicate=False) if inside is root]
            if not names:
                continue
            dense = self._run.dense_state(root)
            for name in names:
                first = f"{prefix}{name}." if name else prefix
                for key in [key for key in state if key.startswith(first)]:
                    del state[key]
                state.update({f"{first}{key}": value for key, value in dense.items()})
