"""Tucker of a batch of tensors of any order by higher-order orthogonal iteration (HOOI) on a dimension tree.

    T (g, n_1, ..., n_N)  ~  core (g, r_1, ..., r_N) x_1 A_1 ... x_N A_N        factors A_i (g, n_i, r_i), orthonormal

The start is a sequentially truncated HOSVD through Gram matrices (Vannieuwenhoven et al. 2012). Then each basis in turn
moves to the leading subspace of the tensor projected on all others, Y_n (g, n, product of the other ranks), by two
orthogonal iterations ``A <- orth(Y_n Y_n^T A)``. They start at the present basis and never lower the energy
``||A^T Y_n||^2``. The dimension tree gives all Y_n from two products of the tensor with its bases a sweep. The basis of
a subspace is free; the one nearest to the last (Procrustes) makes steps small, as pairwise perturbation needs them:

    Y_n  ~  Y_n(P)  +  sum_m Y_nm(P) x_m D_m^T        D_m = A_m - P_m, Y_nm: all modes except two projected

(Ma and Solomonik, arXiv 1811.10573). This costs products of the pair operators alone. Whatever the bases, the core is
exact, and the squared error is ``||T||^2 - ||core||^2``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.errors import InputError, RankError
from surgery.solvers.dimension_tree import Array, Modes, pair_nodes, visit
from surgery.solvers.gram import leading_eigen
from surgery.solvers.pairwise import drift

__all__ = ["TuckerResult", "tucker"]

_METHODS = ("als", "pp")
_ITERATIONS = 2
_LIMIT, _PHASE = 0.1, 15  # pairwise perturbation: relative change of a basis up to which it holds; sweeps
_TINY = torch.finfo(torch.float64).tiny
_FLOAT32_RESIDUAL = 1e-3  # share of the energy below which float32 products say too little about it


@dataclass(frozen=True, eq=False)
class TuckerResult:
    """Core (g, r_1, ..., r_N), orthonormal factors (g, n_i, r_i), and the relative Frobenius error of the batch."""

    core: Tensor
    factors: list[Tensor]
    error: float
    sweeps: int


class _Model:
    """The bases that are fitted to a tensor (g, n_1, ..., n_N), and the share (g,) of its energy that they miss."""

    def __init__(self, tensor: Tensor, factors: Sequence[Tensor]) -> None:
        self.tensor, self.factors = tensor, list(factors)
        self.energy = _squares(tensor)
        self.modes: Modes = tuple(range(len(factors)))
        self.sizes: Modes = tuple(tensor.shape[1:])
        self.core = self.contract(tensor, self.modes, self.modes)

    @property
    def residual(self) -> Tensor:
        return ((self.energy - _squares(self.core)) / self.energy.clamp(min=_TINY)).clamp(min=0)

    def contract(self, node: Tensor, modes: Modes, run: Modes) -> Tensor:
        for mode in run:
            node = _project(node, self.factors[mode], mode)
        return node

    def sweep(self) -> None:
        visit(self.tensor, self.modes, self.sizes, self.contract, self.update)

    def update(self, mode: int, projected: Tensor) -> None:
        """Improve one basis from the tensor projected on all others; after the last one the core is known."""
        unfolding = projected.movedim(mode + 1, 1).flatten(2)
        basis = before = self.factors[mode]
        for _ in range(_ITERATIONS):
            basis = torch.linalg.qr(unfolding @ (unfolding.mT @ basis)).Q
        # Procrustes: of all rotations Q, U V^T of the SVD of ``basis^T before`` brings ``basis Q`` nearest to
        # ``before``. Example with one column: basis = -before gives Q = -1, and the basis does not move at all.
        left, _, right = torch.linalg.svd(basis.mT @ before)
        self.factors[mode] = basis @ (left @ right)
        if mode == self.modes[-1]:
            self.core = _project(projected, self.factors[mode], mode)

    def perturbed(self) -> Callable[[], None]:
        """Return a sweep by the pair operators of the present bases."""
        anchors = list(self.factors)
        pairs = pair_nodes(self.tensor, self.modes, self.sizes, self.contract)

        def onto(mode: int, other: int, matrix: Tensor) -> Tensor:
            return _project(pairs[min(mode, other), max(mode, other)], matrix, other)

        # Y_n at the anchors is a pair operator with its other mode projected. Invariant of a sweep, to first order in
        # the moves D: Y_n = leaves[n] + sum_m pairs[n, m] x_m D_m^T.
        leaves = [onto(mode, (mode + 1) % len(anchors), anchors[(mode + 1) % len(anchors)]) for mode in self.modes]

        def sweep() -> None:
            for mode in self.modes:
                others = (other for other in self.modes if other != mode)
                moves = (onto(mode, other, self.factors[other] - anchors[other]) for other in others)
                self.update(mode, sum(moves, leaves[mode]))

        return sweep


def tucker(
    tensor: Tensor, ranks: Sequence[int], *, method: str = "als", sweeps: int = 50, tolerance: float = 1e-5
) -> TuckerResult:
    """Return a Tucker approximation of a batch of tensors (g, n_1, ..., n_N), N from 3 to 6, in float32 or float64.

    ``method`` is ``"als"``, or ``"pp"``, the same with pairwise perturbation. There are at most ``sweeps`` sweeps, and
    fewer once one lowers the error by less than ``tolerance`` of itself.

    Raises:
        InputError: the method or the order is not possible.
        RankError: the ranks do not fit the tensor.
    """
    _check(tensor, ranks, method)
    peak = tensor.abs().flatten(1).amax(1).clamp(min=torch.finfo(tensor.dtype).tiny)
    peak = peak.view(-1, *(1,) * len(ranks))
    scaled = torch.div(tensor, peak, out=tensor.new_empty(tensor.shape))  # its squares must not overflow
    run = _pairwise if method == "pp" else _sweeps
    model = _Model(scaled, _start(scaled, ranks))
    done = run(model, sweeps, tolerance)
    if tensor.dtype == torch.float32 and float(model.residual.min()) < _FLOAT32_RESIDUAL:
        model = _Model(scaled.double(), [torch.linalg.qr(factor.double()).Q for factor in model.factors])
        done += run(model, sweeps - done, tolerance)
    energy = model.energy * (peak.double() / peak.max()).flatten().square()
    error = math.sqrt(float((model.residual * energy).sum() / energy.sum().clamp(min=_TINY)))
    factors = [factor.to(tensor.dtype).contiguous() for factor in model.factors]
    return TuckerResult((model.core * peak).to(tensor.dtype).contiguous(), factors, error, done)


def _check(tensor: Tensor, ranks: Sequence[int], method: str) -> None:
    sizes = tuple(tensor.shape[1:])
    if method not in _METHODS:
        raise InputError(f"unknown method {method!r} of tucker", allowed=", ".join(_METHODS))
    if not 3 <= len(sizes) <= 6:
        raise InputError(f"a tensor of shape {tuple(tensor.shape)}", allowed="a batch axis and 3 to 6 modes")
    if len(ranks) != len(sizes) or any(not 1 <= rank <= size for rank, size in zip(ranks, sizes, strict=False)):
        raise RankError(f"ranks {tuple(ranks)} of a tensor {sizes}", allowed="a rank from 1 to its size for each mode")


def _start(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return the bases of a sequentially truncated HOSVD."""
    factors, core = [], tensor
    for mode, rank in enumerate(ranks):
        unfolding = core.movedim(mode + 1, 1).flatten(2)
        factors.append(leading_eigen(unfolding @ unfolding.mT, rank)[1])
        core = _project(core, factors[-1], mode)
    return factors


def _sweeps(model: _Model, sweeps: int, tolerance: float) -> int:
    for done in range(1, sweeps + 1):
        before = model.residual
        model.sweep()
        if _settled(before, model.residual, tolerance):
            return done
    return max(sweeps, 0)


def _pairwise(model: _Model, sweeps: int, tolerance: float) -> int:
    """Sweep exactly while the bases move fast, and otherwise by pair operators; the last sweep is exact."""
    # Invariant: ``anchor`` and ``before`` are the bases and the residual of the last exact sweep, and ``phase`` is the
    # number of sweeps by pairs since. The exact sweep after a phase judges it: if more is missed than before, the bases
    # are those of the anchor again, and the next phase may go a quarter as far.
    limit, done, phase = _LIMIT, 0, 0
    anchor, before = list(model.factors), model.residual
    while done < sweeps:
        kept = list(model.factors)
        model.sweep()
        done += 1
        if phase and bool((model.residual > before).any()):
            model.factors, limit, kept = anchor, limit / 4, anchor
            model.sweep()
            done += 1
        # ``before`` is phase + 1 sweeps ago, and the tolerance is that of one sweep.
        if _settled(before, model.residual, tolerance * (phase + 1)):
            break
        phase, anchor, before = 0, list(model.factors), model.residual
        if drift(_arrays(kept), _arrays(model.factors)) < limit / 4 and done + 1 < sweeps:
            phase = _phase(model, min(_PHASE, sweeps - done - 1), limit, tolerance)
            done += phase
    return done


def _phase(model: _Model, most: int, limit: float, tolerance: float) -> int:
    """Sweep by the pair operators of the present bases; return the number of sweeps."""
    anchor, sweep = list(model.factors), model.perturbed()
    for done in range(1, most + 1):
        before = model.residual
        sweep()
        if drift(_arrays(anchor), _arrays(model.factors)) > limit or _settled(before, model.residual, tolerance):
            return done
    return most


def _arrays(factors: Sequence[Tensor]) -> list[Array]:
    return [factor.numpy(force=True) for factor in factors]


def _settled(before: Tensor, after: Tensor, tolerance: float) -> bool:
    return bool((before - after <= 2 * tolerance * after).all())  # the error is the root


def _project(node: Tensor, matrix: Tensor, mode: int) -> Tensor:
    """Return a node (g, ..., n_mode, ...) with one mode multiplied by the transpose of (g, n_mode, r)."""
    before, after = node.shape[1 : mode + 1], node.shape[mode + 2 :]
    # The modes before and after become one each. Example of mode 1 in (g, 64, 3, 3, 32): (g, 64, 3, 96), and with a
    # matrix (g, 3, 2) the result is (g, 64, 2, 3, 32).
    cube = node.reshape(len(node), math.prod(before), -1, math.prod(after))
    if cube.shape[3] == 1:
        found = cube[..., 0] @ matrix
    elif cube.shape[1] == 1:
        found = matrix.mT @ cube[:, 0]
    else:
        found = matrix.mT[:, None] @ cube
    return found.reshape(len(node), *before, -1, *after)


def _squares(tensor: Tensor) -> Tensor:
    return torch.linalg.vector_norm(tensor.flatten(1), dim=1, dtype=torch.float64).square()
