"""When to switch: the epochs that the user named, or the rule for "auto"; a pure function of what is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.errors import InputError
from surgery.training.spectra import SpectrumLog

__all__ = ["SHARE", "Schedule"]

SHARE = 0.05  # of the epochs, after which waiting is no longer worth it, as in the paper: 10 of 200
_PATIENCE = 5  # ours: epochs, where their total is not known


@dataclass(frozen=True)
class Schedule:
    """When to decompose and to recompose, in epochs that are done; ``epochs`` is their total, if it is known.

    ``decompose_at`` is "auto" or a number; ``recompose_at`` is "end", a number, or None for never. Ranks are chosen
    anew at each of ``redecompose_at``.
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
        """Return the schedule; of several ``decompose_at`` all but the first are when ranks are chosen anew.

        Raises:
            InputError: what is not a number of epochs, or in the wrong order.
        """
        several = [decompose_at] if isinstance(decompose_at, int | str) else list(decompose_at)
        if not several:
            raise InputError("decompose_at is empty", allowed="'auto', or epochs done", next_step="give at least one")
        first, *later = several
        return cls(first, recompose_at, epochs, tuple(later))  # type: ignore[arg-type]  # they are checked there

    @property
    def last(self) -> int | None:
        """After how many epochs factored training ends; None if that is not known."""
        return self.recompose_at if isinstance(self.recompose_at, int) else self.epochs

    def decompose_reason(self, done: int, log: SpectrumLog) -> str | None:
        """Return why to decompose after so many epochs, or None if it is too early."""
        if isinstance(self.decompose_at, int):
            return f"decompose_at={self.decompose_at}" if done >= self.decompose_at else None
        if log.settled:
            return f"the spectra have settled (stable ranks change by at most {100 * (log.change or 0):.1f} % an epoch)"
        limit = _PATIENCE if self.last is None else max(1, int(SHARE * self.last))
        if done < limit:
            return None
        return f"waiting costs more than it saves after {limit} of {self.last or 'unknown'} epochs"

    def recompose_reason(self, done: int) -> str | None:
        """Return why to recompose after so many epochs, or None if it is too early, or not to be done."""
        if isinstance(self.recompose_at, int):
            return f"recompose_at={self.recompose_at}" if done >= self.recompose_at else None
        ends = self.recompose_at == "end" and self.epochs is not None and done >= self.epochs
        return "the training ends" if ends else None


def _check(name: str, value: object, words: tuple[str | None, ...]) -> None:
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not number and value not in words:
        allowed = ", ".join(["whole numbers from 1", *(repr(word) for word in words)])
        raise InputError(f"{name}={value!r}", allowed=allowed)
