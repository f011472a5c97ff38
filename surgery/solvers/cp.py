"""CP of a batch of tensors by alternating least squares on a dimension tree.

    T (g, n_1, ..., n_N)  ~  sum_r  a_1r o ... o a_Nr        factors (g, n_i, r)

Each factor in turn is the solution of its linear least squares problem ``A_n G = M``: M is the tensor contracted with
all other factors (MTTKRP, from the dimension tree: two GEMMs a sweep, 4 g r size flops), and G the elementwise product
of the other factors' Gram matrices (r x r, in float64; solved by Cholesky). The residual follows from the last M of a
sweep, ``||T||^2 - 2 <M, A_N> + sum(G_1 * ... * G_N)``, so that the model is never built. Start: the leading
eigenvectors of the unfoldings' Gram matrices (HOSVD), and random factors; the best after a few sweeps goes on.

Sweeps start from an extrapolation of the last two by Nesterov's weights (Mitchell, Ye and De Sterck 2020); where the
error rises, it is taken back and the weights start anew. The extra cost is that of r x r Gram matrices.

A best approximation of a rank above 1 need not exist (de Silva and Lim 2008): components then grow without bound and
cancel. So where components are large and opposite, a ridge ``mu sum_r lambda_r^2`` (lambda_r is the norm of component
r; it adds ``mu diag(G)`` to G, however norms are spread over the factors) holds them. Where there are fits as good with
smaller components it costs next to nothing; where there are none it limits the fit, and the result is degenerate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.errors import InputError
from surgery.solvers.dimension_tree import Modes, contract, visit
from surgery.solvers.gram import leading_subspace
from surgery.solvers.pairwise import pairwise_sweeps

__all__ = ["CpModel", "CpResult", "Snapshot", "cp", "gram_of", "product"]

_METHODS = ("als", "pp", "gd")
_TRIAL_SWEEPS = 5
_RIDGE = 1e-5
_LARGE, _OPPOSITE = 10.0, -0.9  # blowup and congruence (cosine) of two components that cancel
_HUGE = 100.0  # blowup where more than two do
_PENALTY = 0.1  # share of the residual from which on the ridge limits the fit
_FLOAT32_RESIDUAL = 1e-3  # share of the energy below which float32 products say too little about it


@dataclass(frozen=True, eq=False)
class CpResult:
    """Factors (g, n_i, rank), whose scales are balanced, and how well they fit: relative Frobenius error of the batch.

    ``degenerate`` where components are large and cancel in spite of the ridge, with the ``reason`` in words.
    """

    factors: list[Tensor]
    error: float
    sweeps: int
    degenerate: bool
    reason: str


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Factors (g, r, n_i), their Gram matrices, and what was known of their fit."""

    factors: list[Tensor]
    grams: list[Tensor]
    residual: Tensor
    blowup: Tensor


class CpModel:
    """A CP model on its way: factors (g, r, n_i) of a tensor (g, n_1, ..., n_N), and how far they are from it.

    ``residual`` and ``blowup``, the components' squared norms, are shares (g,) of the tensor's energy.
    """

    def __init__(self, tensor: Tensor, factors: Sequence[Tensor]) -> None:
        self.tensor = tensor
        self.energy = _squares(tensor)
        self.factors = list(factors)
        self.grams = [gram_of(factor) for factor in factors]
        self.residual = torch.full_like(self.energy, math.inf)
        self.blowup = torch.zeros_like(self.energy)
        self.ridge = torch.zeros_like(self.energy)
        self.momentum = torch.zeros_like(self.energy)
        self.before = self.factors
        self.modes: Modes = tuple(range(len(factors)))
        self.sizes: Modes = tuple(tensor.shape[1:])

    @property
    def objective(self) -> Tensor:
        """What every update lowers: the residual and the ridge's penalty (g,)."""
        return self.residual + self.ridge * self.blowup

    def contract(self, node: Tensor, modes: Modes, run: Modes) -> Tensor:
        """Contract a node of the dimension tree with the present factors."""
        return contract(node, modes, run, self.factors)

    def sweep(self) -> None:
        """Update each factor once, exactly."""
        visit(self.tensor, self.modes, self.sizes, self.contract, self.update)

    def update(self, mode: int, mttkrp: Tensor) -> None:
        """Solve for one factor from its MTTKRP (g, r, n); after the last one the residual is known."""
        normal = product([gram for other, gram in enumerate(self.grams) if other != mode])
        self._set(mode, _solve(normal, mttkrp, self.ridge))
        if mode == self.modes[-1]:
            self._judge(mttkrp)

    def measure(self) -> None:
        """Find the residual of the factors as they are."""
        self._judge(self.contract(self.tensor, self.modes, self.modes[:-1]))

    def step(self, sweep: Callable[[], None]) -> Tensor:
        """Extrapolate, sweep, and take back the groups whose objective rose; return where it did not (g,)."""
        kept, objective = self.snapshot(), self.objective
        weight = ((self.momentum - 1) / (self.momentum + 2)).clamp(min=0).view(-1, 1, 1).to(self.tensor.dtype)
        for mode in self.modes[1:]:  # a sweep solves for the first before it uses it
            self._set(mode, torch.addcmul(kept.factors[mode], weight, kept.factors[mode] - self.before[mode]))
        sweep()
        fell = self.objective <= objective
        self.restore(kept, ~fell)
        self.before = kept.factors
        self.momentum = torch.where(fell, self.momentum + 1, 0)
        self._regularise()
        return fell

    def _regularise(self) -> None:
        """Add a ridge to the groups whose components cancel; it stays."""
        if bool((self.blowup > _LARGE).any()):
            cancel = (self.blowup > _HUGE) | ((self.blowup > _LARGE) & (self.congruence() < _OPPOSITE))
            self.ridge = torch.where(cancel, _RIDGE, self.ridge)

    def settled(self, before: Tensor, fell: Tensor, tolerance: float) -> bool:
        """Whether in all groups the error, the root of the objective, fell by less than ``tolerance`` of itself.

        It does not where it rose: a step was taken back, or a ridge was added.
        """
        gain = before - self.objective
        return bool((fell & (gain >= 0) & (gain <= 2 * tolerance * self.objective)).all())

    def snapshot(self) -> Snapshot:
        """Return the present factors."""
        return Snapshot(list(self.factors), list(self.grams), self.residual, self.blowup)

    def restore(self, kept: Snapshot, groups: Tensor) -> None:
        """Go back to a snapshot in some groups, given by a mask (g,)."""
        if not bool(groups.any()):
            return
        mask = groups.view(-1, 1, 1)
        self.factors = [torch.where(mask, old, new) for old, new in zip(kept.factors, self.factors, strict=True)]
        self.grams = [torch.where(mask, old, new) for old, new in zip(kept.grams, self.grams, strict=True)]
        self.residual = torch.where(groups, kept.residual, self.residual)
        self.blowup = torch.where(groups, kept.blowup, self.blowup)

    def _set(self, mode: int, factor: Tensor) -> None:
        self.factors[mode] = factor
        self.grams[mode] = gram_of(factor)

    def _judge(self, mttkrp: Tensor) -> None:
        model = product(self.grams)
        inner = (mttkrp.double() * self.factors[-1].double()).sum((1, 2))
        floor = self.energy.clamp(min=torch.finfo(torch.float64).tiny)
        self.residual = ((self.energy - 2 * inner + model.sum((1, 2))) / floor).clamp(min=0)
        self.blowup = model.diagonal(dim1=1, dim2=2).sum(1) / floor

    def congruence(self) -> Tensor:
        """Return the smallest cosine between two components (g,)."""
        model = product(self.grams)
        norms = model.diagonal(dim1=1, dim2=2).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
        return (model / norms[:, :, None] / norms[:, None, :]).amin((1, 2))


def cp(
    tensor: Tensor,
    rank: int,
    *,
    method: str = "als",
    sweeps: int = 100,
    tolerance: float = 1e-5,
    restarts: int = 1,
    seed: int = 0,
) -> CpResult:
    """Return a CP approximation of a batch of tensors (g, n_1, ..., n_N), N from 2 to 6, in float32 or float64.

    ``method``: ``"als"``; ``"pp"``, the same with pairwise perturbation (Ma and Solomonik, arXiv 1811.10573); ``"gd"``,
    an over-parameterised gradient method (orders 3 and 4; the other options but ``seed`` do not apply). At most
    ``sweeps`` sweeps, fewer once one lowers the error by less than ``tolerance`` of itself. ``restarts`` random starts
    are tried beside the HOSVD. Raises ``InputError`` for a method, order or rank that there is not, or a tensor that is
    not finite.
    """
    _check(tensor, rank, method)
    low, high = torch.aminmax(tensor.flatten(1), dim=1)
    scale = torch.maximum(-low, high).clamp(min=torch.finfo(tensor.dtype).tiny)
    shape = (-1, *(1,) * (tensor.dim() - 1))
    scaled = torch.div(tensor, scale.view(shape), out=tensor.new_empty(tensor.shape))  # its squares must not overflow
    if method == "gd":
        from surgery.solvers.overparameterized import gradient_cp

        model, done = CpModel(scaled, [factor.mT for factor in gradient_cp(scaled, rank, seed=seed)]), 0
    else:
        model = _start(scaled, rank, restarts=restarts, seed=seed)
        model, done = _run(model, method, sweeps=sweeps, tolerance=tolerance)
    if not done:
        model.measure()
    reason = _reason(model)
    return CpResult(_balanced(model.factors, scale, tensor.dtype), _error(model, scale), done, bool(reason), reason)


def _run(model: CpModel, method: str, *, sweeps: int, tolerance: float) -> tuple[CpModel, int]:
    """Sweep until the error settles; where float32 cannot tell, go on in float64. Return the number of sweeps too."""
    run = pairwise_sweeps if method == "pp" else _als_sweeps
    done = run(model, sweeps=sweeps, tolerance=tolerance)
    if model.tensor.dtype == torch.float32 and float(model.residual.min()) < _FLOAT32_RESIDUAL:
        ridge = model.ridge
        model = CpModel(model.tensor.double(), [factor.double() for factor in model.factors])
        model.ridge = ridge
        model.measure()
        done += run(model, sweeps=sweeps - done, tolerance=tolerance)
    return model, done


def _check(tensor: Tensor, rank: int, method: str) -> None:
    if method not in _METHODS:
        raise InputError(f"unknown method {method!r} of cp", allowed=", ".join(_METHODS))
    if not 3 <= tensor.dim() <= 7:
        raise InputError(f"a tensor of shape {tuple(tensor.shape)}", allowed="a batch axis and 2 to 6 modes")
    if rank < 1:
        raise InputError(f"rank {rank}", allowed="at least 1")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError("a tensor with NaN or infinite entries", allowed="finite entries")


def _als_sweeps(model: CpModel, *, sweeps: int, tolerance: float) -> int:
    """Sweep until the error settles; return the number of sweeps."""
    for done in range(1, sweeps + 1):
        before = model.objective
        fell = model.step(model.sweep)
        if model.settled(before, fell, tolerance):
            return done
    return sweeps


def _start(tensor: Tensor, rank: int, *, restarts: int, seed: int) -> CpModel:
    """Return the best of the HOSVD and of random starts, group by group, after a few sweeps."""
    generator = torch.Generator().manual_seed(seed)
    modes = range(1, tensor.dim())
    models = [CpModel(tensor, [_leading(tensor.movedim(mode, 1).flatten(2), rank, generator) for mode in modes])]
    if not restarts:
        return models[0]
    for _ in range(restarts):
        models.append(CpModel(tensor, [_random(tensor, rank, tensor.shape[mode], generator) for mode in modes]))
    for model in models:
        for _ in range(_TRIAL_SWEEPS):
            model.step(model.sweep)
    best = torch.stack([model.objective for model in models]).argmin(0)
    groups = torch.arange(len(tensor))
    factors = zip(*(model.factors for model in models), strict=True)
    return CpModel(tensor, [torch.stack(same_mode)[best, groups] for same_mode in factors])


def _leading(unfolding: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return (g, rank, n): leading left singular vectors of (g, n, rest), then random ones where there are no more."""
    rows, columns = unfolding.shape[1:]
    count = min(rank, rows, columns)
    if rows <= columns:
        basis = leading_subspace(unfolding @ unfolding.mT, count)
    else:
        basis = torch.linalg.qr(unfolding @ leading_subspace(unfolding.mT @ unfolding, count)).Q
    return torch.cat([basis.mT, _random(unfolding, rank - count, rows, generator)], 1)


def _random(like: Tensor, rank: int, size: int, generator: torch.Generator) -> Tensor:
    """Return unit vectors (g, rank, size)."""
    vectors = torch.randn(len(like), rank, size, generator=generator, dtype=like.dtype)
    return torch.nn.functional.normalize(vectors, dim=2)


def product(grams: Sequence[Tensor]) -> Tensor:
    """Return the elementwise product of Gram matrices (g, r, r): the Gram matrix of a Khatri-Rao product."""
    product = grams[0]
    for gram in grams[1:]:
        product = product * gram
    return product


def gram_of(factor: Tensor) -> Tensor:
    """Return the Gram matrix in float64 of a factor as the solver keeps it, with the rank first."""
    factor = factor.double()
    return factor @ factor.mT


def _squares(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64).square()


def _solve(normal: Tensor, mttkrp: Tensor, ridge: Tensor) -> Tensor:
    """Return X (g, r, n) with ``normal X = mttkrp``, for normal (g, r, r) positive semidefinite in float64."""
    jitter = max(torch.finfo(mttkrp.dtype).eps, normal.shape[1] * torch.finfo(torch.float64).eps)
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal.mul_(1 + jitter + ridge[:, None])
    diagonal.masked_fill_(diagonal == 0, 1)  # a component of norm 0 stays 0
    triangle, info = torch.linalg.cholesky_ex(normal)
    if bool(info.any()):
        return (torch.linalg.pinv(normal, hermitian=True) @ mttkrp.double()).to(mttkrp.dtype)
    return torch.cholesky_solve(mttkrp.double(), triangle).to(mttkrp.dtype)


def _balanced(factors: Sequence[Tensor], scale: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return (g, n_i, r) with the norm of each component, and the tensor's scale, spread evenly over the modes."""
    norms = [torch.linalg.vector_norm(factor, dim=2, keepdim=True, dtype=torch.float64) for factor in factors]
    root = 1 / len(factors)
    even = math.prod(norm**root for norm in norms) * scale.double().view(-1, 1, 1) ** root
    tiny = torch.finfo(torch.float64).tiny
    scaled = (factor * (even / norm.clamp(min=tiny)) for factor, norm in zip(factors, norms, strict=True))
    return [factor.to(dtype).mT.contiguous() for factor in scaled]


def _error(model: CpModel, scale: Tensor) -> float:
    """Return the relative error over the batch."""
    energy = model.energy * (scale.double() / scale.max()).square()
    return math.sqrt(float((model.residual * energy).sum() / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)))


def _reason(model: CpModel) -> str:
    """Return why a model is degenerate; "" where it is not."""
    bad = model.ridge * model.blowup > _PENALTY * model.residual
    if not bool(bad.any()):
        return ""
    return (
        f"components of rank {model.factors[0].shape[1]} grow and cancel: under a ridge that limits the fit their "
        f"squared norms are still {float(model.blowup[bad].max()):.0f} times the tensor's, the smallest congruence of "
        f"two is {float(model.congruence()[bad].min()):.3f}; a best approximation of this rank may not exist; take "
        "another rank, or tucker"
    )
