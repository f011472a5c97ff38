"""CP of a batch of tensors by alternating least squares on a dimension tree.

    T (g, n_1, ..., n_N)  ~  sum_r  a_1r o ... o a_Nr        factors (g, n_i, r)

The factors are found by sweeps over them (``cp_model``), exact or by pairwise perturbation (``pairwise``), or by
gradient descent on more components (``overparameterized``).

There are several starts: the leading left singular vectors of the unfoldings (HOSVD, by two steps of orthogonal
iteration), and random factors. The best of them after a few sweeps goes on. The largest mode is updated first, so that
it needs no start. Gram matrices of factors are r x r, and nothing is larger than the tensor except its contraction with
one factor. The result may be a local optimum, and a best approximation need not exist; a result whose components grow
and cancel says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from surgery.errors import InputError
from surgery.solvers.cp_model import CpModel
from surgery.solvers.dimension_tree import Array
from surgery.solvers.gram import normalised
from surgery.solvers.pairwise import pairwise_sweeps
from surgery.solvers.threads import one_pool

__all__ = ["CpResult", "als_sweeps", "cp", "start"]

_METHODS = ("als", "pp", "gd")
_TRIAL_SWEEPS = 5
_ITERATIONS = 2  # of a start; sweeps on kernels end as low after these as from the exact vectors
_PENALTY = 0.1  # share of the residual from which on the ridge limits the fit
_SMALL = 2**24  # multiplications of a GEMM below which a second thread costs more than it does
_TINY = float(np.finfo(np.float64).tiny)
_FLOAT32_RESIDUAL = 1e-3  # share of the energy below which float32 products say too little about it


@dataclass(frozen=True, eq=False)
class CpResult:
    """Factors (g, n_i, rank), whose scales are balanced, and how well they fit: relative Frobenius error of the batch.

    ``degenerate`` says that components are large and cancel in spite of the ridge, and ``reason`` says so in words.
    """

    factors: list[Tensor]
    error: float
    sweeps: int
    degenerate: bool
    reason: str


def cp(
    tensor: Tensor,
    rank: int,
    *,
    method: str = "als",
    sweeps: int = 200,
    tolerance: float = 1e-5,
    restarts: int = 2,
    seed: int = 0,
) -> CpResult:
    """Return a CP approximation of a batch of tensors (g, n_1, ..., n_N), N from 2 to 6, in float32 or float64.

    ``method`` is ``"als"``; ``"pp"``, the same with pairwise perturbation (Ma and Solomonik, arXiv 1811.10573); or
    ``"gd"``, an over-parameterised gradient method (orders 3 and 4; of the other options, only ``seed`` applies). There
    are at most ``sweeps`` sweeps, and fewer once one lowers the error by less than ``tolerance`` of itself.
    ``restarts`` random starts are tried besides the HOSVD.

    Raises:
        InputError: the method, order or rank is not possible, or the tensor is not finite.
    """
    # OpenBLAS may raise the flag of an invalid operation for lanes of a vector that no result comes from
    with one_pool(one_thread=tensor.numel() * rank < _SMALL), np.errstate(invalid="ignore"):
        _check(tensor, rank, method)
        return _cp(tensor, rank, method, sweeps=sweeps, tolerance=tolerance, restarts=restarts, seed=seed)


def _cp(tensor: Tensor, rank: int, method: str, *, sweeps: int, tolerance: float, restarts: int, seed: int) -> CpResult:
    order = _order(tensor.shape[1:])
    scaled, peak = normalised(tensor.detach().cpu().permute(0, *(mode + 1 for mode in order)).contiguous(), groups=1)
    if not bool(peak.isfinite().all()):
        raise InputError("a tensor with NaN or infinite entries", allowed="finite entries")
    scale = peak.flatten().double().numpy()
    if method == "gd":
        from surgery.solvers.overparameterized import gradient_cp

        model, done = CpModel(scaled.numpy(), [f.mT.numpy() for f in gradient_cp(scaled, rank, seed=seed)]), 0
    else:
        model = start(scaled, rank, restarts=restarts, seed=seed)
        model, done = _run(model, method, sweeps=sweeps, tolerance=tolerance)
    if not done:
        model.measure()
    reason = _reason(model)
    factors = [torch.from_numpy(factor).to(tensor) for factor in _balanced(model.factors, scale)]
    # ``order[i]`` is the mode at place i; its inverse puts the factors back in the order of the caller's modes.
    factors = [factors[order.index(mode)] for mode in range(len(order))]
    return CpResult(factors, _error(model, scale), done, bool(reason), reason)


def _run(model: CpModel, method: str, *, sweeps: int, tolerance: float) -> tuple[CpModel, int]:
    """Sweep until the error settles, in float64 once float32 cannot tell; return the number of sweeps, too."""
    run = pairwise_sweeps if method == "pp" else als_sweeps
    done = run(model, sweeps=sweeps, tolerance=tolerance)
    if model.tensor.dtype == np.float32 and model.residual.min() < _FLOAT32_RESIDUAL:
        ridge = model.ridge
        model = CpModel(model.tensor.astype(np.float64), [factor.astype(np.float64) for factor in model.factors])
        model.ridge = ridge
        model.measure()
        done += run(model, sweeps=sweeps - done, tolerance=tolerance)
    return model, done


def _order(sizes: Sequence[int]) -> list[int]:
    """Return the modes as they are updated: the largest, then by size, so that loops over the last are long."""
    # Example: of sizes (32, 3, 3, 64) the modes are updated in the order 3, 1, 2, 0.
    ascending = sorted(range(len(sizes)), key=lambda mode: sizes[mode])
    return [ascending[-1], *ascending[:-1]]


def _check(tensor: Tensor, rank: int, method: str) -> None:
    if method not in _METHODS:
        raise InputError(f"unknown method {method!r} of cp", allowed=", ".join(_METHODS))
    if not 3 <= tensor.dim() <= 7:
        raise InputError(f"a tensor of shape {tuple(tensor.shape)}", allowed="a batch axis and 2 to 6 modes")
    if rank < 1:
        raise InputError(f"rank {rank}", allowed="at least 1")


def als_sweeps(model: CpModel, *, sweeps: int, tolerance: float) -> int:
    """Sweep until the error settles; return the number of sweeps."""
    for done in range(1, sweeps + 1):
        before = model.objective
        fell = model.step(model.sweep)
        if model.settled(before, fell, tolerance):
            return done
    return sweeps


def start(tensor: Tensor, rank: int, *, restarts: int = 0, seed: int = 0) -> CpModel:
    """Return the HOSVD; with ``restarts``, the best of it and of random starts after a few sweeps, group by group.

    The squares of the tensor (g, n_1, ..., n_N) must be within the range of its dtype.
    """
    generator, array = torch.Generator().manual_seed(seed), tensor.numpy()
    modes = range(1, tensor.dim())
    first = _random(tensor, rank, tensor.shape[1], generator)
    leading = [_leading(tensor, mode, rank, generator) for mode in modes[1:]]
    models = [CpModel(array, [factor.numpy() for factor in (first, *leading)])]
    if not restarts:
        return models[0]
    for _ in range(restarts):
        drawn = [_random(tensor, rank, tensor.shape[mode], generator) for mode in modes]
        models.append(CpModel(array, [factor.numpy() for factor in drawn]))
    for model in models:
        for _ in range(_TRIAL_SWEEPS):
            model.step(model.sweep)
    # (starts, g): each group takes the start that is best for it, since groups share nothing but the sweeps
    best = np.stack([model.objective for model in models]).argmin(0)
    groups = np.arange(len(tensor))
    factors = zip(*(model.factors for model in models), strict=True)
    return CpModel(array, [np.stack(same_mode)[best, groups] for same_mode in factors])


def _leading(tensor: Tensor, mode: int, rank: int, generator: torch.Generator) -> Tensor:
    """Return (g, rank, n): nearly the leading left singular vectors of an unfolding, by orthogonal iteration.

    They are random if the rank is the size of the mode or more. On kernels, sweeps then end as low as from a basis; on
    planted orthogonal tensors they recover the components less often (``tools/bench_overparameterized.py``).
    """
    vectors = _random(tensor, rank, tensor.shape[mode], generator)
    if rank < tensor.shape[mode]:
        unfolding = tensor.movedim(mode, 1).flatten(2)
        for _ in range(_ITERATIONS):
            vectors = torch.linalg.qr(unfolding @ (unfolding.mT @ vectors.mT)).Q.mT
    return vectors


def _random(like: Tensor, rank: int, size: int, generator: torch.Generator) -> Tensor:
    """Return unit vectors (g, rank, size)."""
    vectors = torch.randn(len(like), rank, size, generator=generator, dtype=like.dtype, device="cpu")
    return vectors / torch.linalg.vector_norm(vectors, dim=2, keepdim=True)


def _balanced(factors: Sequence[Array], scale: Array) -> list[Array]:
    """Return (g, n_i, r) with the norm of each component, and the tensor's scale, spread evenly over the modes."""
    # Each mode gets the geometric mean. Example of two modes: norms 8 and 2 become 4 and 4.
    wide = [factor.astype(np.float64, copy=False) for factor in factors]
    norms = [np.sqrt(np.einsum("gri,gri->gr", factor, factor))[:, :, None] for factor in wide]
    root = 1 / len(factors)
    even = math.prod(norm**root for norm in norms) * scale[:, None, None] ** root
    scaled = (factor * (even / np.maximum(norm, _TINY)) for factor, norm in zip(wide, norms, strict=True))
    return [np.ascontiguousarray(factor.swapaxes(1, 2)) for factor in scaled]


def _error(model: CpModel, scale: Array) -> float:
    """Return the relative error over the batch."""
    # Each group was divided by its scale, so that its energy counts by the square of it.
    energy = model.energy * np.square(scale / scale.max())
    return math.sqrt(float((model.residual * energy).sum() / max(energy.sum(), _TINY)))


def _reason(model: CpModel) -> str:
    """Return why a model is degenerate; "" if it is not."""
    # The penalty is mu sum_r lambda_r^2, and ``blowup`` is the sum, both as shares of the energy, as the residual is.
    bad = model.ridge * model.blowup > _PENALTY * model.residual
    if not bad.any():
        return ""
    return (
        f"components of rank {model.factors[0].shape[1]} grow and cancel: under a ridge that limits the fit their "
        f"squared norms are still {float(model.blowup[bad].max()):.0f} times the tensor's, the smallest congruence of "
        f"two is {float(model.congruence()[bad].min()):.3f}; a best approximation of this rank may not exist; take "
        "another rank, or tucker"
    )
