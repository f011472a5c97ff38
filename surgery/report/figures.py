"""The figures of a report with their captions: where the time goes by layer, and what was possible."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from surgery.report.charts import Bar, Frontier, bars, frontier
from surgery.report.content import Content
from surgery.report.markup import Markup, note, section, tag
from surgery.report.words import milliseconds
from surgery.text import count

__all__ = ["places", "possible"]

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
