"""Least squares by conjugate gradients (CGLS; Bjorck 1996, section 7.4), ended before rounding takes over.

Of all x with the least ``||b - A x||`` the shortest is wanted. From zero the steps stay in the range of ``A^T``, and x
only grows towards it. Each step goes along a direction p:

    x <- x + t p,  r <- r - t A p,  t = ||A^T r||^2 / ||A p||^2        then p <- A^T r + (its growth) p

In exact numbers this ends; in floating point ``A^T r`` stops falling at about ``eps ||A|| (||b|| + ||A|| ||x||)``.
What is then left is noise. A step along a p that A hardly moves, ``||A p||`` near 0, turns it into an x without bounds.
So the steps end (Paige and Saunders 1982, section 6, has the same three reasons)

    where ``||A^T r||`` is as small as the target is known, or as rounding lets it be
    where A shortens p by more than ``_DEGENERATE`` beside the most that it stretches any: what is missing there hardly
        shows in ``A x``, and would make x long
    where ``||A^T r||`` has not fallen for ``_PATIENCE`` steps

The x with the least ``||A^T r||`` is kept, and ``A x`` is formed once more: what is not finite, or no nearer than zero,
gives way to the first step, the steepest descent; and that, if need be, to zero.
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
_REACHED = 4 * _EPS
_DEGENERATE = 1e-5


def least_squares(apply: Map, adjoint: Map, target: Sequence[Tensor]) -> list[Tensor]:
    """Return the shortest x for which ``apply(x)`` is nearest to the target, in float64.

    ``apply`` and ``adjoint`` are linear, and each the transpose of the other. What comes back is finite, and no farther
    from the target than zero is; it is zero where the target is not finite.

    >>> half = lambda row: [0.5 * part for part in row]
    >>> least_squares(half, half, [torch.tensor([1.0, 2.0])])
    [tensor([2., 4.], dtype=torch.float64)]
    """
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
    """A point x of the descent, with the squares of ``||A^T r||`` and of the noise that rounding puts into it."""

    x: list[Tensor]
    energy: Tensor
    noise: Tensor


def _extremes(
    apply: Map, adjoint: Map, target: Sequence[Tensor], known: float
) -> tuple[list[Tensor], list[Tensor]] | None:
    """Return the x after the first step, and the one with the least ``||A^T r||``; None where there is no step."""
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
    """Yield the steps of CGLS from zero, until one would go along a direction that nothing depends on."""
    rest = list(target)
    gradient = adjoint(rest)
    x = [torch.zeros_like(part) for part in gradient]
    direction, energy, size = gradient, _squares(gradient), _squares(rest)
    stretch = torch.zeros_like(energy)  # the most so far of ||A p||^2 / ||p||^2, from below that of A
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
        yield _Iterate(x, energy, _REACHED**2 * stretch * (size + stretch * _squares(x)))
        direction = [g + energy / before * d for g, d in zip(gradient, direction, strict=True)]


def _is_nearer(apply: Map, x: Sequence[Tensor], target: Sequence[Tensor]) -> bool:
    """Whether ``apply(x)`` is finite and, up to rounding, as near to the target as zero is."""
    missing = _squares([b - a for b, a in zip(target, apply(x), strict=True)])
    return bool(_squares(x).isfinite()) and bool(missing <= (1 + 16 * _EPS) * _squares(target))


def _squares(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()
