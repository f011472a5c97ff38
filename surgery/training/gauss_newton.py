"""Move factors so that they compose to a wanted weight, by Gauss-Newton steps that are checked before they are taken.

Let J be the Jacobian of the composition W(F) at the present factors F. The full step is the shortest D for which J D is
nearest to the difference between the wanted weight and W(F). W is linear along D only near F, so the full step may end
farther away than F. Of the shares 1, 1/2, ..., 1/64 of D, the one that comes nearest is taken, or none if F is nearer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.training.transport import Compose, Jacobian

__all__ = ["fit_factors"]

_STEPS = 3
_SHARES = tuple(0.5**k for k in range(7))
_WORTH = 0.9  # ours: share of the distance; after a step that leaves more than this, another one is not worth its time


def fit_factors(compose: Compose, factors: Sequence[Tensor], goal: Tensor) -> list[Tensor]:
    """Return float64 factors near the given ones whose composition is at least as near to the weight ``goal``.

    >>> product = lambda pair: pair[0] @ pair[1]
    >>> near = fit_factors(product, [torch.eye(2), torch.eye(2)], torch.tensor([[1.1, 0.0], [0.0, 0.9]]))
    >>> [round(float(value), 6) for value in product(near).diagonal()]
    [1.1, 0.9]
    """
    found, wanted = [factor.detach().double() for factor in factors], goal.detach().double()
    distance = _distance(compose, found, wanted)
    for _ in range(_STEPS):
        jacobian = Jacobian(compose, found)
        step = jacobian.push_back(wanted - jacobian.weight)
        rows = [[factor + share * part for factor, part in zip(found, step, strict=True)] for share in _SHARES]
        distances = [_distance(compose, row, wanted) for row in rows]
        before, nearest = distance, min(distances)  # of equal distances the largest share is taken, as it comes first
        if not nearest < before:
            break
        found, distance = rows[distances.index(nearest)], nearest
        if nearest > _WORTH * before:
            break
    return found


def _distance(compose: Compose, factors: Sequence[Tensor], goal: Tensor) -> float:
    """Return ``||W(F) - goal||``; infinite if it is not a number."""
    with torch.no_grad():
        distance = float(torch.linalg.vector_norm(compose(factors) - goal))
    return math.inf if math.isnan(distance) else distance
