"""The content of a report as values, read from untrusted JSON: each text is a string, and each number is finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.system.rows import Row

__all__ = ["Content", "KeptRow", "Latency", "LeftRow", "ReplacedRow", "Route", "Total", "VERSION", "read_content"]

VERSION = 1
_WIDE = 1.25
_AGAIN = "make the report again with surgery decompose"
PROMISES = ("max_error", "max_drop", "target_speedup")


@dataclass(frozen=True)
class Total:
    """Totals of a model: parameters, multiply-accumulates of one run, bytes of its file; None if not known."""

    parameters: float | None
    macs: float | None
    file_size: float | None


@dataclass(frozen=True)
class Latency:
    """Seconds of one run of both models (median and 90th percentile), and the speed-up with its 95 % interval."""

    before: float
    after: float
    before_p90: float | None
    after_p90: float | None
    speedup: float
    low: float
    high: float
    verdict: str

    @property
    def unsure(self) -> bool:
        """Whether the interval is too wide to be summed up in one number."""
        return self.high > _WIDE * self.low


@dataclass(frozen=True)
class ReplacedRow:
    """A site that was factored; ``effect`` is the output error expected from this site alone."""

    site: str
    operator: str
    method: str
    rank: str
    error: float | None
    effect: float | None
    dense_macs: float | None
    macs: float | None
    dense_latency: float | None
    latency: float | None
    note: str


@dataclass(frozen=True)
class LeftRow:
    """A place that was left alone, and why; ``latency`` is in seconds, or None if it was not measured."""

    name: str
    operator: str
    reason: str
    macs: float | None
    latency: float | None


@dataclass(frozen=True)
class KeptRow:
    """A promise: its limit, the measured value, and whether it was kept."""

    kind: str
    limit: float
    measured: float
    kept: bool
    note: str


@dataclass(frozen=True)
class Route:
    """How the result was found: the best and the chosen points (output error, cost), and the trials (value, kept)."""

    points: tuple[tuple[float, float], ...]
    chosen: tuple[float, float] | None
    cost: str
    trials: tuple[tuple[float, bool], ...]
    metrics: tuple[float, float] | None


@dataclass(frozen=True)
class Content:
    """Everything that a page shows."""

    source: str
    target: str
    before: Total
    after: Total
    replaced: tuple[ReplacedRow, ...]
    left: tuple[LeftRow, ...]
    latency: Latency | None
    no_latency: str
    promise: KeptRow | None
    seen: tuple[float, str] | None
    route: Route | None
    environment: tuple[tuple[str, str], ...]


def read_content(report: Mapping[str, Any]) -> Content:
    """Return the content of a report.

    Raises:
        InputError: a value is missing or has the wrong type; the message says where.
    """
    top = Row.of(report, "report", _AGAIN)
    if report.get("surgery_report") != VERSION:
        top.refuse("surgery_report", str(VERSION))
    decisions = {row.text("site"): row for row in top.row("plan").rows("decisions")}
    searched = report.get("search") is not None
    replaced = [_replaced(row, decisions.get(row.text("site")), searched=searched) for row in top.rows("changes")]
    timing = report.get("timing")
    told = timing if isinstance(timing, str) else ""
    return Content(
        source=top.text("input"),
        target=top.text("output"),
        before=_total(top.row("before")),
        after=_total(top.row("after")),
        replaced=tuple(replaced),
        left=tuple(_left(row, decisions.get(row.text("name"))) for row in top.rows("skips")),
        latency=None if timing is None or told else _latency(top.row("timing")),
        no_latency=told,
        promise=None if report.get("promise") is None else _promise(top.row("promise")),
        seen=None if report.get("seen") is None else (top.row("seen").number("error"), top.row("seen").text("what")),
        route=_route(top.row("search")) if searched else None,
        environment=_environment(top.row("environment")),
    )


def _total(row: Row) -> Total:
    return Total(row.maybe("parameters"), row.maybe("macs"), row.maybe("file_size"))


def _replaced(row: Row, decision: Row | None, *, searched: bool) -> ReplacedRow:
    ranks = [f"{rank:g}" for rank in row.numbers("rank")]
    return ReplacedRow(
        site=row.text("site"),
        operator=row.text("operator"),
        method=row.text("factorization"),
        rank=", ".join(ranks),
        error=row.maybe("error"),
        effect=decision.maybe("error") if searched and decision is not None else None,
        dense_macs=row.maybe("dense_macs"),
        macs=row.maybe("macs"),
        dense_latency=row.maybe("dense_latency"),
        latency=row.maybe("latency"),
        note=row.text("note"),
    )


def _left(row: Row, decision: Row | None) -> LeftRow:
    latency = None if decision is None else decision.maybe("dense_latency")
    return LeftRow(row.text("name"), row.text("operator"), row.text("reason"), row.maybe("macs"), latency)


def _latency(row: Row) -> Latency:
    models, compared = row.rows("models"), row.rows("comparisons")
    if len(models) < 2 or not compared:
        row.refuse("models", "two models and their comparison")
    before, after, c = models[0], models[1], compared[0]
    times = before.number("median_s"), after.number("median_s"), before.maybe("p90_s"), after.maybe("p90_s")
    return Latency(*times, c.number("speedup"), c.number("low"), c.number("high"), c.text("verdict"))


def _promise(row: Row) -> KeptRow:
    kind = row.text("kind")
    if kind not in PROMISES:
        row.refuse("kind", ", ".join(PROMISES))
    return KeptRow(kind, row.number("limit"), row.number("measured"), row.truth("kept"), row.text("note"))


def _route(row: Row) -> Route:
    return Route(
        points=tuple(row.pair_of(point, "frontier") for point in row.items("frontier")),
        chosen=row.pair("chosen"),
        cost=row.text("cost"),
        trials=tuple((trial.number("value"), trial.values.get("kept") is True) for trial in row.rows("trials")),
        metrics=row.pair("metrics"),
    )


def _environment(row: Row) -> tuple[tuple[str, str], ...]:
    return tuple((key, row.said(key)) for key in row.values)
