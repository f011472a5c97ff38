"""When to switch: at the epochs that the user named, or by the rule for "auto"; pure functions of the run so far.

Spectra of weights during training: their stable ranks, and when these settle.

The stable rank of a matrix is ``sum s^2 / max s^2``, here of the unfolding (out, in x kernel) of each group, averaged
over the groups. It comes from the Gram matrix of the shorter side, at a cost of m^2 n + m^3; once an epoch, that is
little compared with the epoch. It falls from that of the fresh weight as training finds directions, and the value at
which it settles tells how many directions the layer needs (Cuttlefish, Wang et al. 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.algebra import Operator
from surgery.errors import InputError
from surgery.solvers.gram import gram

__all__ = ["SETTLED", "SHARE", "Schedule", "SpectrumLog", "stable_rank"]

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
        # Example: a stable rank that fell from 80 to 72 in two epochs has changed by 8 / (2 * 80) = 5 % an epoch.
        now, before = self.rows[-1], self.rows[-1 - _SMOOTHED]
        changes = [abs(now[s] - before[s]) / (_SMOOTHED * before[s]) for s in now if before.get(s, 0.0) > 0]
        return max(changes, default=0.0)

    @property
    def settled(self) -> bool:
        """Whether the stable rank of every site changes by less than ``SETTLED`` an epoch."""
        return self.change is not None and self.change < SETTLED


SHARE = 0.05  # longest wait as a share of the epochs, as in Elhoushi et al. 2019: 10 of 200
_PATIENCE = 5  # ours: longest wait in epochs if their total is not known


@dataclass(frozen=True)
class Schedule:
    """When to decompose and to recompose, in epochs done; ``epochs`` is their total, or None if it is not known.

    ``decompose_at`` is "auto" or a number; ``recompose_at`` is "end", a number, or None for never. Ranks are chosen
    anew after each number of epochs in ``redecompose_at``.
    """

    decompose_at: int | str
    recompose_at: int | str | None
    epochs: int | None
    redecompose_at: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check("decompose_at", self.decompose_at, ("auto",))
        _check("recompose_at", self.recompose_at, ("end", None))
        _check("epochs", self.epochs, (None,))
        for number in self.redecompose_at:
            _check("a later decompose_at", number, ())
        first, last = self.decompose_at, self.recompose_at
        if isinstance(first, int) and isinstance(last, int) and last <= first:
            raise InputError(f"recompose_at={last} is not after decompose_at={first}", next_step="give a later epoch")

    @classmethod
    def read(
        cls, decompose_at: int | str | Sequence[int | str], recompose_at: int | str | None, epochs: int | None
    ) -> Schedule:
        """Return the schedule; ranks are chosen anew at every ``decompose_at`` after the first.

        Raises:
            InputError: a value is not a number of epochs or an allowed word, or the order is wrong.
        """
        several = [decompose_at] if isinstance(decompose_at, int | str) else list(decompose_at)
        if not several:
            raise InputError("decompose_at is empty", allowed="'auto', or epochs done", next_step="give at least one")
        first, *later = several
        return cls(first, recompose_at, epochs, tuple(later))  # type: ignore[arg-type]  # __post_init__ checks them

    @property
    def last(self) -> int | None:
        """The number of epochs after which factored training ends; None if it is not known."""
        return self.recompose_at if isinstance(self.recompose_at, int) else self.epochs

    def decompose_reason(self, done: int, log: SpectrumLog) -> str | None:
        """Return the reason to decompose after ``done`` epochs, or None if it is too early."""
        if isinstance(self.decompose_at, int):
            return f"decompose_at={self.decompose_at}" if done >= self.decompose_at else None
        if log.settled:
            return f"the spectra have settled (stable ranks change by at most {100 * (log.change or 0):.1f} % an epoch)"
        limit = _PATIENCE if self.last is None else max(1, int(SHARE * self.last))
        if done < limit:
            return None
        return f"waiting costs more than it saves after {limit} of {self.last or 'unknown'} epochs"

    def recompose_reason(self, done: int) -> str | None:
        """Return the reason to recompose after ``done`` epochs, or None if it is too early or never due."""
        if isinstance(self.recompose_at, int):
            return f"recompose_at={self.recompose_at}" if done >= self.recompose_at else None
        ends = self.recompose_at == "end" and self.epochs is not None and done >= self.epochs
        return "the training ends" if ends else None


def _check(name: str, value: object, words: tuple[str | None, ...]) -> None:
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not number and value not in words:
        allowed = ", ".join(["whole numbers from 1", *(repr(word) for word in words)])
        raise InputError(f"{name}={value!r}", allowed=allowed)
