"""What decompose returns: the new model, its changes, what was promised and what was seen, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from surgery.factorizations import Ranks
from surgery.plans.choose import Trial
from surgery.plans.goal import GoalKind
from surgery.plans.plan import Plan
from surgery.runtime.bench import Timing
from surgery.sites import Skip, Totals, left_alone
from surgery.system.tables import table
from surgery.text import FAR, change, count, rank_text, shown

__all__ = ["Change", "DecomposeResult", "Promise", "Search", "Seen"]


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


_Model = TypeVar("_Model", covariant=True)


@dataclass(frozen=True)
class Change:
    """One site that was factored: costs before and after, and the measured relative error of its weight.

    Of a chain that was cut to lower ranks, costs before and the error are those to the chain that it was.
    ``joint`` names the group with which it shares factors, whose parameters count for the first of them. ``note`` says
    what the user should know of it, as that another method had to take the place of the planned one. ``bound`` is "at
    most" or "at least" where the error is predicted and no more than that; a measured one has none.
    """

    site: str
    operator: str
    factorization: str
    rank: Ranks
    error: float
    dense_parameters: int
    parameters: int
    dense_macs: int
    macs: int
    dense_latency: float | None = None
    latency: float | None = None
    joint: str | None = None
    note: str = ""
    bound: str = ""

    @property
    def bounded(self) -> str:
        """What to write before the error: the bound and a space, or nothing."""
        return f"{self.bound} " if self.bound else ""


@dataclass(frozen=True)
class Search:
    """How a promise was searched for.

    ``frontier`` has (expected output error, cost) of the best choices from dense to the cheapest, for all sites that
    have options; ``cost`` says what costs are: "latency" (seconds), "macs" or "params". ``chosen`` is the point of the
    result. ``trials`` are what was measured on the way, ``metrics`` the user's metric before and after, ``timing`` the
    final one of both models, and ``predicted`` the speed-up that was expected of it. ``reached`` has the speed-up and
    the output error of each whole model that was measured for a promised speed-up.
    """

    frontier: tuple[tuple[float, float], ...] = ()
    chosen: tuple[float, float] | None = None
    trials: tuple[Trial, ...] = ()
    metrics: tuple[float, float] | None = None
    timing: Timing | None = None
    cost: str = ""
    predicted: float | None = None
    reached: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, repr=False)
class DecomposeResult(Generic[_Model]):
    """The new model, the plan that made it, each change, each place left alone, and the totals before and after.

    ``seen`` is the measured output error, on calibration samples or made-up ones; None where nothing was factored or
    nothing could be measured. Of a goal also the ``promise``, as measured, and how it was
    searched for.
    """

    model: _Model
    plan: Plan
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    before: Totals
    after: Totals
    promise: Promise | None = None
    search: Search | None = None
    seen: Seen | None = None

    def __repr__(self) -> str:
        """Say in a few lines what was changed and what was not."""
        b, a = self.before, self.after
        left = left_alone(self.skips, b.macs, exported=type(self.model).__name__ == "ExportedProgram")
        first = [] if left is None else [f"DecomposeResult: {left}"]
        head = (
            f"{'' if first else 'DecomposeResult: '}{len(self.changes)} factored, {len(self.skips)} left alone; "
            f"parameters {count(b.parameters)} -> {count(a.parameters)} ({change(b.parameters, a.parameters)}), "
            f"MACs {count(b.macs)} -> {count(a.macs)} ({change(b.macs, a.macs)})"
        )
        rows = [["site", "method", "rank", "weight error", "parameters", "MACs"]]
        for c in self.changes:
            parameters, macs = change(c.dense_parameters, c.parameters), change(c.dense_macs, c.macs)
            rows.append([c.site, c.factorization, rank_text(c.rank), f"{c.bounded}{c.error:.2e}", parameters, macs])
        notes = [f"note: {c.site}: {c.note}" for c in self.changes if c.note]
        skips = [f"left alone: {skip.name}: {skip.reason}" for skip in self.skips]
        promised = [str(said) for said in (self.promise, self.seen) if said is not None]
        made = [table(rows)] if self.changes else []
        return "\n".join([*map(shown, [*first, head, *promised]), *made, *map(shown, [*notes, *skips])])
