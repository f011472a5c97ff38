"""Exchange parameters of an optimizer and their state in place: the optimizer stays the same object.

Schedulers, gradient scalers and users keep references to the optimizer and rely on its groups. So new parameters take
the place of the old ones in the same group, with all options of the group, and no group is added or removed.

The name of a state decides how it is carried over, since only some states are known to be moments of gradients:

| state | rule |
|---|---|
| ``momentum_buffer`` | velocity: the step is in its direction |
| ``exp_avg`` | average of gradients |
| ``exp_avg_sq``, ``max_exp_avg_sq`` | second moment |
| numbers, such as ``step`` | copied |
| anything else | the state of this parameter is dropped, and starts anew |

SGD, Adam, AdamW, NAdam and RAdam have no other states.

Check that an optimizer finds its parameters in ``param_groups`` only, since a run exchanges them there.

An optimizer with a list of its own (LBFGS), with a flat copy of all parameters, or around another optimizer (Lookahead,
SAM) would silently go on to step the parameters that have left the model. So all its attributes are searched.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.errors import InputError
from surgery.training.transport import Jacobian

__all__ = ["Exchange", "check_lists", "exchange_parameters"]

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
        # Some optimizers key their state by ``id(parameter)``: such a number would be stale after the exchange as well.
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


_VELOCITY, _GRADIENT = "momentum_buffer", "exp_avg"
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")
State = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Exchange:
    """Parameters to remove and those that take their place, with the Jacobian of the weight by its factors.

    One ``old`` and several ``new`` parameters factor a weight; several old ones and one new one compose it again.
    Without a Jacobian the new parameter is the old one, in a new object or under another name. ``names`` are the names
    of the new parameters.
    """

    old: tuple[nn.Parameter, ...]
    new: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    jacobian: Callable[[], Jacobian] | None = None


def exchange_parameters(optimizer: Optimizer, exchanges: Sequence[Exchange], *, carry: bool = True) -> list[str]:
    """Exchange parameters with their state; return one line for each state that could not be carried over.

    With ``carry=False`` the state of all old parameters is dropped. New parameters are not added if the optimizer does
    not have the old ones.
    """
    # All new parameters of an exchange go where its first old one was, and the other old ones are left out. Example:
    # a group [a, w, b] with w -> (f, g) becomes [a, f, g, b], and (f, g) -> w gives [a, w, b] again.
    first = {id(exchange.old[0]): exchange for exchange in exchanges}
    leaving = {id(old) for exchange in exchanges for old in exchange.old}
    notes = []
    for group in optimizer.param_groups:
        group_names = group.get("param_names") or [""] * len(group["params"])
        parameters: list[nn.Parameter] = []
        names: list[str] = []
        for parameter, name in zip(group["params"], group_names, strict=True):
            exchange = first.get(id(parameter))
            if exchange is not None:
                parameters += exchange.new
                names += exchange.names
                notes += _carry(optimizer, exchange) if carry else []
            elif id(parameter) not in leaving:
                parameters.append(parameter)
                names.append(name)
        group["params"] = parameters
        if "param_names" in group:
            group["param_names"] = names
    for exchange in exchanges:
        for old in exchange.old:
            if all(old is not new for new in exchange.new):
                optimizer.state.pop(old, None)
    return notes


def _carry(optimizer: Optimizer, exchange: Exchange) -> list[str]:
    """Give the new parameters their state; return one line with the reason if that is not possible."""
    states = [optimizer.state.get(old) or {} for old in exchange.old]
    if not any(states) or exchange.old[0] is exchange.new[0]:  # nothing to carry, or the same object keeps its state
        return []
    unknown = sorted({key for state in states for key, value in state.items() if not _known(key, value)})
    uneven = any(set(state) != set(states[0]) for state in states)
    if exchange.jacobian is not None and (unknown or uneven):
        what = f"{type(optimizer).__name__}'s {', '.join(unknown)}" if unknown else "state of a part of its factors"
        return [f"{exchange.names[0]}: {what} cannot be carried over; its state starts anew"]
    for new, state in zip(exchange.new, _moved(states, exchange), strict=True):
        optimizer.state[new] = {key: _like(value, new) for key, value in state.items()}
    return []


def _known(key: str, value: Any) -> bool:
    return key in (_VELOCITY, _GRADIENT, *_SECOND) or _is_number(value)


def _is_number(value: Any) -> bool:
    return value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, int | float | bool | None)


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """Return a moment in the memory layout of its parameter, a copy of any other tensor, or a plain value as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, requires_grad=False, dtype=value.dtype).copy_(value)


def _moved(states: Sequence[State], exchange: Exchange) -> list[State]:
    """Return the state of each new parameter."""
    if exchange.jacobian is None:
        return list(states)
    # Into factors (one old parameter) by J^T, and back to the weight (several) by least squares; velocities the other
    # way round. The mean is needed for all second moments, so that it is found first.
    jacobian, factoring = exchange.jacobian(), len(exchange.old) == 1
    moved: list[State] = [{} for _ in exchange.new]
    mean = _mean(jacobian, states, factoring=factoring)
    for key in states[0]:
        rows = _rows(key, [state[key] for state in states], jacobian, mean, len(moved))
        for state, row in zip(moved, rows, strict=True):
            state[key] = row
    return moved


def _mean(jacobian: Jacobian, states: Sequence[State], *, factoring: bool) -> Tensor:
    """Return the average gradient of the weight, or zeros if the optimizer keeps none."""
    if _GRADIENT not in states[0]:
        return torch.zeros_like(jacobian.weight)
    means = [state[_GRADIENT] for state in states]
    return means[0] if factoring else jacobian.pull_back(means)


def _rows(key: str, values: Sequence[Any], jacobian: Jacobian, mean: Tensor, count: int) -> Sequence[Any]:
    """Return one entry of the state for each of ``count`` new parameters."""
    factoring = len(values) == 1
    if _is_number(values[0]):
        return [values[0]] * count
    if key == _VELOCITY:
        rows = jacobian.push_back(values[0]) if factoring else [jacobian.push(values)]
    elif key == _GRADIENT:
        rows = jacobian.pull(mean) if factoring else [mean]
    else:
        rows = jacobian.pull_squares(values[0], mean) if factoring else [jacobian.pull_back_squares(values, mean)]
    return [row.to(values[0].dtype) for row in rows]
