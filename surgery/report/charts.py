"""The two charts of a report as SVG: bars that show where the time goes, and the frontier of error against cost.

Both are drawn in user units, which the page scales to its width: 760 units wide, with text 13 units high.

The figures of a report with their captions: where the time goes by layer, and what was possible.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgery.report.content import Content
from surgery.report.markup import Markup, note, section, shorten, tag
from surgery.report.words import milliseconds
from surgery.text import count

__all__ = ["Bar", "Frontier", "bars", "drawing", "frontier", "places", "possible", "ticks"]

_BARS = 24  # more do not fit on a screen; then layers of one block share a bar
_DEEPEST = 16
_COSTS: dict[str, tuple[str, Callable[[float | None], str]]] = {
    "latency": ("time", milliseconds),
    "macs": ("MACs", count),
    "params": ("parameters", count),
}


def places(content: Content) -> Markup:
    """Return bars of each layer's cost before and after: time if it was measured, else multiply-accumulates."""
    rows, rest = _timed(content)
    say: Callable[[float | None], str] = milliseconds
    what = "time"
    if not rows:
        rows = [Bar(r.site, r.dense_macs, r.macs) for r in content.replaced if r.dense_macs and r.macs is not None]
        rows += [Bar(left.name, left.macs, left.macs, quiet=True) for left in content.left if left.macs]
        rest, say, what = [], count, "work"
    if not rows:
        return Markup()
    blocks = _blocks(rows)
    shared = len(blocks) < len(rows)
    rows = sorted(blocks, key=lambda row: row.before, reverse=True)
    legend = tag(
        "p", tag("span", class_="key before"), " before ", tag("span", class_="key after"), " after", class_="legend"
    )
    told = "Each layer was timed by itself." if what == "time" else "Multiply-accumulates of one run."
    told += " A number in brackets counts the layers of a block." if shared else ""
    if rest:
        told += " Everything else is the time of the whole model minus these layers: other operations, other layers."
    return section(
        f"Where the {what} goes", legend, bars([*rows[:_BARS], *_further(rows[_BARS:]), *rest], say), note(told)
    )


def _timed(content: Content) -> tuple[list[Bar], list[Bar]]:
    """Return the bars of the timed layers, and one bar for the rest of the whole model's time."""
    rows = [
        Bar(r.site, r.dense_latency, r.latency)
        for r in content.replaced
        if r.dense_latency is not None and r.latency is not None
    ]
    rows += [Bar(x.name, x.latency, x.latency, quiet=True) for x in content.left if x.latency is not None]
    whole = content.latency
    if not rows or whole is None:
        return rows, []
    before, after = (whole.before - sum(r.before for r in rows), whole.after - sum(r.after for r in rows))
    return rows, [Bar("everything else", max(0.0, before), max(0.0, after), quiet=True)]


def _blocks(rows: Sequence[Bar]) -> Sequence[Bar]:
    """Return one bar for each block of layers, if there are too many layers for a bar each."""
    # A block is a common prefix of dotted names. The longest prefixes that give few enough blocks are taken. Example:
    # 30 layers "stage1.0.conv1" ... "stage2.4.conv3" become bars "stage1.0 (3)" ..., each the sum of its layers.
    deepest = min(_DEEPEST, max(row.label.count(".") for row in rows))
    for depth in range(deepest, 0, -1):
        if len(rows) <= _BARS:
            break
        groups: dict[str, list[Bar]] = defaultdict(list)
        for row in rows:
            groups[".".join(row.label.split(".")[:depth])].append(row)
        if len(groups) <= _BARS:
            return [_sum(f"{name} ({len(group)})", group) for name, group in groups.items()]
    return rows


def _sum(label: str, rows: Sequence[Bar]) -> Bar:
    if len(rows) == 1:
        return rows[0]
    return Bar(label, sum(r.before for r in rows), sum(r.after for r in rows), all(r.quiet for r in rows))


def _further(rows: Sequence[Bar]) -> list[Bar]:
    return [_sum(f"{len(rows)} others", rows)] if rows else []


def possible(content: Content) -> Markup:
    """Return the frontier of output error against cost, with the point that was chosen."""
    route = content.route
    if route is None or len(route.points) < 2:
        return Markup()
    what, say = _COSTS.get(route.cost, ("cost", count))
    promise = content.promise if content.promise and content.promise.kind == "max_error" else None
    # The frontier has expected errors: scale it so that the chosen point lies at the error that was measured.
    expected = route.chosen[0] if route.chosen else 0.0
    scale = promise.measured / expected if promise and expected > 0 and promise.measured > 0 else 1.0
    plot = Frontier(
        points=[(cost, scale * error) for error, cost in route.points],
        chosen=route.chosen and (route.chosen[1], scale * route.chosen[0]),
        limit=None if promise is None else promise.limit,
        cost=f"{what} of the layers that can be factored",
    )
    told = (
        "Each point is the combination of layers with the least expected error at its cost, from measurements of each "
        f"layer{', scaled to the error that was measured at the chosen point' if scale != 1 else ''}. "
        "Points to the left are cheaper, and lower points are more exact."
    )
    return section("What was possible", frontier(plot, say), note(told))


_WIDTH = 760.0
_ROW, _BAR = 38.0, 13.0
_LABEL, _VALUE = 290.0, 80.0
_HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 360.0, 76.0, 24.0, 44.0, 52.0


@dataclass(frozen=True)
class Bar:
    """A pair of bars: the cost of a layer before and after; ``quiet`` makes both paler."""

    label: str
    before: float
    after: float
    quiet: bool = False


def bars(rows: Sequence[Bar], say: Callable[[float], str]) -> Markup:
    """Return horizontal pairs of bars, in the order of the rows; ``say`` turns a value into a label."""
    largest = max((max(row.before, row.after) for row in rows), default=0.0) or 1.0
    scale = (_WIDTH - _LABEL - _VALUE - 20) / largest
    drawn = [_pair(row, 8 + i * _ROW, scale, say) for i, row in enumerate(rows)]
    return drawing(drawn, 8 + len(rows) * _ROW, "Where it goes, before and after, by layer")


def _pair(row: Bar, top: float, scale: float, say: Callable[[float], str]) -> Markup:
    quiet = " quiet" if row.quiet else ""
    label = tag("text", shorten(row.label, 40), x=_LABEL - 10, y=top + _BAR + 4, text_anchor="end")
    parts = [tag("title", row.label), label]
    for value, kind, y in ((row.before, "before", top), (row.after, "after", top + _BAR + 1)):
        width = max(1.0, value * scale)
        parts.append(tag("rect", x=_LABEL, y=y, width=width, height=_BAR, class_=kind + quiet))
        parts.append(tag("text", say(value), x=_LABEL + width + 6, y=y + _BAR - 2, class_="value"))
    return tag("g", *parts)


@dataclass(frozen=True)
class Frontier:
    """Points of (cost, error), the chosen point if there is one, the limit of the error if there is one."""

    points: Sequence[tuple[float, float]]
    chosen: tuple[float, float] | None
    limit: float | None
    cost: str


def frontier(plot: Frontier, say_cost: Callable[[float], str]) -> Markup:
    """Return the plot of error against cost; errors far above the chosen one and the limit are cut off."""
    # The error axis ends at ``high``. The cost axis spans the points below it, with a margin of 6 % on both sides.
    high = _highest(plot)
    seen = [x for x, y in plot.points if y <= high] + ([plot.chosen[0]] if plot.chosen else [])
    costs = seen or [x for x, _ in plot.points]
    low_x, high_x = min(costs), max(costs)
    margin = 0.06 * (high_x - low_x) or 0.5 * abs(high_x) or 1.0
    x = _axis(max(0.0, low_x - margin), high_x + margin, _LEFT, _WIDTH - _RIGHT)
    y = _axis(0.0, high, _HEIGHT - _BOTTOM, _TOP)
    line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in sorted(plot.points))
    area = tag("rect", x=_LEFT, y=_TOP - 8, width=_WIDTH - _LEFT - _RIGHT, height=_HEIGHT - _TOP - _BOTTOM + 14)
    parts = [
        tag("defs", tag("clipPath", area, id="plot")),
        *_grid_x(ticks(low_x, high_x), x, say_cost),
        *_grid_y(ticks(0.0, high), y),
        *([] if plot.limit is None or plot.limit > high else _limit(plot.limit, y)),
        tag("polyline", points=line, class_="frontier", clip_path="url(#plot)"),
        *(tag("circle", cx=x(a), cy=y(b), r=3.5, class_="point") for a, b in plot.points if b <= high),
        *_labels(plot, x, y),
        tag("text", "output error", x=8, y=18),
        tag("text", plot.cost, x=(_LEFT + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 10, text_anchor="middle"),
    ]
    return drawing(parts, _HEIGHT, "Output error against cost")


def _highest(plot: Frontier) -> float:
    """Return the top of the axis: 2.5 times the chosen error or twice the limit, at most the largest error."""
    # Example of a chosen error of 0.02 and a limit of 0.05: the axis ends at 0.105, or where the points do. 5 % more
    # leave room for the highest.
    chosen = plot.chosen[1] if plot.chosen else 0.0
    wanted = max(2.5 * chosen, 2.0 * (plot.limit or 0.0))
    return max(chosen, min(max(y for _, y in plot.points), wanted or math.inf)) * 1.05 or 1.0


def _labels(plot: Frontier, x: Callable[[float], float], y: Callable[[float], float]) -> list[Markup]:
    dense = max(plot.points)
    parts = [tag("text", "original", x=x(dense[0]), y=y(dense[1]) - 10, text_anchor="end")] if not dense[1] else []
    if plot.chosen:
        a, b = x(plot.chosen[0]), y(plot.chosen[1])
        parts += [
            tag("circle", cx=a, cy=b, r=8, class_="chosen"),
            tag("text", "chosen", x=a + 13, y=b - 8, class_="strong"),
        ]
    return parts


def _limit(limit: float, y: Callable[[float], float]) -> list[Markup]:
    at = y(limit)
    return [
        tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=at, y2=at, class_="limit"),
        tag("text", "promised limit", x=_WIDTH - _RIGHT, y=at - 6, text_anchor="end", class_="value"),
    ]


def _grid_x(values: Sequence[float], x: Callable[[float], float], say: Callable[[float], str]) -> list[Markup]:
    base = _HEIGHT - _BOTTOM
    lines = [tag("line", x1=x(v), x2=x(v), y1=_TOP, y2=base, class_="grid") for v in values]
    return lines + [tag("text", say(v), x=x(v), y=base + 20, text_anchor="middle", class_="value") for v in values]


def _grid_y(values: Sequence[float], y: Callable[[float], float]) -> list[Markup]:
    lines = [tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(v), y2=y(v), class_="grid") for v in values]
    texts = [f"{100 * v:.3g} %" for v in values]
    labels = [
        tag("text", t, x=_LEFT - 8, y=y(v) + 4, text_anchor="end", class_="value")
        for t, v in zip(texts, values, strict=True)
    ]
    return lines + labels


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    scale = (end - start) / (high - low) if high > low else 0.0
    return lambda value: start + (value - low) * scale


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers from low to high, about ``about`` of them; only low if the two are nearly equal.

    >>> ticks(0.0, 0.05)
    [0.0, 0.01, 0.02, 0.03, 0.04, 0.05]
    """
    if not high - low > 1e-12 * max(abs(low), abs(high), 1e-18):
        return [low]
    # The step is 1, 2, 5 or 10 times a power of ten, whichever is nearest to an even division.
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = size * min((1, 2, 5, 10), key=lambda factor: abs(factor * size - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.6g}") for i in range(first, last + 1)]


def drawing(parts: Sequence[Markup], height: float, title: str) -> Markup:
    """Return a drawing of this height, in user units, with its title."""
    size = f"0 0 {_WIDTH:g} {height:g}"
    return tag("svg", tag("title", title), *parts, viewBox=size, role="img", xmlns="http://www.w3.org/2000/svg")
