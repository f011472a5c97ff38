"""Operators without numbers: of the form of another, with a weight of zeros that takes no memory."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from surgery.algebra.operators import Operator

__all__ = ["without_numbers"]


def without_numbers(operator: Operator, like: Tensor) -> Operator:
    """Return the operator without its bias, with a weight of zeros of the dtype and on the device of a tensor.

    >>> from surgery.algebra.operators import Linear
    >>> blank = without_numbers(Linear(torch.ones(3, 4)), like=torch.ones(1))
    >>> tuple(blank.weight.shape), blank.weight.untyped_storage().size()
    ((3, 4), 4)
    """
    weight = torch.zeros((), dtype=like.dtype, device=like.device).expand(operator.weight.shape)
    return replace(operator, weight=weight, bias=None)
