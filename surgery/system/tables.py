"""Tables in plain text: as wide as their cells, or as narrow as a terminal without breaking a word."""

from __future__ import annotations

import re
from collections.abc import Sequence

from surgery.text import lines, shown, width

__all__ = ["layout", "table"]

_WIDEST = 200  # columns are not filled up to longer cells
_NARROWEST = 8  # of a column whose cells are cut

_Cell = Sequence[str]  # what it may be broken into, or the lines that it takes


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows in aligned columns, the first to the left and the others to the right; cells are escaped."""
    head, body = layout(rows)
    return "\n".join([*head, *body])


def layout(rows: Sequence[Sequence[str]], *, words: int = 1, columns: int | None = None) -> tuple[list[str], list[str]]:
    """Return the lines of the headings, which are the first row, and those of the other rows, in aligned columns.

    The first ``words`` columns hold texts, set to the left; the very first holds names. The others hold numbers, set to
    the right. Lines that would be longer than ``columns`` are shortened in steps, only as far as needed: headings take
    several lines, then cells that are not names, then names, and then the longest texts are cut in the middle. No word
    is broken, no number is parted from its unit, and no number is cut.
    """
    if not rows:
        return [], []
    cells: list[Sequence[_Cell]] = [[[shown(cell)] for cell in column] for column in zip(*rows, strict=True)]
    widths = [max(map(_widest, column)) for column in cells]
    if columns is None:
        widths = [min(each, _WIDEST) for each in widths]
    else:
        room = columns - 2 * (len(cells) - 1)
        heads = [[re.split(r"(?<= )", column[0][0]), *column[1:]] for column in cells]
        pieces = [[head, *(_pieces(cell[0], i, words) for cell in body)] for i, (head, *body) in enumerate(heads)]
        # Each step starts from the widths of the one before, and makes nothing narrower if the line fits already.
        for broken in (heads, [heads[0], *pieces[1:]], pieces):
            widths = _broken(broken, widths, room)
        widths = _cut([_widest(head) for head, *_ in pieces[:words]], widths, room)
        cells = [[lines(cell, each) for cell in column] for column, each in zip(pieces, widths, strict=True)]
    head, *body = (_row(row, widths, words, below=not i) for i, row in enumerate(zip(*cells, strict=True)))
    return head, [line for row in body for line in row]


def _pieces(cell: str, index: int, words: int) -> _Cell:
    """Return the pieces of a cell: names of modules break after dots, paths after slashes, texts at spaces."""
    if index == 0:
        return re.split(r"(?<=\w/)" if "/" in cell else r"(?<=, )|(?<=\w\.)", cell)
    return re.split(r"(?<= )" if index < words else r"(?<=-> |to )", cell)


def _widest(cell: _Cell) -> int:
    return max(width(piece.rstrip(" ")) for piece in cell)


def _broken(pieces: Sequence[Sequence[_Cell]], widths: Sequence[int], room: int) -> list[int]:
    """Return the widths with the widest column made narrower, again and again, until all fit or no cell can break."""
    found = list(widths)

    def narrower(i: int) -> int:
        """Return the next smaller width of a column; the same width if it cannot be narrower."""
        if found[i] <= max(map(_widest, pieces[i])):
            return found[i]
        return max(_widest(lines(cell, found[i] - 1)) for cell in pieces[i])

    # Invariant: smaller[i] is the next width of column i at which its cells still break between pieces; so each round
    # makes some column narrower, and the loop ends.
    smaller = [narrower(i) for i in range(len(found))]
    while sum(found) > room:
        able = [i for i, each in enumerate(found) if smaller[i] < each]
        if not able:
            break
        widest = max(able, key=lambda i: found[i])
        found[widest] = smaller[widest]
        smaller[widest] = narrower(widest)
    return found


def _cut(heads: Sequence[int], widths: Sequence[int], room: int) -> list[int]:
    """Return the widths with the widest of the first columns made narrower, but never narrower than their headings."""
    found = list(widths)
    while sum(found) > room:
        able = [i for i, head in enumerate(heads) if found[i] > max(head, _NARROWEST)]
        if not able:
            break
        found[max(able, key=lambda i: found[i])] -= 1
    return found


def _row(cells: Sequence[_Cell], widths: Sequence[int], words: int, *, below: bool) -> list[str]:
    """Return the lines of one row; cells with fewer lines stand at its top, or at its bottom with ``below``."""
    height = max(map(len, cells))
    blank = [[""] * (height - len(cell)) for cell in cells]
    filled = [[*empty, *cell] if below else [*cell, *empty] for cell, empty in zip(cells, blank, strict=True)]
    left = [i < words for i in range(len(cells))]
    return ["  ".join(map(_set, line, widths, left)).rstrip() for line in zip(*filled, strict=True)]


def _set(text: str, room: int, left: bool) -> str:
    space = " " * (room - width(text))
    return text + space if left else space + text
