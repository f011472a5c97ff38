"""Elements of HTML and SVG in which every text is escaped: only a ``Markup`` is inserted as it is.

Names come from untrusted files. Characters that control a page or the direction of its text are shown as escapes.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from surgery.text import cut, shown

__all__ = ["Markup", "dotted", "join", "note", "section", "shorten", "table", "tag"]

_EMPTY = {"br", "meta", "line", "rect", "circle", "polyline", "wbr"}


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
