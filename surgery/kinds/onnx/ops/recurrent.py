"""The recurrent layers LSTM, GRU and RNN.

X W^T is computed for all steps at once, and shown to ``Said.product``; then a loop over steps adds h R^T. ONNX stacks
the gates along the rows of W (directions, gates * H, I): i, o, f, c of an LSTM; z, r, h of a GRU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.kinds.onnx.ops.said import Op, Said

__all__ = ["RECURRENT"]

_USUAL = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh"), "RNN": ("Tanh",)}
_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True, eq=False)
class _Layer:
    """One direction: recurrent weights (gates * H, H), their biases or None, peepholes, and the order in a GRU."""

    recurrent: Tensor
    bias: Tensor | None
    peepholes: Tensor | None
    reset_first: bool


_State = tuple[Tensor, Tensor | None]


def _lstm(layer: _Layer, x: Tensor, state: _State) -> _State:
    h, c = state
    assert c is not None  # an LSTM has a cell
    i, o, f, g = (x + _times(layer, h)).chunk(4, -1)
    if layer.peepholes is not None:
        # i and f see the cell as it was, o as it is afterwards.
        to_i, to_o, to_f = layer.peepholes.chunk(3, -1)
        i, f = i + to_i * c, f + to_f * c
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o + to_o * c) * torch.tanh(c), c
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(layer: _Layer, x: Tensor, state: _State) -> _State:
    h, size = state[0], state[0].shape[-1]
    rows = layer.recurrent
    if layer.reset_first:  # r * h is multiplied by R
        gates = x[..., : 2 * size] + h @ rows[: 2 * size].mT
        gates = gates if layer.bias is None else gates + layer.bias[: 2 * size]
        z, r = torch.sigmoid(gates).chunk(2, -1)
        inner = (r * h) @ rows[2 * size :].mT
        inner = inner if layer.bias is None else inner + layer.bias[2 * size :]
        n = torch.tanh(x[..., 2 * size :] + inner)
    else:
        # r multiplies R h and its bias after the product, so that one product serves all three gates.
        all_gates = _times(layer, h)
        z, r = torch.sigmoid(x[..., : 2 * size] + all_gates[..., : 2 * size]).chunk(2, -1)
        n = torch.tanh(x[..., 2 * size :] + r * all_gates[..., 2 * size :])
    return (1 - z) * n + z * h, None


def _rnn(layer: _Layer, x: Tensor, state: _State) -> _State:
    return torch.tanh(x + _times(layer, state[0])), None


def _times(layer: _Layer, h: Tensor) -> Tensor:
    return h @ layer.recurrent.mT if layer.bias is None else torch.addmm(layer.bias, h, layer.recurrent.mT)


_STEPS: dict[str, Callable[[_Layer, Tensor, _State], _State]] = {"LSTM": _lstm, "GRU": _gru, "RNN": _rnn}


def _knows(said: Said, lengths: Tensor | None, steps: int, directions: int) -> bool:
    usual = _USUAL[said.op_type] * directions
    activations = tuple(said.get("activations") or usual)
    same = [each.lower() for each in activations] == [each.lower() for each in usual]
    full = lengths is None or bool((lengths == steps).all())
    return same and full and not said.get("clip") and not said.get("input_forget", 0)


def _recurrent(
    said: Said,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> tuple[Any, ...] | None:
    """Return Y (steps, directions, N, H), the last h and the last c (directions, N, H); with ``layout``, N first."""
    batch_first = bool(said.get("layout", 0))
    x = x.transpose(0, 1) if batch_first else x
    if batch_first:
        h0, c0 = (None if each is None else each.transpose(0, 1) for each in (h0, c0))
    directions, size = len(w), r.shape[-1]
    if not _knows(said, lengths, len(x), directions):
        return None
    products = _products(said, x, w, b)
    outputs, lasts = [], []
    for at in range(directions):
        layer = _Layer(
            r[at],
            None if b is None else b[at, _GATES[said.op_type] * size :],
            None if peepholes is None else peepholes[at],
            not said.get("linear_before_reset", 0),
        )
        zero = x.new_zeros(x.shape[1], size)
        h = zero if h0 is None else h0[at]
        c = (zero if c0 is None else c0[at]) if said.op_type == "LSTM" else None
        backwards = said.get("direction", "forward") == "reverse" or at == 1
        y, last = _loop(_STEPS[said.op_type], layer, products[at], (h, c), backwards=backwards)
        outputs.append(y)
        lasts.append(last)
    y = torch.stack(outputs, 1)
    found = [
        y,
        *(torch.stack([t for t in parts if t is not None]) for parts in zip(*lasts, strict=True) if _any(parts)),
    ]
    if batch_first:
        found = [y.permute(2, 0, 1, 3), *(each.transpose(0, 1) for each in found[1:])]
    return tuple(found)


def _any(parts: Sequence[Tensor | None]) -> bool:
    return any(part is not None for part in parts)


def _products(said: Said, x: Tensor, w: Tensor, b: Tensor | None) -> list[Tensor]:
    """Return X W^T plus the bias of the inputs, (steps, N, gates * H), for each direction."""
    # (steps, N, I) @ (I, directions * gates * H)
    product = x @ w.flatten(0, 1).mT
    if said.get("layout", 0):
        product = product.transpose(0, 1)  # whoever sees it knows the input as (N, steps, features)
    product = said.product(product)
    if said.get("layout", 0):
        product = product.transpose(0, 1)
    parts = list(product.chunk(len(w), -1))
    if b is None:
        return parts
    return [part + bias[: w.shape[1]] for part, bias in zip(parts, b, strict=True)]


def _loop(
    step: Callable[[_Layer, Tensor, _State], _State], layer: _Layer, x: Tensor, state: _State, *, backwards: bool
) -> tuple[Tensor, _State]:
    outputs = []
    rows = list(x.unbind(0))
    for row in reversed(rows) if backwards else rows:
        state = step(layer, row, state)
        outputs.append(state[0])
    return torch.stack(outputs[::-1] if backwards else outputs), state


RECURRENT: dict[str, Op] = {"GRU": _recurrent, "LSTM": _recurrent, "RNN": _recurrent}
