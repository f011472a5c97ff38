"""Scales at which squares of entries neither overflow nor vanish, whatever the unit of a weight."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["normalised"]

_SAFE = 2.0**-40, 2.0**40  # largest entries for which sums of squares are far from the ends of float32


def normalised(tensor: Tensor, *, groups: int = 0) -> tuple[Tensor, Tensor]:
    """Return the tensor over its largest magnitude, and that magnitude; or the tensor itself, not a copy, and 1.

    The second is returned if the squares are within range as they are. The first ``groups`` axes have their own scales:
    the magnitude has one entry for each group, and extent 1 elsewhere.
    """
    axes = tuple(range(groups, tensor.dim()))
    low, high = tensor.amin(axes, keepdim=True), tensor.amax(axes, keepdim=True)
    peak = torch.maximum(-low, high)
    if all(value == 0 or _SAFE[0] < value < _SAFE[1] for value in peak.flatten().tolist()):
        return tensor, torch.ones_like(peak)
    peak.clamp_(min=torch.finfo(tensor.dtype).tiny)
    return tensor / peak, peak
