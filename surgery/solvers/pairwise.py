"""Pairwise perturbation: sweeps of alternating least squares that do not touch the tensor (Ma and Solomonik 2018).

Near the fixed point the factors move little from sweep to sweep. Let P_n be the factors at some sweep, and D_n = A_n -
P_n. ``T_(n)`` is the tensor contracted with all P except P_n, and ``T_(n,m)`` the tensor contracted with all except two
(pair operators (g, r, n_i, n_j), from the dimension tree at three contractions of the tensor). The MTTKRP of mode n is,
up to second order in D (arXiv 1811.10573),

    M_n  =  T_(n)  +  sum_m  T_(n,m) D_m          cost g r n_i n_j for a pair, for CP of any order

The paper drops the second order. Here only that of the residual is dropped, because that of the model P is known
exactly at a cost of r x r. With S_m = P_m^T P_m and E_m = P_m^T D_m, and elementwise products over all modes m except
n,

    M_n  +=  P_n (prod (S_m + E_m) - prod S_m - sum_m E_m prod_k!=m S_k)

so that on a good fit the steps may be larger. A phase of such sweeps ends when a factor has moved too far, or after
some sweeps. Then comes an exact sweep. If the exact error has not fallen, the phase is taken back and the limit
lowered.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from surgery.solvers.cp_model import CpModel
from surgery.solvers.dimension_tree import Array, contract, pair_nodes

__all__ = ["Perturbed", "drift", "pairwise_sweeps"]

_LIMIT = 0.05  # relative change of a factor up to which the pair operators are used at first
_MOST = 0.2
_ENTER = 0.25  # share of the limit that one sweep may use up for a phase to pay
_PHASE = 15  # sweeps


def pairwise_sweeps(model: CpModel, *, sweeps: int, tolerance: float) -> int:
    """Sweep until the error settles: exactly while the factors move fast, and otherwise by pair operators.

    Return the number of sweeps of both kinds. The last one is exact, and no phase raises the exact error.
    """
    # Invariant: ``anchor`` is the model after the last exact sweep, ``phase`` the number of sweeps by pairs since. The
    # exact sweep that follows a phase judges it against the anchor: groups that did not fall go back to it. Example of
    # limits: 0.05 doubles to 0.1 and 0.2 at most; after a phase that failed, 0.2 becomes 0.05.
    limit, done, phase, anchor = _LIMIT, 0, 0, model.snapshot()
    while done < sweeps:
        before, kept = model.objective, model.snapshot()
        fell = model.step(model.sweep)
        done += 1
        if phase:
            model.restore(anchor, ~fell)
            limit = min(2 * limit, _MOST) if fell.all() else limit / 4
        if model.settled(before, fell, tolerance * (phase + 1)):
            break
        phase = 0
        if fell.all() and drift(kept.factors, model.factors) < _ENTER * limit and done + 1 < sweeps:
            anchor = model.snapshot()
            phase = _phase(model, min(_PHASE, sweeps - done - 1), limit, tolerance)
            done += phase
            model.residual, model.blowup = anchor.residual, anchor.blowup  # what the exact sweep has to fall below
    return done


def drift(before: Sequence[Array], after: Sequence[Array]) -> float:
    """Return the largest relative change of a factor (g, r, n), over modes and groups."""
    changes = np.stack([np.linalg.norm(new - old, axis=(1, 2)) for old, new in zip(before, after, strict=True)])
    norms = np.stack([np.linalg.norm(new, axis=(1, 2)) for new in after])
    return float((changes / np.maximum(norms, np.finfo(norms.dtype).tiny)).max())


def _phase(model: CpModel, most: int, limit: float, tolerance: float) -> int:
    """Sweep by the pair operators of the present factors; return the number of sweeps."""
    perturbed = Perturbed(model)
    for done in range(1, most + 1):
        before = model.objective
        fell = model.step(perturbed.sweep)
        if drift(perturbed.factors, model.factors) > limit or model.settled(before, fell, tolerance):
            return done
    return most


class Perturbed:
    """The tensor as it looks from factors P: pair operators, MTTKRPs and Gram matrices."""

    def __init__(self, model: CpModel) -> None:
        self.model = model
        self.factors = list(model.factors)
        self.grams = list(model.grams)
        self.pairs = pair_nodes(model.tensor, model.modes, model.sizes, model.contract)
        self.mttkrps = [self._with(mode, (mode + 1) % len(self.factors), self.factors) for mode in model.modes]

    def sweep(self) -> None:
        """Update each factor of the model once."""
        for mode in self.model.modes:
            self.model.update(mode, self.mttkrp(mode))

    def _with(self, mode: int, other: int, factors: Sequence[Array]) -> Array:
        pair = (min(mode, other), max(mode, other))
        return contract(self.pairs[pair], pair, (other,), factors)

    def mttkrp(self, mode: int) -> Array:
        """Return the MTTKRP (g, r, n) of a mode for the present factors of the model, up to second order."""
        moves = [now - then for now, then in zip(self.model.factors, self.factors, strict=True)]
        others = [other for other in self.model.modes if other != mode]
        mttkrp = sum((self._with(mode, other, moves) for other in others), self.mttkrps[mode])
        # Invariant over the modes so far: ``value`` is prod S, ``slope`` is sum_m E_m prod_k!=m S_k, and ``whole`` is
        # prod (S + E); their difference is the second order and above. Example in numbers, S = 2, 3 and E = 0.1, 0.2:
        # value 6, slope 0.1 * 3 + 2 * 0.2 = 0.7, whole 2.1 * 3.2 = 6.72, difference 0.02 = 0.1 * 0.2.
        value, slope, whole = np.ones(1), np.zeros(1), np.ones(1)
        for other in others:
            then = self.factors[other].astype(np.float64, copy=False)
            gram, change = self.grams[other], moves[other].astype(np.float64, copy=False) @ then.swapaxes(1, 2)
            slope, value, whole = slope * gram + value * change, value * gram, whole * (gram + change)
        second = (whole - value - slope) @ self.factors[mode].astype(np.float64, copy=False)
        return mttkrp + second.astype(mttkrp.dtype, copy=False)
