"""What was promised of a result and what was seen of it, as values that the result carries."""

from __future__ import annotations

from dataclasses import dataclass

from surgery.plans.goal import GoalKind
from surgery.text import FAR, shown

__all__ = ["Promise", "Seen"]


@dataclass(frozen=True)
class Promise:
    """A goal, what was measured for the result, and whether it is kept; ``note`` says what stood in the way."""

    kind: GoalKind
    limit: float
    measured: float
    kept: bool
    note: str = ""

    def __str__(self) -> str:
        what = {"max_error": "output error", "max_drop": "drop of the metric", "target_speedup": "speed-up"}[self.kind]
        bound = "at least" if self.kind == "target_speedup" else "at most"
        state = "kept" if self.kept else "NOT KEPT"
        note = shown(f"; {self.note}") if self.note else ""
        return f"{what} {bound} {self.limit:g}: measured {self.measured:.3g}, {state}{note}"


@dataclass(frozen=True)
class Seen:
    """The relative error of a changed model's outputs, and on what inputs it was measured."""

    error: float
    what: str

    def __str__(self) -> str:
        warning = ": the outputs are no longer those of the original" if self.error > FAR else ""
        return f"output error {self.error:.3g} on {shown(self.what)}{warning}"
