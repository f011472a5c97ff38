"""Spectra of weights as training goes: stable ranks, when they settle, and the rank that they say.

The stable rank of a matrix is ``sum s^2 / max s^2``, here of the unfolding (out, in x kernel) of each group, averaged
over the groups. From the Gram matrix of the shorter side, at m^2 n + m^3; once an epoch, that is little beside the
epoch itself. Relative to the freshly initialised weight it falls as training finds directions, and what it settles at
tells how many are needed (Cuttlefish, Wang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.algebra.operators import Operator
from surgery.solvers.gram import gram

__all__ = ["SETTLED", "SpectrumLog", "stable_rank"]

SETTLED = 0.05  # ours: the change of the stable rank in an epoch, relative to it, below which it has settled
_SMOOTHED = 2  # epochs over which the change is averaged


def stable_rank(operator: Operator) -> float:
    """Return ``sum s^2 / max s^2`` of the unfolding of the kernel, the mean over its groups; 0 for a zero weight."""
    matrix = operator.kernel.detach().flatten(2)
    if matrix.shape[1] > matrix.shape[2]:
        matrix = matrix.mT
    squares: Tensor = torch.linalg.eigvalsh(gram(matrix))
    largest = squares[:, -1]
    ranks = squares.clamp(min=0).sum(-1) / torch.where(largest > 0, largest, 1)
    return float(ranks.mean())


@dataclass(frozen=True)
class SpectrumLog:
    """Stable ranks of the sites: one row at the start of training and one after each epoch."""

    rows: tuple[Mapping[str, float], ...] = ()

    def add(self, row: Mapping[str, float]) -> SpectrumLog:
        """Return the log with one more row."""
        return SpectrumLog((*self.rows, dict(row)))

    def relative(self, site: str) -> float:
        """Return the present stable rank of a site over that at the start; 1 where nothing is known."""
        first = self.rows[0].get(site, 0.0) if self.rows else 0.0
        return self.rows[-1].get(site, first) / first if first > 0 else 1.0

    @property
    def mean(self) -> float | None:
        """The mean over the sites of ``relative``; None where nothing is known."""
        sites = list(self.rows[0]) if self.rows else []
        return sum(map(self.relative, sites)) / len(sites) if sites else None

    @property
    def change(self) -> float | None:
        """The largest change of any site in an epoch, relative and smoothed; None before there are enough epochs."""
        if len(self.rows) <= _SMOOTHED:
            return None
        now, before = self.rows[-1], self.rows[-1 - _SMOOTHED]
        changes = [abs(now[s] - before[s]) / (_SMOOTHED * before[s]) for s in now if before.get(s, 0.0) > 0]
        return max(changes, default=0.0)

    @property
    def settled(self) -> bool:
        """Whether no site's stable rank changes any more by ``SETTLED`` an epoch."""
        return self.change is not None and self.change < SETTLED
