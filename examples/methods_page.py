"""The results of `methods.py`: values, the table of the page `methods.md`, and its plot."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.factorizations import Ranks
from surgery.plans.candidates import say_ranks

__all__ = ["COLUMNS", "ERROR", "STYLES", "Point", "Report", "cells", "fill", "page_table", "plot"]

START, END = "<!-- measured: start -->", "<!-- measured: end -->"
ERROR = 0.4  # largest weight error in the page's table
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
STYLES = {  # Okabe and Ito's colours, which colour-blind readers can tell apart, each with a marker
    "tucker": ("#0072B2", "o"),
    "svd": ("#000000", "s"),
    "spatial": ("#009E73", "^"),
    "depthwise": ("#CC79A7", "D"),
    "cp": ("#D55E00", "v"),
    "tt": ("#56B4E9", "P"),
    "tr": ("#E69F00", "X"),
}


@dataclass(frozen=True)
class Point:
    """One chain; parameters, MACs and latency (with its 95 % interval) as multiples of the dense layer's."""

    method: str
    ranks: Ranks
    error: float
    parameters: float
    macs: float
    latency: float
    low: float
    high: float
    verdict: str
    dense_s: float
    chain_s: float


@dataclass(frozen=True)
class Report:
    """All measurements of one layer; ``refused`` has the reason for each method that gave no chain."""

    site: str
    layer: str
    weight: tuple[int, ...]
    input_shape: tuple[int, ...]
    macs: int
    date: str
    environment: dict[str, Any]
    points: tuple[Point, ...] = field(repr=False)
    refused: dict[str, str] = field(default_factory=dict)


def cells(point: Point) -> list[str]:
    """Return the row of one chain, for the printed table and for the page."""
    costs = [f"{cost:.2f}x" for cost in (point.parameters, point.macs, point.latency)]
    return [point.method, say_ranks(point.ranks), f"{point.error:.3f}", *costs, point.verdict]


COLUMNS = ("method", "rank", "weight error", "parameters", "MACs", "latency", "verdict")


def page_table(report: Report) -> str:
    """Return the page's table: for each method, the chain with the fewest MACs whose error is at most ``ERROR``."""
    where, size = report.environment, "x".join(map(str, report.weight))
    lines = [
        f"`{report.site}`: {report.layer}, weight {size}, input {'x'.join(map(str, report.input_shape))}; "
        f"{where['cpu']}, {where['threads']} thread(s), onnxruntime {where['onnxruntime']}, torch {where['torch']}, "
        f"{report.date}. The chain with the fewest MACs of each method whose weight error is at most {ERROR}:",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    good = sorted((p for p in report.points if p.error <= ERROR), key=lambda p: p.macs)
    least = {point.method: point for point in reversed(good)}  # the last entry wins: the cheapest of each method
    lines += [f"| {' | '.join(cells(point))} |" for point in sorted(least.values(), key=lambda p: p.latency)]
    return "\n".join([*lines, "", *_disagreement(report)])


def _disagreement(report: Report) -> list[str]:
    """Say how many chains save MACs but no time, and where MACs and time are furthest apart."""
    saving = [point for point in report.points if point.macs < 1]
    slow = [point for point in saving if point.verdict != "faster"]
    widest = max(saving, key=lambda p: p.latency / p.macs)
    names = ", ".join(f"{point.method} {say_ranks(point.ranks)}" for point in slow)
    return [
        f"Of {len(saving)} chains with fewer MACs than the dense layer, {len(slow)} did not measure faster"
        f"{f' ({names})' if slow else ''}. MACs and time are furthest apart for {widest.method} "
        f"{say_ranks(widest.ranks)}: {widest.macs:.2f}x the MACs in {widest.latency:.2f}x the time."
    ]


def fill(page: str, table: str) -> str:
    """Return the page with the table between its two markers."""
    before, rest = page.split(START)
    return f"{before}{START}\n{table}\n{END}{rest.split(END)[1]}"


def plot(report: Report, path: Path) -> None:
    """Draw error against MACs and against measured latency, side by side; a chain that is not faster is hollow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, sharex=True, sharey=True, figsize=(9, 4.8), layout="constrained")
    for axes, cost in zip(panels, ("macs", "latency"), strict=True):
        for method in STYLES:
            _draw(axes, [point for point in report.points if point.method == method], cost)
        axes.axvline(1, color="0.3", linewidth=1, linestyle="--")
        axes.text(1.02, 0.99, " dense", color="0.3", va="top", transform=axes.get_xaxis_transform())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    costs = [getattr(point, cost) for point in report.points for cost in ("macs", "latency")]
    ticks = [tick for tick in TICKS if min(costs) / 2 < tick < max(costs) * 2]
    panels[0].set(xscale="log", xlabel="MACs, multiples of the dense layer's", ylabel="weight error", ylim=(0, None))
    panels[1].set(xlabel="measured latency, multiples of the dense layer's")
    panels[0].set_xticks(ticks, map(str, ticks))
    panels[0].set_xticks([], minor=True)
    panels[0].set_xlim(min(costs) / 1.15, max(1, *costs) * 1.25)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw(axes: Any, points: list[Point], cost: str) -> None:
    """Draw one method's line, its markers and, for latencies, the intervals."""
    if not points:
        return
    color, marker = STYLES[points[0].method]
    x, y = [getattr(point, cost) for point in points], [point.error for point in points]
    axes.plot(x, y, color=color, marker=marker, markersize=6, linewidth=1.4, label=points[0].method)
    if cost == "latency":
        axes.hlines(y, [p.low for p in points], [p.high for p in points], color=color, alpha=0.5)
        hollow = [point for point in points if point.verdict != "faster"]
        places = [p.latency for p in hollow], [p.error for p in hollow]
        axes.plot(*places, color=color, marker=marker, markersize=6, markerfacecolor="white", linestyle="")
