"""Parameters of an optimizer exchanged for others in place, with their state: the object stays the same.

Schedulers, gradient scalers and users hold on to the optimizer and count on its groups: so new parameters stand in the
group and at the place of those that they replace, with all options of the group, and no group comes or goes.

State moves by its name, since only some of it is known to be a moment of gradients:

| state | rule |
|---|---|
| ``momentum_buffer`` | velocity: the step is in its direction |
| ``exp_avg`` | average of gradients |
| ``exp_avg_sq``, ``max_exp_avg_sq`` | second moment |
| numbers, as ``step`` | copied |
| anything else | the state of this parameter is dropped, and starts anew |

That is all that SGD, Adam, AdamW, NAdam and RAdam have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.training.transport import Jacobian

__all__ = ["Exchange", "exchange_parameters"]

_VELOCITY, _GRADIENT = "momentum_buffer", "exp_avg"
_SECOND = ("exp_avg_sq", "max_exp_avg_sq")
State = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Exchange:
    """Parameters that leave and those that take their place, with the Jacobian of the weight by its factors.

    One for many is a weight that is factored, many for one a weight that is composed again; without a Jacobian the
    one new parameter is the old one, in a new object or by another name. ``names`` are those of the new ones.
    """

    old: tuple[nn.Parameter, ...]
    new: tuple[nn.Parameter, ...]
    names: tuple[str, ...]
    jacobian: Callable[[], Jacobian] | None = None


def exchange_parameters(optimizer: Optimizer, exchanges: Sequence[Exchange], *, carry: bool = True) -> list[str]:
    """Exchange parameters with their state; return one line for each state that could not be carried over.

    With ``carry=False`` all state of what leaves is dropped. Parameters that the optimizer does not have are not added.
    """
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
    """Give the new parameters their state; return why it cannot be done, if so."""
    states = [optimizer.state.get(old) or {} for old in exchange.old]
    if not any(states) or exchange.old[0] is exchange.new[0]:
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
    """Return a moment in the dtype and the memory layout of its parameter; anything else as a copy."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.clone()
    return torch.empty_like(parameter, requires_grad=False, dtype=value.dtype).copy_(value)


def _moved(states: Sequence[State], exchange: Exchange) -> list[State]:
    """Return the state of each new parameter."""
    if exchange.jacobian is None:
        return list(states)
    jacobian, down = exchange.jacobian(), len(exchange.old) == 1
    moved: list[State] = [{} for _ in exchange.new]
    mean = _mean(jacobian, states, down=down)
    for key in states[0]:
        rows = _rows(key, [state[key] for state in states], jacobian, mean, len(moved))
        for state, row in zip(moved, rows, strict=True):
            state[key] = row
    return moved


def _mean(jacobian: Jacobian, states: Sequence[State], *, down: bool) -> Tensor:
    """Return the average of gradients of the weight; zeros where there is none."""
    if _GRADIENT not in states[0]:
        return torch.zeros_like(jacobian.weight)
    means = [state[_GRADIENT] for state in states]
    return means[0] if down else jacobian.pull_back(means)


def _rows(key: str, values: Sequence[Any], jacobian: Jacobian, mean: Tensor, count: int) -> Sequence[Any]:
    """Return one entry of the state for each of ``count`` new parameters."""
    down = len(values) == 1
    if _is_number(values[0]):
        return [values[0]] * count
    if key == _VELOCITY:
        rows = jacobian.push_back(values[0]) if down else [jacobian.push(values)]
    elif key == _GRADIENT:
        rows = jacobian.pull(mean) if down else [mean]
    else:
        rows = jacobian.pull_squares(values[0], mean) if down else [jacobian.pull_back_squares(values, mean)]
    return [row.to(values[0].dtype) for row in rows]
