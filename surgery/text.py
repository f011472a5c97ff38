"""Texts from outside made safe to show, lines of whole words, and numbers with their units: all as plain text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Literal, TypeAlias, get_args

__all__ = [
    "FAR",
    "RUIN",
    "VERDICTS",
    "Verdict",
    "change",
    "count",
    "cut",
    "first_line",
    "lines",
    "rank_text",
    "seconds",
    "shown",
    "size",
    "width",
    "wrap",
]

Verdict: TypeAlias = Literal["faster", "slower", "no difference"]  # what one thing is, timed against another
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)

FAR = 0.3  # an output error above which the outputs are no longer those of the original
RUIN = 0.5  # an output error above which no speed-up is worth its model, unless best effort is asked for


def shown(text: str) -> str:
    r"""Return a text from outside as it is, with what does not print escaped, as ``\x1b``, ``\n`` or ``\u202e``.

    So a name cannot steer a terminal, change the direction of the text around it, or look like a line of ours.

    >>> shown("a[/red] \x1b[31m\ud800 ü"), shown("all\nis fine")
    ('a[/red] \\x1b[31m\\ud800 ü', 'all\\nis fine')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cut(text: str, columns: int) -> str:
    """Return a text of at most ``columns`` columns, cut in the middle; more is kept of its end, which says more.

    >>> cut("encoder.layer.11.attention.output.dense", 20)
    'encoder…output.dense'
    """
    if width(text) <= columns:
        return text
    start = text[: _fitting(text, 2 * (columns - 1) // 5)]
    end = _fitting(text[::-1], columns - 1 - width(start))
    return f"{start}\u2026{text[len(text) - end :]}"


def wrap(text: str, columns: int | None, indent: str = "") -> list[str]:
    """Return lines of whole words; only a word that is longer than a line is cut. Lines but the first are indented."""
    return [text] if columns is None else lines(re.split(r"(?<= )", text), columns, indent)


def lines(pieces: Sequence[str], columns: int, indent: str = "") -> list[str]:
    """Return lines, each with as many of the next pieces of a text as fit; spaces at their ends are left out."""
    made = [""]
    for piece in pieces:
        if made[-1] and width((made[-1] + piece).rstrip(" ")) > columns:
            made.append(indent)
        room = columns - width(made[-1])
        made[-1] += piece if width(piece.rstrip(" ")) <= room else cut(piece.rstrip(" "), room)
    return [line.rstrip(" ") for line in made]


def width(text: str) -> int:
    """Return how many columns of a terminal a text takes."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def _fitting(text: str, columns: int) -> int:
    """Return how many characters of a text's start fit."""
    used = 0
    for i, character in enumerate(text):
        used += width(character)
        if used > columns:
            return i
    return len(text)


def count(value: int | float | None) -> str:
    """Return a count with a unit, as 1.23 M; a dash for None."""
    if value is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}" if abs(value) < 999.5 * size else f"{value / size:.0f} {unit}"
    return f"{value:g}"


def size(value: float | None) -> str:
    """Return a size with a unit, as 1.23 MB; a dash for None.

    >>> size(0), size(1500)
    ('0 B', '1.5 kB')
    """
    if value is None:
        return "-"
    return f"{count(value)}B" if value >= 1000 else f"{value:g} B"


def seconds(value: float | None) -> str:
    """Return a duration with a unit, as 1.23 ms; a dash for None."""
    if value is None:
        return "-"
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def change(before: float | None, after: float | None) -> str:
    """Return a relative change, as -41.2 %; a dash where there is nothing to compare."""
    if not before or after is None:
        return "-"
    return f"{100 * (after / before - 1):+.1f} %"


def rank_text(rank: Sequence[int] | None) -> str:
    """Return ranks as 16 or 16,32; a dash for None."""
    return "-" if rank is None else ",".join(map(str, rank))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says anything; the name of its type where none does.

    >>> first_line(ValueError("  too long  \\nby far")), first_line(ValueError(""))
    ('too long', 'ValueError')
    """
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
