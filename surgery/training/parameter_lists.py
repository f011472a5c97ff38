"""Check that an optimizer finds its parameters in ``param_groups`` only, since a run exchanges them there.

An optimizer with a list of its own (LBFGS), with a flat copy of all parameters, or around another optimizer (Lookahead,
SAM) would silently go on to step the parameters that have left the model. So all its attributes are searched.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.errors import InputError

__all__ = ["check_lists"]

_DEPTH = 4  # levels of containers and objects inside each other


def check_lists(optimizer: Optimizer) -> None:
    """Check that an optimizer keeps its parameters in its groups only.

    Raises:
        InputError: another attribute holds parameters; the message names it.
    """
    search = _Search.of(optimizer)
    for name, value in _attributes(optimizer):
        found = search.find(value, _DEPTH)
        if found is not None:
            inner = f"the optimizer in {name}" if isinstance(value, Optimizer) else "SGD, Adam or AdamW, for example"
            raise InputError(
                f"{type(optimizer).__name__} keeps {found} in {name!r}: it would not see that parameters are exchanged",
                allowed="optimizers that find their parameters in param_groups alone",
                next_step=f"use {inner}",
            )


def _attributes(optimizer: Optimizer) -> Iterator[tuple[str, Any]]:
    """Yield the attributes of an optimizer other than groups, state and hooks, and the options of its groups."""
    for name, value in vars(optimizer).items():
        if name not in ("param_groups", "state", "defaults") and not name.endswith("_hooks"):
            yield name, value
    for group in optimizer.param_groups:
        yield from ((name, value) for name, value in group.items() if name != "params")


@dataclass(frozen=True, eq=False)
class _Search:
    """What to look for: parameters by identity, their total size for flat copies (-1 for none), other optimizers."""

    optimizer: Optimizer
    parameters: frozenset[int]
    values: int
    seen: set[int]

    @classmethod
    def of(cls, optimizer: Optimizer) -> _Search:
        """Return the search for the parameters of an optimizer."""
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        several = len(held) > 1
        values = sum(parameter.numel() for parameter in held) if several else -1
        return cls(optimizer, frozenset(map(id, held)), values, {id(optimizer)})

    def find(self, value: Any, depth: int) -> str | None:
        """Return in words which of these a value holds, or None."""
        if id(value) in self.parameters or (isinstance(value, int) and value in self.parameters):
            return "parameters"
        if isinstance(value, Optimizer) and value is not self.optimizer:
            return "another optimizer"
        if isinstance(value, Tensor):
            return "a flat copy of all parameters" if value.numel() == self.values and value.dim() == 1 else None
        if depth == 0 or id(value) in self.seen:
            return None
        self.seen.add(id(value))
        return next((found for part in _parts(value) if (found := self.find(part, depth - 1)) is not None), None)


def _parts(value: Any) -> Collection[Any]:
    """Return what a container, a module or an object holds; nothing for classes, functions and plain values."""
    if isinstance(value, nn.Module):
        return list(value.parameters())
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset) or type(value).__name__ == "deque":
        return list(value)
    if isinstance(value, MethodType):
        return [value.__self__]
    if callable(value) or isinstance(value, ModuleType) or not hasattr(value, "__dict__"):
        return []
    return list(vars(value).values())
