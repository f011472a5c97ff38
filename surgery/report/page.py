"""A report as one self-contained HTML page: no script, no external resources, every text escaped."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from surgery.report.charts import places, possible
from surgery.report.content import Content, LeftRow, ReplacedRow, read_content
from surgery.report.markup import Markup, dotted, join, note, page, section, table, tag
from surgery.report.strip import strip
from surgery.report.words import (
    GLOSSARY,
    bytes_text,
    milliseconds,
    percent,
    promise_sentences,
    seen_sentence,
    summary,
    title,
)
from surgery.stages.report import SplitReport
from surgery.system.writing import text_writer, write_atomically
from surgery.text import change, count, size

__all__ = ["render", "render_split", "write"]

_NAMES = 6


def write(report: Mapping[str, Any], path: str | os.PathLike[str], *, force: bool = True) -> None:
    """Write a report as one HTML file; the file is written whole or not at all.

    Raises:
        InputError: the report has values that are not allowed, for example because its file is damaged.
        FileError: the file cannot be written, or exists and ``force`` is False.
    """
    write_atomically(path, text_writer(render(report)), force=force)


def render(report: Mapping[str, Any]) -> str:
    """Return the HTML page of a report.

    Raises:
        InputError: the report has values that are not allowed.
    """
    content = read_content(report)
    sections = (
        _totals(content),
        _promise(content),
        places(content),
        possible(content),
        _sites(content),
        _left_alone(content),
        _environment(content),
        _glossary(),
    )
    return page(title(content), tag("p", summary(content), class_="lead"), *sections)


def _totals(content: Content) -> Markup:
    b, a = content.before, content.after
    rows = [_total("parameters", b.parameters, a.parameters, count), _total("MACs of one run", b.macs, a.macs, count)]
    if b.file_size is not None and a.file_size is not None:
        rows.append(_total("file size", b.file_size, a.file_size, bytes_text))
    time = content.latency
    if time is not None:
        rows.append(_total("latency (median)", time.before, time.after, milliseconds))
        rows.append(_total("latency (9 in 10 below)", time.before_p90, time.after_p90, milliseconds))
    metrics = content.route.metrics if content.route else None
    if metrics:
        rows.append(("your metric", f"{metrics[0]:.4g}", f"{metrics[1]:.4g}", f"{metrics[1] - metrics[0]:+.3g}"))
    notes = []
    if time is not None:
        span = f"{time.low:.2f} to {time.high:.2f}"
        notes = [note(f"Speed-up {time.speedup:.2f} times, 95 % interval {span}: {time.verdict}.")]
        if time.unsure:
            notes.append(note("The interval is wide, because the machine was busy. Measure again on a quiet machine."))
    elif content.no_latency:
        notes = [note(f"Latency was not measured: {content.no_latency}")]
    if content.seen is not None:
        notes.append(note(seen_sentence(content.seen)))
    return section("Before and after", table(("", "before", "after", "change"), rows), *notes)


def _total(
    name: str, before: float | None, after: float | None, say: Callable[[float | None], str]
) -> tuple[str, str, str, str]:
    return name, say(before), say(after), change(before, after)


def _promise(content: Content) -> Markup:
    if content.promise is None:
        return Markup()
    asked, measured = promise_sentences(content.promise, content.route.metrics if content.route else None)
    state, kind = ("\u2713 kept", "kept") if content.promise.kept else ("\u2717 not kept", "broken")
    line = tag("p", tag("span", state, class_=f"state {kind}"), " ", tag("strong", asked), " ", measured)
    trials = content.route.trials if content.route else ()
    tried = _trials(trials, content.promise.kind) if trials else Markup()
    return section("What was promised", line, tried)


def _trials(trials: Sequence[tuple[float, bool]], kind: str) -> Markup:
    say: Callable[[float], str] = percent if kind == "max_error" else "{:.4g}".format
    rows = [(str(i + 1), say(value), "yes" if kept else "no") for i, (value, kept) in enumerate(trials)]
    head = tag("summary", f"{len(trials)} {'version was' if len(trials) == 1 else 'versions were'} built and measured")
    return tag("details", head, table(("version", "measured", "keeps the promise"), rows))


def _sites(content: Content) -> Markup:
    if not content.replaced:
        return Markup()
    # Errors of different sites add in squares, so a site's share is its square over the sum of all squares.
    total = sum(site.effect**2 for site in content.replaced if site.effect is not None)
    shares = [replace(r, effect=r.effect**2 / total if r.effect and total else None) for r in content.replaced]
    shown = [r for r in _COLUMNS if any(r[1](site) != "\u2013" for site in shares)]
    rows = [[say(site) for _, say in shown] for site in shares]
    notes = [note(f"{site.site}: {site.note}") for site in content.replaced if site.note]
    return section("Layers that were replaced", table([name for name, _ in shown], rows, words=3), *notes)


def _arrow(before: str, after: str) -> str:
    return "\u2013" if after == "\u2013" else f"{before} \u2192 {after}"


_COLUMNS: tuple[tuple[str, Callable[[ReplacedRow], str]], ...] = (
    ("layer", lambda r: dotted(r.site)),
    ("was", lambda r: r.operator),
    ("method", lambda r: r.method),
    ("rank", lambda r: r.rank),
    ("weight error", lambda r: percent(r.error)),
    ("share of the output error", lambda r: percent(r.effect)),
    ("MACs", lambda r: _arrow(count(r.dense_macs), "\u2013" if r.macs is None else count(r.macs))),
    ("latency", lambda r: _arrow(milliseconds(r.dense_latency), milliseconds(r.latency))),
)


def _left_alone(content: Content) -> Markup:
    if not content.left:
        return Markup()
    groups: dict[str, list[LeftRow]] = defaultdict(list)
    for left in content.left:
        groups[left.reason or "no reason was recorded"].append(left)
    rows = [(reason, _names(group), str(len(group))) for reason, group in groups.items()]
    return section("Left alone, and why", table(("reason", "layers", "number"), rows, words=2))


def _names(group: Sequence[LeftRow]) -> Markup:
    names = [f"{left.name} ({left.operator})" if left.operator else left.name for left in group]
    first = join(", ".join(names[:_NAMES]))
    if len(names) <= _NAMES:
        return first
    more = tag("summary", f"and {len(names) - _NAMES} more")
    return join(first, tag("details", more, ", ".join(names[_NAMES:])))


def _environment(content: Content) -> Markup:
    rows = [(name.replace("_", " "), value) for name, value in content.environment if value]
    rows += [(name, path) for name, path in (("original", content.source), ("new model", content.target)) if path]
    return section("Machine, versions and files", table(("", ""), rows, words=2)) if rows else Markup()


def _glossary() -> Markup:
    return section("What the words mean", tag("dl", *(join(tag("dt", w), tag("dd", m)) for w, m in GLOSSARY)))


def render_split(report: SplitReport, *, name: str = "the model") -> str:
    """Return the HTML page of a split; ``name`` is what its title calls the model."""
    head = tag("p", f"{report.verdict[0].upper()}{report.verdict[1:]}.", class_="lead")
    stages = len(report.stages)
    title = f"{name} in {stages} {'stage' if stages == 1 else 'stages'}"
    return page(title, head, _strip(report), _stages(report), _crossings(report), _notes(report))


def _strip(report: SplitReport) -> Markup:
    drawn = strip(report)
    told = (
        "Each layer is as wide as it takes time. Below it are the bytes that would have to be sent if the network were "
        "cut there; red lines are the cuts."
    )
    return section("The network as a strip", drawn, note(told)) if drawn else Markup()


def _stages(report: SplitReport) -> Markup:
    head, *rows = report.rows()
    told = f"Times are without transfers, which take their bytes over {size(report.link)}/s."
    return section("Stages", table(head, rows, words=3), note(told))


def _crossings(report: SplitReport) -> Markup:
    if not report.crossings:
        return Markup()
    rows = [
        (each.value, f"stage {each.source}", " and ".join(map(str, each.targets)), size(each.bytes))
        for each in report.crossings
    ]
    return section("What crosses", table(("value", "given in", "goes to", "size"), rows, words=3))


def _notes(report: SplitReport) -> Markup:
    return section("Notes", join(*map(note, report.notes))) if report.notes else Markup()
