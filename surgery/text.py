"""Numbers and small tables as plain text, for the readable forms of results."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["FAR", "change", "count", "first_line", "rank_text", "seconds", "table"]

FAR = 0.3  # an output error above which the outputs are no longer those of the original


def count(value: int | float | None) -> str:
    """Return a count with a unit, as 1.23 M; a dash for None."""
    if value is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}" if abs(value) < 999.5 * size else f"{value / size:.0f} {unit}"
    return f"{value:g}"


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


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows in aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
