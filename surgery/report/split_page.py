"""The report of a split as one HTML page: the strip of the network, its stages, and what crosses between them."""

from __future__ import annotations

from surgery.report.markup import Markup, join, note, page, section, table, tag
from surgery.report.strip import strip
from surgery.stages.report import SplitReport
from surgery.text import size

__all__ = ["render_split"]


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
