"""When to switch: at the epochs that the user named, or by the rule for "auto"; pure functions of the run so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.errors import InputError
from surgery.training.spectra import SpectrumLog

__all__ = ["SHARE", "Schedule"]

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
