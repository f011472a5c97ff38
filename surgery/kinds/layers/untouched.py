"""Run a module without lasting effects: its mode, its state and the random state are restored afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["evaluation", "kept_buffers", "kept_random", "kept_state", "untouched"]


@contextlib.contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Put all modules in evaluation mode, and restore the training flag of each afterwards.

    The flags are set one by one, because modules that torch.export made refuse ``eval()``.
    """
    flags = {m: m.training for m in module.modules()}
    for m in flags:
        m.training = False
    try:
        yield
    finally:
        for m, training in flags.items():
            m.training = training


def kept_random(root: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Restore the random states that a model may use: that of the CPU and those of the model's devices."""
    found = {parameter.device for parameter in root.parameters() if parameter.device.type == "cuda"}
    return torch.random.fork_rng(devices=[device.index for device in found])


@contextlib.contextmanager
def kept_buffers(root: nn.Module) -> Iterator[None]:
    """Restore the numbers of buffers that the model writes to."""
    # torch counts the writes to a tensor, so that only changed buffers are copied back
    kept = [(b, b._version, b.detach().clone()) for b in root.buffers() if not b.is_inference()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, version, numbers in kept:
                if buffer._version != version:
                    buffer.copy_(numbers)


@contextlib.contextmanager
def kept_state(root: nn.Module) -> Iterator[None]:
    """Restore the state that a model keeps itself: attributes, entries of lists and dicts, buffers, counters.

    A tracer leaves proxies in this state, and a run updates its counters.
    """
    kept = [(module, dict(vars(module)), _entries(module)) for module in root.modules()]
    try:
        with kept_buffers(root):
            yield
    finally:
        for module, own, entries in kept:
            _restore(vars(module), own)
            for value, before in entries:
                if isinstance(value, dict):
                    _restore(value, before)
                elif isinstance(value, list):
                    value[:] = before


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Restore a module's own state, as ``kept_state`` does, and the random states; a program keeps no state."""
    if not isinstance(model, nn.Module):
        yield
        return
    with kept_random(model), kept_state(model):
        yield


def _entries(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the lists and dicts among a module's attributes, each with a copy of its entries."""
    return [(value, type(value)(value)) for value in vars(module).values() if type(value) in (list, dict)]


def _restore(value: dict[Any, Any], before: dict[Any, Any]) -> None:
    """Restore the entries of a dict, if they have changed."""
    same = list(map(id, value.values())) == list(map(id, before.values())) and len(value) == len(before)
    if not same:
        value.clear()
        value.update(before)
