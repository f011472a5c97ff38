"""Least squares by conjugate gradients (CGLS; Bjorck 1996, section 7.4), ended before rounding takes over.

The result is the shortest of all x that minimise ``||b - A x||``. The steps start from zero and stay in the range of
``A^T``, so x only grows towards the shortest solution. Each step goes along a direction p:

    x <- x + t p,  r <- r - t A p,  t = ||A^T r||^2 / ||A p||^2        then p <- A^T r + (its growth) p

In exact arithmetic this ends. In floating point ``A^T r`` stops falling at about ``eps ||A|| (||b|| + ||A|| ||x||)``,
and the rest of it is noise. If A hardly moves p (``||A p||`` near 0), a step along p turns this noise into an x without
bounds. So the steps end at the first of three events (Paige and Saunders 1982, section 6, has the same three)

    ``||A^T r||`` is as small as the precision of the target, or as rounding allows
    A shrinks p by more than ``_DEGENERATE``, relative to the direction that A has stretched most: what is missing along
        p hardly shows in ``A x``, and would make x long
    ``||A^T r||`` has not fallen for ``_PATIENCE`` steps

The x with the least ``||A^T r||`` is the candidate, and ``A x`` is computed once more to check it. If it is not finite,
or not nearer to b than zero is, the first step (steepest descent) takes its place; if that fails too, zero does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Map", "least_squares"]

Map = Callable[[Sequence[Tensor]], list[Tensor]]

_EPS = torch.finfo(torch.float64).eps
_STEPS = 300
_PATIENCE = 50
_REACHED = 4 * _EPS  # relative to ||A|| (||b|| + ||A|| ||x||): a smaller gradient is rounding noise
_DEGENERATE = 1e-5


def least_squares(apply: Map, adjoint: Map, target: Sequence[Tensor]) -> list[Tensor]:
    """Return the shortest x for which ``apply(x)`` is nearest to the target, in float64.

    ``apply`` and ``adjoint`` must be linear, and each the transpose of the other. The result is finite, and ``apply``
    of it is never farther from the target than zero is. It is zero if the target is not finite.

    >>> half = lambda row: [0.5 * part for part in row]
    >>> least_squares(half, half, [torch.tensor([1.0, 2.0])])
    [tensor([2., 4.], dtype=torch.float64)]
    """
    # With the largest entry scaled to 1, no square of a norm overflows or vanishes.
    scale = max((float(part.abs().max()) for part in target if part.numel()), default=0.0)
    wide = [part.double() / (scale or 1.0) for part in target]
    zero = [torch.zeros_like(part) for part in adjoint(wide)]
    if not 0 < scale < float("inf"):
        return zero
    first, best = _extremes(apply, adjoint, wide, torch.finfo(target[0].dtype).eps) or (zero, zero)
    for found in (best, first):
        if _is_nearer(apply, found, wide):
            return [scale * part for part in found]
    return zero


@dataclass(frozen=True, eq=False)
class _Iterate:
    """A point x of the descent, with the squares of ``||A^T r||`` (energy) and of the rounding noise in it."""

    x: list[Tensor]
    energy: Tensor
    noise: Tensor


def _extremes(
    apply: Map, adjoint: Map, target: Sequence[Tensor], known: float
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return the x after the first step, and the one with the least ``||A^T r||``; None if there is no step."""
    # ``best`` has the least energy so far, and ``waited`` counts the steps since it was found.
    first, best, waited = None, None, 0
    start = _squares(adjoint(target))
    for iterate in _descend(apply, adjoint, target):
        first = first or iterate
        waited = waited + 1 if best is not None and not bool(iterate.energy < best.energy) else 0
        best = best if waited else iterate
        if waited >= _PATIENCE or not bool(iterate.energy > torch.maximum(known**2 * start, iterate.noise)):
            break
    return None if first is None or best is None else (first.x, best.x)


def _descend(apply: Map, adjoint: Map, target: Sequence[Tensor]) -> Iterator[_Iterate]:
    """Yield the steps of CGLS from zero, until the next would go along a direction that A hardly moves."""
    # At the head of each step  rest = b - A x  and  gradient = A^T rest;  ``energy`` is the square of the gradient.
    rest = list(target)
    gradient = adjoint(rest)
    x = [torch.zeros_like(part) for part in gradient]
    direction, energy, size = gradient, _squares(gradient), _squares(rest)
    stretch = torch.zeros_like(energy)  # largest ||A p||^2 / ||p||^2 so far, a lower bound of ||A||^2
    for _ in range(_STEPS):
        image = apply(direction)
        length, moved = _squares(direction), _squares(image)
        stretch = torch.maximum(stretch, moved / length)
        if not bool(moved > _DEGENERATE**2 * stretch * length):
            return
        step = energy / moved
        x = [part + step * d for part, d in zip(x, direction, strict=True)]
        rest = [part - step * i for part, i in zip(rest, image, strict=True)]
        gradient = adjoint(rest)
        before, energy = energy, _squares(gradient)
        # noise: the square of eps ||A|| (||b|| + ||A|| ||x||), with ``stretch`` for ||A||^2
        yield _Iterate(x, energy, _REACHED**2 * stretch * (size + stretch * _squares(x)))
        direction = [g + energy / before * d for g, d in zip(gradient, direction, strict=True)]


def _is_nearer(apply: Map, x: Sequence[Tensor], target: Sequence[Tensor]) -> bool:
    """Whether x is finite and, up to rounding, ``apply(x)`` is as near to the target as zero is."""
    missing = _squares([b - a for b, a in zip(target, apply(x), strict=True)])
    return bool(_squares(x).isfinite()) and bool(missing <= (1 + 16 * _EPS) * _squares(target))


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()
