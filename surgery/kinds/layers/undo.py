"""Find numbers for the parameters of a layer such that its forward computes a given weight, as nearly as possible.

The forward is a function f from parameters to the weight of the layer's operator. For a wanted weight W, there are a
few candidates for the parameter V, which is as large as the weight, and for gains g (one in all, or one for each
channel):

    V = W                            f leaves its own outputs as they are: a norm, a standardisation
    V = W c                          the same, where f divides by |V| + e for a small e, with c for each channel
    V = (W - f(0)) / (f(1) - f(0))   f is a scale, a mask or a shift of each number
    V = W, g = <W, f(V, 1)> / <f(V, 1), f(V, 1)>     the best gain of each channel, after a norm

and the numbers that torch's parametrizations themselves give (``right_inverse``). The forward is run with each
candidate, and the candidate that gives the nearest weight is taken.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.algebra import Operator, relative_error
from surgery.errors import Refusal
from surgery.kinds.layers.layer_call import follow, operator_of, trials

__all__ = ["computed", "fit", "tolerance"]

_FAR = 2.0**10  # how much smaller the weight is in the second of two trials for a small number in a norm
Numbers = dict[str, Tensor]


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that rounding in a dtype may cause, with some room for sums."""
    return min(64 * torch.finfo(dtype).eps, 0.05)


def fit(
    layer: nn.Module, weight: tuple[str, Tensor], bias: tuple[str, Tensor] | None, gains: Collection[str]
) -> tuple[Numbers, float]:
    """Return numbers for a layer's parameters, by name, and the relative error of what the layer computes from them.

    ``weight`` and ``bias`` are pairs: the name of the parameter that the weight or bias is computed from, and the
    tensor that is wanted. The error is the larger of the errors of weight and bias.
    """
    numbers, error = _nearest(layer, weight, gains)
    if bias is not None:
        name, target = bias
        own, off = _affine(layer, name, target, numbers, of="bias")
        numbers, error = numbers | own, max(error, off)
    return numbers, error


def _nearest(layer: nn.Module, weight: tuple[str, Tensor], gains: Collection[str]) -> tuple[Numbers, float]:
    name, target = weight
    best: tuple[Numbers, float] | None = None
    for numbers in _candidates(layer, name, target, gains):
        made = computed(layer, numbers)
        error = math.inf if made is None or made.shape != target.shape else relative_error(made, target)
        if best is None or error < best[1]:
            best = (numbers, error)
        if error <= tolerance(target.dtype) / 8:
            break
    assert best is not None  # there is always a candidate
    return best


def computed(layer: nn.Module, numbers: Mapping[str, Tensor], of: str = "weight") -> Tensor | None:
    """Return the weight or the bias (``of``) that the layer's operator gets from these parameters.

    It is None if the operator has none, or if it is not finite.
    """
    found = follow(layer, trials(layer)[0], numbers)
    operator = found if isinstance(found, Refusal) else operator_of(found[0], pads=False)
    value: Tensor | None = getattr(operator, of) if isinstance(operator, Operator) else None
    return value if value is not None and bool(value.isfinite().all()) else None


def _candidates(layer: nn.Module, name: str, target: Tensor, gains: Collection[str]) -> Iterator[Numbers]:
    own: Any = dict(layer.named_parameters(remove_duplicate=False))
    raw = own[name]
    ones = {gain: torch.ones_like(own[gain]) for gain in gains}
    yield from _inverses(layer, name, target)
    # cheap and exact candidates come first; the search stops at the first one within rounding
    for form in _forms(target, raw):
        yield {name: form} | ones
        yield from ({name: scaled} for scaled in (() if gains else _scaled(layer, name, form, target)))
        for gain in gains:
            base = {name: form} | ones
            made = computed(layer, base)
            if made is not None and made.shape == target.shape:
                yield from (base | {gain: fitted} for fitted in _gains(own[gain], made, target))
        yield ones | _affine(layer, name, target, ones, of="weight")[0]


def _forms(target: Tensor, raw: Tensor) -> Iterator[Tensor]:
    """Yield a weight in the form of the parameter that it is computed from: as it is, transposed, or reshaped."""
    for form in (target, target.mT) if target.dim() == 2 else (target,):
        if form.shape == raw.shape:
            yield form.detach().clone(memory_format=torch.contiguous_format)
    if raw.shape not in (target.shape, target.mT.shape):
        yield target.detach().reshape(raw.shape).clone()


def _scaled(layer: nn.Module, name: str, form: Tensor, target: Tensor) -> Iterator[Tensor]:
    """Yield the weight with a factor c for each channel, for layers that divide by a norm plus a small number e.

    Let r(c) be the length of the computed weight over the length of the target. Then (1 / r)^p = a + b / c^p, with p =
    1 if e is added to the norm, and p = 2 if e is added to its square. Two trials, c = 1 and c = 1 / _FAR, give a and
    b; r = 1 is wanted.
    """
    near, far = (_lengths(layer, {name: form / by}, target) for by in (1.0, _FAR))
    if near is None or far is None or form.shape != target.shape:
        return
    for power in (1, 2):
        # y(c) = (1 / r)^p = a + b / c^p gives b = (y(1 / F) - y(1)) / (F^p - 1) and a = y(1) - b;
        # y = 1 at c^p = b / (1 - a)
        slope = (far**power - near**power) / (_FAR**power - 1)
        factor = (slope / (1 - near**power + slope)) ** (1 / power)
        if bool((factor.isfinite() & (factor > 0)).all()):
            yield form * factor.to(form.dtype).reshape(-1, *(1,) * (form.dim() - 1))


def _lengths(layer: nn.Module, numbers: Mapping[str, Tensor], target: Tensor) -> Tensor | None:
    """Return 1 / r for each channel (see ``_scaled``); None if the layer computes no weight of the target's shape."""
    made = computed(layer, numbers)
    if made is None or made.shape != target.shape:
        return None
    # both have one direction, so that lengths may be compared along the target: 1 / r = <t, t> / <t, f>
    wanted, found = target.double().flatten(1), made.double().flatten(1)
    return (wanted * wanted).sum(1) / (wanted * found).sum(1)


def _inverses(layer: nn.Module, name: str, target: Tensor) -> Iterator[Numbers]:
    """Yield the parameters that torch's parametrizations themselves give for a weight, by their right inverses."""
    if not name.startswith("parametrizations."):
        return
    path = name.rpartition(".")[0]
    value: Any = target.detach().clone()
    with torch.no_grad():
        # parametrizations run first to last, and are undone last to first
        for step in reversed(list(layer.get_submodule(path).children())):
            inverse: Any = getattr(step, "right_inverse", None)
            if inverse is not None:
                value = inverse(value)
    values = {"original": value} if isinstance(value, Tensor) else {f"original{i}": v for i, v in enumerate(value)}
    yield {f"{path}.{leaf}": number for leaf, number in values.items()}


def _gains(gain: Tensor, made: Tensor, target: Tensor) -> Iterator[Tensor]:
    """Yield the best gains for a target, for each axis that they fit; ``made`` is computed with gains of one."""
    # g f nearest to t has g = <t, f> / <f, f>. Example of a channel: f = (1, 2) and t = (3, 6) give 15 / 5 = 3.
    product, square = (made * target).double(), (made * made).double()
    # the gain's size tells its axis, unless two axes have this size: then both are tried
    axes = [a for a, size in enumerate(target.shape) if size == gain.numel()] if gain.numel() > 1 else [-1]
    for axis in axes:
        others = [other for other in range(target.dim()) if other != axis]
        above, below = (product.sum(others), square.sum(others)) if axis >= 0 else (product.sum(), square.sum())
        ratio = torch.where(below > 0, above / below, torch.ones_like(below))
        yield ratio.reshape(gain.shape).to(gain.dtype)


def _affine(
    layer: nn.Module, name: str, target: Tensor, others: Mapping[str, Tensor], of: str
) -> tuple[Numbers, float]:
    """Return the parameter that gives the target if f only scales, masks and shifts, and the relative error."""
    own: Any = dict(layer.named_parameters(remove_duplicate=False))
    zero, one = (computed(layer, {**others, name: make(own[name])}, of) for make in (torch.zeros_like, torch.ones_like))
    forms = list(_forms(target, own[name])) if of == "weight" else [target.detach().clone()]
    best = ({name: forms[0]}, math.inf)
    for turned in (False, True)[: len(forms)]:
        if zero is None or one is None:
            break
        # a mask has slope 0 where it hides: there the value does not matter
        slope = one - zero
        value = torch.where(slope != 0, (target - zero) / slope, target)
        found = {name: (value.mT if turned else value).reshape(own[name].shape).contiguous()}
        made = computed(layer, {**others, **found}, of)
        error = math.inf if made is None else relative_error(made, target)
        best = (found, error) if error < best[1] else best
    return best
