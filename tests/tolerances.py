"""How far two ways to compute one thing may differ, as a relative Frobenius error derived from the dtype.

A result that is rounded once is off by at most u = eps / 2 of itself. Rounding errors of different entries are
independent, so a dot product over n terms that is accumulated in its own dtype is off by about u sqrt(n) of the root
of its sum of squares, and p rounded steps one after the other by sqrt(p) times as much. Half precisions are accumulated
in float32 by torch and only their weights, activations and results are rounded, so they do not grow with n.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from surgery.algebra import Operator, relative_error

# Over the estimate above. The solvers work in float64, or in TensorLy's case in the kernel's dtype from float32 on, and
# an eigendecomposition is off by several u of its own; half precisions only see the result, but what a sum of
# components rounds grows as they cancel. The worst of the case table uses 0.8 of each.
_MARGIN = {torch.float64: 4, torch.float32: 2, torch.float16: 1.5, torch.bfloat16: 1.5}
_HALF = (torch.float16, torch.bfloat16)


def tolerance(dtype: torch.dtype, *, length: int = 1, steps: int = 1) -> float:
    """Return the relative error allowed after ``steps`` roundings of sums over ``length`` terms."""
    growth = 1 if dtype in _HALF else length
    return _MARGIN[dtype] * torch.finfo(dtype).eps / 2 * math.sqrt(growth * steps)


def reduction(operator: Operator) -> int:
    """Return how many products an output of the operator sums."""
    return max(1, operator.kernel[0, 0].numel())


def assert_close(actual: Tensor, expected: Tensor, allowed: float) -> None:
    """Assert equal shapes and dtypes, and a relative Frobenius error of at most ``allowed``."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    error = relative_error(actual.detach(), expected.detach())
    assert error <= allowed, f"relative error {error:.3g}, allowed {allowed:.3g}"
