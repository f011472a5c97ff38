"""Spectra of weights during training: their stable ranks, and when these settle.

The stable rank of a matrix is ``sum s^2 / max s^2``, here of the unfolding (out, in x kernel) of each group, averaged
over the groups. It comes from the Gram matrix of the shorter side, at a cost of m^2 n + m^3; once an epoch, that is
little compared with the epoch. It falls from that of the fresh weight as training finds directions, and the value at
which it settles tells how many directions the layer needs (Cuttlefish, Wang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.algebra.operators import Operator
from surgery.solvers.gram import gram

__all__ = ["SETTLED", "SpectrumLog", "stable_rank"]

SETTLED = 0.05  # ours: a stable rank has settled if its relative change in an epoch is smaller
_SMOOTHED = 2  # epochs over which the change is averaged


def stable_rank(operator: Operator) -> float:
    """Return ``sum s^2 / max s^2`` of the unfolded kernel, averaged over the groups; 0 for a zero weight."""
    matrix = operator.kernel.detach().flatten(2)
    if matrix.shape[1] > matrix.shape[2]:
        matrix = matrix.mT
    squares: Tensor = torch.linalg.eigvalsh(gram(matrix))  # s^2, in rising order
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
        """Return the stable rank of a site now, divided by that at the start; 1 if it is not known."""
        first = self.rows[0].get(site, 0.0) if self.rows else 0.0
        return self.rows[-1].get(site, first) / first if first > 0 else 1.0

    @property
    def mean(self) -> float | None:
        """The mean of ``relative`` over the sites; None if the log is empty."""
        sites = list(self.rows[0]) if self.rows else []
        return sum(map(self.relative, sites)) / len(sites) if sites else None

    @property
    def change(self) -> float | None:
        """The largest relative change of a site in an epoch, averaged over two epochs; None before there are two."""
        if len(self.rows) <= _SMOOTHED:
            return None
        now, before = self.rows[-1], self.rows[-1 - _SMOOTHED]
        changes = [abs(now[s] - before[s]) / (_SMOOTHED * before[s]) for s in now if before.get(s, 0.0) > 0]
        return max(changes, default=0.0)

    @property
    def settled(self) -> bool:
        """Whether the stable rank of every site changes by less than ``SETTLED`` an epoch."""
        return self.change is not None and self.change < SETTLED
