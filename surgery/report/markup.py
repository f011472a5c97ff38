"""Elements of HTML and SVG in which every text is escaped: only a ``Markup`` is inserted as it is.

Names come from untrusted files. Characters that control a page or the direction of its text are shown as escapes.

The style sheet of a report, and the policy that stops the page from loading or running anything.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from surgery.text import cut, shown

__all__ = ["Markup", "dotted", "join", "note", "page", "section", "shorten", "table", "tag"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"

_STYLE = """
:root { color-scheme: light; --ink: #1d2733; --soft: #5b6775; --line: #dde3ea; --old: #b4bdc9; --new: #2468b2; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif; }
main { max-width: 960px; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .5rem; }
h1, p { overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
.lead { font-size: 1.15rem; margin: 0; }
.note, .legend { color: var(--soft); font-size: .9rem; margin: .6rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: .4rem .75rem .4rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  unicode-bidi: isolate; }
td { overflow-wrap: break-word; max-width: 24rem; }
.number { text-align: right; padding-right: 0; padding-left: .75rem; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
th.number { white-space: normal; }
.state { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; font-weight: 600; }
.kept { background: #dff3e4; color: #14602c; }
.broken { background: #fde4e1; color: #93200f; }
details { margin: .4rem 0; }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; }
svg { display: block; width: 100%; height: auto; font-size: 13px; }
svg text { fill: var(--ink); paint-order: stroke; stroke: #fff; stroke-width: 3px; }
svg .value { fill: var(--soft); font-size: 12px; }
svg .strong { font-weight: 600; }
rect.before, .key.before { fill: var(--old); background: var(--old); }
rect.after, .key.after { fill: var(--new); background: var(--new); }
rect.quiet { opacity: .45; }
.key { display: inline-block; width: .8em; height: .8em; margin-left: .6em; }
.grid { stroke: var(--line); }
.frontier { fill: none; stroke: var(--old); stroke-width: 2; }
.point { fill: var(--old); }
.chosen { fill: var(--new); }
.limit { stroke: #c0392b; stroke-dasharray: 5 4; }
.tone0 { fill: #7fa8d6; }
.tone1 { fill: #2468b2; }
.profile { fill: #e6ebf1; stroke: var(--old); }
dt { font-weight: 600; float: left; clear: left; min-width: 9rem; font-size: .9rem; }
dd { margin: 0 0 .5rem 9.5rem; font-size: .9rem; color: var(--soft); }
@media print { details > * { display: block; } section { break-inside: avoid; } }
"""


_EMPTY = {"br", "meta", "line", "rect", "circle", "polygon", "polyline", "wbr"}


class Markup(str):
    """A string that is already markup and needs no escaping."""


def shorten(text: str, length: int) -> str:
    """Return a text of at most ``length`` characters, cut in the middle if it is longer."""
    return cut(shown(text), length)


def dotted(name: str) -> Markup:
    """Return a name that a page may break after each dot."""
    first, *others = name.split(".")
    return join(first, *(join(".", tag("wbr"), part) for part in others))


def tag(name: str, /, *children: str | float, **attributes: str | float | None) -> Markup:
    """Return an element; ``_`` in an attribute's name becomes a hyphen, ``class_`` is class, None leaves it out.

    >>> tag("p", "a < b", class_="x")
    '<p class="x">a &lt; b</p>'
    """
    said = "".join(f' {_attribute(key)}="{_text(value)}"' for key, value in attributes.items() if value is not None)
    if name in _EMPTY and not children:
        return Markup(f"<{name}{said}/>")
    return Markup(f"<{name}{said}>{join(*children)}</{name}>")


def join(*parts: str | float) -> Markup:
    """Return markup and escaped texts, one after another."""
    return Markup("".join(part if isinstance(part, Markup) else _text(part) for part in parts))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> Markup:
    """Return a table whose first ``words`` columns are texts; the others are numbers, aligned to the right."""
    classes = [None if i < words else "number" for i in range(len(head))]
    top = tag("tr", *(tag("th", cell, class_=c, scope="col") for cell, c in zip(head, classes, strict=True)))
    body = [tag("tr", *(tag("td", cell, class_=c) for cell, c in zip(row, classes, strict=True))) for row in rows]
    return tag("div", tag("table", tag("thead", top), tag("tbody", *body)), class_="wide")


def page(title: str, *parts: str) -> str:
    """Return a whole page in HTML, with its title as its first heading."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    body = tag("main", tag("h1", title), *parts)
    return f"<!DOCTYPE html>\n{tag('html', head, tag('body', body), lang='en')}\n"


def section(heading: str, *parts: str) -> Markup:
    """Return a section with its heading."""
    return tag("section", tag("h2", heading), *parts)


def note(text: str) -> Markup:
    """Return a remark in small print."""
    return tag("p", text, class_="note")


def _attribute(key: str) -> str:
    return key.rstrip("_").replace("_", "-")


def _text(value: str | float) -> str:
    return html.escape(shown(value) if isinstance(value, str) else f"{value:.6g}", quote=True)
