"""Data-aware factors: the chain of an operator whose *output* on the calibration data is nearest to the operator's.

Minimises tr(G (W - W') C (W - W')^T) over the chains of given ranks. C is the second moment of the inputs with a ridge.
G is the sensitivity of the model's output where it was collected, so that errors go where they matter least, else the
identity; it counts in chains whose last operator alone writes the output channels.

Where the operator has a bias, that takes up the mean, b' = b + (W - W') m, so that the mean of the output over all
positions stays as it was, and C is the covariance. (Where a convolution pads, the mean of a patch near the border
differs from that inside; m is the mean over all of them.) What has no bias gets none; where a normalisation follows
that is re-estimated, it takes up the mean in its place, and ``centred=True`` says so.

How the factors are found: ``surgery.data.search``. The result is never worse on the data, by this measure, than
the plain chain, which is taken where it is as good; at full ranks it is the plain chain.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.data.moments import Moments
from surgery.data.search import Problem, composed, search
from surgery.errors import Refusal
from surgery.factorizations import Factorization, Ranks

__all__ = ["RIDGE", "correct_bias", "fit", "output_error", "squared_error"]

RIDGE = 1e-3


def fit(
    method: Factorization,
    operator: Operator,
    ranks: Ranks,
    moments: Moments,
    *,
    solver: str = "auto",
    ridge: float = RIDGE,
    centred: bool | None = None,
) -> Chain | Refusal:
    """Return the chain at these ranks for the data of the moments, its bias corrected if the operator has one.

    ``centred`` leaves the mean of the error out of account; by default where the operator has a bias to take it up.
    ``solver`` is that of the starts, and ``ridge`` what is added to the diagonals of C and G, relative to their means.
    Refuses as ``method.factor``.

    Raises:
        InputError, RankError: as ``method.factor``.
    """
    plain = method.factor(operator, ranks, solver=solver)
    if ranks == method.max_ranks(operator):
        return plain
    centred = operator.bias is not None if centred is None else centred
    metric = moments.centred if centred else moments.metric
    fitted = search(Problem(method, operator, ranks, metric, moments.sensitivity, solver, ridge), plain)
    chains = [chain for chain in (plain, fitted) if isinstance(chain, Chain)]
    if operator.bias is not None:
        chains = [correct_bias(chain, operator, moments) for chain in chains]

    if len(chains) < 2:
        return chains[0] if chains else plain
    narrow = moments if operator.weight.dtype == torch.float64 else moments.narrow()
    return min(chains, key=lambda chain: squared_error(chain, operator, narrow, centred=bool(centred)))


def squared_error(chain: Chain, operator: Operator, moments: Moments, *, centred: bool) -> float:
    """Return ``tr(G D Cov D^T) + e^T G e`` for e = D m + b - b', without the second term if ``centred``."""
    difference = _difference(chain, operator, moments.mean.dtype)
    energy = float(moments.centred_energy(difference, moments.sensitivity))
    if centred:
        return energy
    shift = _mean_error(difference, chain, operator, moments)
    other = shift if moments.sensitivity is None else moments.sensitivity @ shift
    return energy + float((shift * other).sum())


def output_error(chain: Chain, operator: Operator, moments: Moments, *, weighed: bool = False) -> float:
    """Return the relative error of a chain's output, over that of the operator without its bias.

    ``sqrt((tr(D Cov D^T) + |D m + b - b'|^2) / tr(W C W^T))`` for D = W - W'; 0 where the operator has no output. If
    ``weighed``, with the sensitivity on the left of D and W, where the moments have one.
    """
    moments = moments if weighed else replace(moments, sensitivity=None)
    scale = float(moments.metric.energy(operator.kernel.detach().double().flatten(2), moments.sensitivity))
    if not scale > 0:
        return 0.0
    difference = _difference(chain, operator)
    if operator.bias is None and chain.bias is None:
        return math.sqrt(float(moments.metric.energy(difference, moments.sensitivity)) / scale)
    return math.sqrt(squared_error(chain, operator, moments, centred=False) / scale)


def _mean_error(difference: Tensor, chain: Chain, operator: Operator, moments: Moments) -> Tensor:
    """Return D m + b - b' as (groups, O, 1)."""
    shift = _mean_shift(difference, moments)
    for sign, bias in ((1, operator.bias), (-1, chain.bias)):
        shift = shift if bias is None else shift + sign * bias.detach().to(shift.dtype).view_as(shift)
    return shift


def correct_bias(chain: Chain, operator: Operator, moments: Moments) -> Chain:
    """Return the chain with the bias at which the mean of its output is the operator's: ``b + (W - W') m``."""
    shift = _mean_shift(_difference(chain, operator), moments)
    bias = shift.flatten() if operator.bias is None else shift.flatten() + operator.bias.detach().double()
    return chain.with_bias(bias.to(operator.weight.dtype))


def _mean_shift(difference: Tensor, moments: Moments) -> Tensor:
    """Return D m as (groups, O, 1)."""
    return difference @ moments.mean.unsqueeze(-1)


def _difference(chain: Chain, operator: Operator, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return W - W' as (groups, O, n)."""
    return (operator.kernel.detach().to(dtype) - composed(chain, dtype)).flatten(2)
