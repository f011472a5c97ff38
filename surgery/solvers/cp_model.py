"""A CP model that is fitted to a tensor: exact updates of its factors, extrapolation, and a ridge that bounds them.

    T (g, n_1, ..., n_N)  ~  sum_r  a_1r o ... o a_Nr        factors, with the rank first, (g, r, n_i)

Each factor in turn is the solution of its linear least squares problem ``A_n G = M``. M is the tensor contracted with
all other factors (MTTKRP, from the dimension tree: two GEMMs a sweep, 4 g r size flops). G is the elementwise product
of the other factors' Gram matrices (r x r, solved by Cholesky). G is in float64, except for a float32 tensor as long as
its pivots say that no component is nearly a sum of others: then float32 is as good. The residual follows from the last
M of a sweep, ``||T||^2 - 2 <M, A_N> + sum(G_1 * ... * G_N)``, so that the model is never built.

Steps start from an extrapolation of the last two sweeps by Nesterov's weights (Mitchell, Ye and De Sterck 2020). If the
error rises, the step is taken back and the weights start anew. The extra cost is that of r x r Gram matrices.

A best approximation of a rank above 1 need not exist (de Silva and Lim 2008): components then grow without bound and
cancel. A ridge ``mu sum_r lambda_r^2`` bounds components that are large and opposite; lambda_r is the norm of component
r, and the ridge adds ``mu diag(G)`` to G, however norms are spread over the factors. If fits as good exist with smaller
components, the ridge costs next to nothing. If not, it limits the fit, and the result is degenerate.

Everything but large products is in NumPy: a sweep of a small tensor is some hundred operations, and the cost of a call
counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import blas, lapack

from surgery.solvers.dimension_tree import Array, Modes, contract, matmul, visit

__all__ = ["CpModel", "Snapshot", "product"]

_RIDGE = 1e-5
_LARGE, _OPPOSITE = 10.0, -0.9  # blowup and congruence (cosine) of two components that cancel
_HUGE = 100.0  # blowup where more than two do
_TINY = float(np.finfo(np.float64).tiny)
_EPS = float(np.finfo(np.float64).eps)
_RESOLVED = 1e-3  # share of a component's square from which on float32 solves normal equations well
_LAPACK = {"f": (lapack.spotrf, blas.strsm), "d": (lapack.dpotrf, blas.dtrsm)}
_FEW = 2**19  # multiplications of a triangle's solution below which a call of SciPy's is quicker than one of torch's


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Factors (g, r, n_i), and what was known of their fit."""

    factors: list[Array]
    residual: Array
    blowup: Array


class CpModel:
    """The factors (g, r, n_i) that are fitted to a tensor (g, n_1, ..., n_N), and how far they are from it.

    ``residual`` and ``blowup``, the components' squared norms, are shares (g,) of the tensor's energy. Steps that are
    not ``extrapolated`` are plain alternating least squares.
    """

    def __init__(self, tensor: Array, factors: Sequence[Array], *, extrapolated: bool = True) -> None:
        self.tensor = np.ascontiguousarray(tensor)
        self.extrapolated = extrapolated
        self.energy = _squares(self.tensor)
        self.factors = [np.ascontiguousarray(factor) for factor in factors]
        self.wide = len(self.tensor) > 1 or self.tensor.dtype == np.float64  # normal equations in float64
        self.grams = [self._gram(factor) for factor in self.factors]
        self.residual = np.full_like(self.energy, math.inf)
        self.blowup = np.zeros_like(self.energy)
        self.ridge = np.zeros_like(self.energy)
        self.jitter = max(float(np.finfo(self.tensor.dtype).eps), self.factors[0].shape[1] * _EPS)
        self.momentum = np.zeros_like(self.energy)
        self.before = self.factors
        self.modes: Modes = tuple(range(len(factors)))
        self.sizes: Modes = tuple(tensor.shape[1:])

    @property
    def objective(self) -> Array:
        """What every update lowers: the residual and the ridge's penalty (g,)."""
        return self.residual + self.ridge * self.blowup

    def contract(self, node: Array, modes: Modes, run: Modes) -> Array:
        """Contract a node of the dimension tree with the present factors."""
        return contract(node, modes, run, self.factors)

    def sweep(self) -> None:
        """Update each factor once, exactly."""
        visit(self.tensor, self.modes, self.sizes, self.contract, self.update)

    def update(self, mode: int, mttkrp: Array) -> None:
        """Solve for one factor from its MTTKRP (g, r, n); after the last one the residual is known."""
        found = None if self.wide else _solve_one(self._normal(mode), mttkrp, _RESOLVED)
        if found is None:
            self._widen()
            found = _solve(self._normal(mode), mttkrp, 1 + self.jitter + self.ridge)
        self._set(mode, found)
        if mode == self.modes[-1]:
            self._judge(mttkrp)

    def _normal(self, mode: int) -> Array:
        return product([gram for other, gram in enumerate(self.grams) if other != mode])

    def _widen(self) -> None:
        """Go over to normal equations in float64; they stay."""
        if not self.wide:
            self.wide = True
            self.grams = [self._gram(factor) for factor in self.factors]

    def measure(self) -> None:
        """Compute the residual of the present factors."""
        leaves: dict[int, Array] = {}  # by the tree, since a Khatri-Rao product of all modes but one is large
        visit(self.tensor, self.modes, self.sizes, self.contract, leaves.__setitem__)
        self._judge(leaves[self.modes[-1]])

    def step(self, sweep: Callable[[], None]) -> Array:
        """Extrapolate, sweep, and take back the groups whose objective rose; return where it did not (g,)."""
        # Invariant: no step raises the objective of any group. Momentum k extrapolates by (k - 1) / (k + 2) of the last
        # step: a group that has fallen 4 times in a row goes on by 3/6 of it, and one that rose starts from 0 again.
        kept, objective = self.snapshot(), self.objective
        if self.extrapolated and (self.momentum > 1).any():
            self._extrapolate()
        sweep()
        fell = self.objective <= objective
        self.restore(kept, ~fell)
        self.before = kept.factors
        self.momentum = np.where(fell, self.momentum + 1, 0)
        self._regularise()
        return fell

    def _extrapolate(self) -> None:
        """Go on in the direction of the last step; a sweep solves for the first factor before it uses it."""
        weight = np.maximum((self.momentum - 1) / (self.momentum + 2), 0)[:, None, None].astype(self.tensor.dtype)
        for mode in self.modes[1:]:
            now = self.factors[mode]
            self._set(mode, now + weight * (now - self.before[mode]))

    def _regularise(self) -> None:
        """Add a ridge to the groups whose components cancel; it stays."""
        if (self.blowup > _LARGE).any():
            cancel = (self.blowup > _HUGE) | ((self.blowup > _LARGE) & (self.congruence() < _OPPOSITE))
            self.ridge = np.where(cancel, _RIDGE, self.ridge)
            if cancel.any():
                self._widen()

    def settled(self, before: Array, fell: Array, tolerance: float) -> bool:
        """Whether in all groups the error, the root of the objective, fell by less than ``tolerance`` of itself.

        A group whose error rose is not settled: a step was taken back, or a ridge was added.
        """
        # The error is a root: where it falls by a share t, the objective falls by about 2 t.
        gain = before - self.objective
        return bool((fell & (gain >= 0) & (gain <= 2 * tolerance * self.objective)).all())

    def snapshot(self) -> Snapshot:
        """Return the present factors."""
        return Snapshot(list(self.factors), self.residual, self.blowup)

    def restore(self, kept: Snapshot, groups: Array) -> None:
        """Go back to a snapshot in some groups, given by a mask (g,)."""
        if not groups.any():
            return
        mask = groups[:, None, None]
        for mode, (old, new) in enumerate(zip(kept.factors, self.factors, strict=True)):
            self._set(mode, np.where(mask, old, new))
        self.residual = np.where(groups, kept.residual, self.residual)
        self.blowup = np.where(groups, kept.blowup, self.blowup)

    def _set(self, mode: int, factor: Array) -> None:
        self.factors[mode] = factor
        self.grams[mode] = self._gram(factor)

    def _gram(self, factor: Array) -> Array:
        factor = factor.astype(np.float64, copy=False) if self.wide else factor
        return matmul(factor, np.ascontiguousarray(factor.swapaxes(1, 2)))  # OpenBLAS is slow on a small transpose

    def _judge(self, mttkrp: Array) -> None:
        # ||T - X||^2 = ||T||^2 - 2 <M, A_N> + sum(G). The trace of G is the sum of the components' squared norms.
        model, floor = product(self.grams), np.maximum(self.energy, _TINY)
        inner = np.multiply(mttkrp, self.factors[-1], dtype=np.float64).sum((1, 2))
        total = model.sum((1, 2), dtype=np.float64)
        self.residual = np.maximum((self.energy - 2 * inner + total) / floor, 0)
        self.blowup = np.trace(model, axis1=1, axis2=2, dtype=np.float64) / floor

    def congruence(self) -> Array:
        """Return the smallest cosine between two components (g,)."""
        model = product(self.grams)
        norms = np.maximum(np.sqrt(np.diagonal(model, axis1=1, axis2=2)), _TINY)
        return (model / norms[:, :, None] / norms[:, None, :]).min((1, 2))


def product(grams: Sequence[Array]) -> Array:
    """Return the elementwise product of Gram matrices (g, r, r), a new one: that of a Khatri-Rao product."""
    first, *others = grams
    product = first * others[0] if others else first.copy()
    for gram in others[1:]:
        product *= gram
    return product


def _squares(tensor: Array) -> Array:
    """Return the sums of squares (g,), in float64 without a copy in it."""
    return torch.linalg.vector_norm(torch.from_numpy(tensor).flatten(1), dim=1, dtype=torch.float64).square().numpy()


def _solve(normal: Array, mttkrp: Array, growth: Array) -> Array:
    """Return X (g, r, n) with ``normal X = mttkrp``; normal (g, r, r), positive semidefinite float64, is overwritten.

    ``growth`` (g,) is what its diagonal is multiplied by. A component of norm 0 stays 0.
    """
    diagonal = np.einsum("gii->gi", normal)
    diagonal *= growth[:, None]
    diagonal += _TINY
    right = mttkrp.astype(np.float64)
    if len(normal) == 1:
        found = _solve_one(normal, right)
    else:  # no batch in LAPACK itself
        triangle, info = torch.linalg.cholesky_ex(torch.from_numpy(normal))
        found = None if info.any() else torch.cholesky_solve(torch.from_numpy(right), triangle).numpy()
    if found is None:
        found = np.linalg.pinv(normal, hermitian=True) @ right
    return np.ascontiguousarray(found, dtype=mttkrp.dtype)


def _solve_one(normal: Array, right: Array, least: float = 0) -> Array | None:
    """Return X (1, r, n) with ``normal X = right``, in their dtype; None if the solution would not be accurate.

    That is so if Cholesky fails, or if less than the share ``least`` of a component's square is orthogonal to the
    components before it. OpenBLAS factors small matrices in half the time of MKL, and lower triangles faster still; MKL
    solves with them in a third of OpenBLAS's time, apart from the cost of a call. Systems are solved from the right, so
    that nothing is transposed.
    """
    factor, solve = _LAPACK[normal.dtype.char]
    # G = L L^T, so that X^T = R^T L^-T L^-1: two solutions from the right. The square of L_ii is what component i has
    # orthogonal to those before it. Example of G = [[4, 2], [2, 2]]: L = [[2, 0], [1, 1]], and half of the second's 2.
    triangle, failed = factor(normal[0].T, lower=True, clean=False)
    if failed or (least and (np.square(triangle.diagonal()) < least * normal[0].diagonal()).any()):
        return None
    rows = right[0].T
    if rows.size * len(triangle) < _FEW:
        half = solve(1.0, triangle, rows, side=True, lower=True, trans_a=True)
        found = solve(1.0, triangle, half, side=True, lower=True, overwrite_b=True)
    else:
        lower = torch.from_numpy(triangle)
        half = torch.linalg.solve_triangular(lower.mT, torch.from_numpy(rows), upper=True, left=False)
        found = torch.linalg.solve_triangular(lower, half, upper=False, left=False).numpy()
    return found.T[None]
