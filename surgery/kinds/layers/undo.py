"""Numbers for the parameters of a layer from which its forward computes a given weight, as nearly as simple ones give.

The forward is a function f from parameters to the weight of the layer's operator. For a weight W that is wanted,
candidates for the parameter V with the weight's numbers, and for gains g (one for all, or one for each channel), are

    V = W                            f computes what it is given again: a norm, a standardisation
    V = W c                          the same, where f divides by |V| + e for a small e, with c for each channel
    V = (W - f(0)) / (f(1) - f(0))   f is a scale, a mask or a shift of each number
    V = W, g = <W, f(V, 1)> / <f(V, 1), f(V, 1)>     the best gain of each channel, after a norm

and what torch's parametrizations give themselves (``right_inverse``). Each is put into the forward; the nearest stays.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.algebra.chain import relative_error
from surgery.algebra.operators import Operator
from surgery.errors import Refusal
from surgery.kinds.layers.layer_call import follow, operator_of, trials

__all__ = ["computed", "fit", "tolerance"]

_FAR = 2.0**10
Numbers = dict[str, Tensor]


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that rounding in this dtype makes, with some room for sums."""
    return min(64 * torch.finfo(dtype).eps, 0.05)


def fit(
    layer: nn.Module, weight: tuple[str, Tensor], bias: tuple[str, Tensor] | None, gains: Collection[str]
) -> tuple[Numbers, float]:
    """Return numbers for a layer's parameters, by name, and the relative error of its operator's weight with them.

    ``weight`` and ``bias`` are the parameters that these are computed from, and what is to come out; the error is the
    larger one of the two.
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
    """Return the weight (or the bias) that the layer's operator gets of these parameters; None if it has no such."""
    found = follow(layer, trials(layer)[0], numbers)
    operator = found if isinstance(found, Refusal) else operator_of(found[0], pads=False)
    value: Tensor | None = getattr(operator, of) if isinstance(operator, Operator) else None
    return value if value is not None and bool(value.isfinite().all()) else None


def _candidates(layer: nn.Module, name: str, target: Tensor, gains: Collection[str]) -> Iterator[Numbers]:
    own: Any = dict(layer.named_parameters(remove_duplicate=False))
    raw = own[name]
    ones = {gain: torch.ones_like(own[gain]) for gain in gains}
    yield from _inverses(layer, name, target)
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
    """Return a weight in the form of the parameter that it is computed from: as it is, or turned."""
    for form in (target, target.mT) if target.dim() == 2 else (target,):
        if form.shape == raw.shape:
            yield form.detach().clone(memory_format=torch.contiguous_format)
    if raw.shape not in (target.shape, target.mT.shape):
        yield target.detach().reshape(raw.shape).clone()


def _scaled(layer: nn.Module, name: str, form: Tensor, target: Tensor) -> Iterator[Tensor]:
    """Return a weight with a factor c for each channel, where a norm adds a small number to what it divides by.

    With r(c) the length of what is computed over that of the target, (1 / r)^p = a + b / c^p, with p = 1 where it is
    added to the norm, and p = 2 where it is to its square; r = 1 is wanted.
    """
    near, far = (_lengths(layer, {name: form / by}, target) for by in (1.0, _FAR))
    if near is None or far is None or form.shape != target.shape:
        return
    for power in (1, 2):
        slope = (far**power - near**power) / (_FAR**power - 1)
        factor = (slope / (1 - near**power + slope)) ** (1 / power)
        if bool((factor.isfinite() & (factor > 0)).all()):
            yield form * factor.to(form.dtype).reshape(-1, *(1,) * (form.dim() - 1))


def _lengths(layer: nn.Module, numbers: Mapping[str, Tensor], target: Tensor) -> Tensor | None:
    """Return 1 / r of each channel."""
    made = computed(layer, numbers)
    if made is None or made.shape != target.shape:
        return None
    wanted, found = target.double().flatten(1), made.double().flatten(1)
    return (wanted * wanted).sum(1) / (wanted * found).sum(1)


def _inverses(layer: nn.Module, name: str, target: Tensor) -> Iterator[Numbers]:
    """Return what torch's parametrizations compute their parameters from, for a weight."""
    if not name.startswith("parametrizations."):
        return
    path = name.rpartition(".")[0]
    value: Any = target.detach().clone()
    with torch.no_grad():
        for step in reversed(list(layer.get_submodule(path).children())):
            inverse: Any = getattr(step, "right_inverse", None)
            if inverse is not None:
                value = inverse(value)
    values = {"original": value} if isinstance(value, Tensor) else {f"original{i}": v for i, v in enumerate(value)}
    yield {f"{path}.{leaf}": number for leaf, number in values.items()}


def _gains(gain: Tensor, made: Tensor, target: Tensor) -> Iterator[Tensor]:
    """Return the gains that bring what is computed with gains of one nearest to a target, for each axis they may be."""
    product, square = (made * target).double(), (made * made).double()
    axes = [a for a, size in enumerate(target.shape) if size == gain.numel()] if gain.numel() > 1 else [-1]
    for axis in axes:
        others = [other for other in range(target.dim()) if other != axis]
        above, below = (product.sum(others), square.sum(others)) if axis >= 0 else (product.sum(), square.sum())
        ratio = torch.where(below > 0, above / below, torch.ones_like(below))
        yield ratio.reshape(gain.shape).to(gain.dtype)


def _affine(
    layer: nn.Module, name: str, target: Tensor, others: Mapping[str, Tensor], of: str
) -> tuple[Numbers, float]:
    """Return the parameter that a scale, a mask and a shift of each number make the target of, and the error."""
    own: Any = dict(layer.named_parameters(remove_duplicate=False))
    zero, one = (computed(layer, {**others, name: make(own[name])}, of) for make in (torch.zeros_like, torch.ones_like))
    forms = list(_forms(target, own[name])) if of == "weight" else [target.detach().clone()]
    best = ({name: forms[0]}, math.inf)
    for turned in (False, True)[: len(forms)]:
        if zero is None or one is None:
            break
        slope = one - zero
        value = torch.where(slope != 0, (target - zero) / slope, target)
        found = {name: (value.mT if turned else value).reshape(own[name].shape).contiguous()}
        made = computed(layer, {**others, **found}, of)
        error = math.inf if made is None else relative_error(made, target)
        best = (found, error) if error < best[1] else best
    return best
