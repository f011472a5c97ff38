"""Rows of different lengths in one flat array: row i of ``flat`` is ``flat[starts[i]:starts[i + 1]]``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["added", "bounds", "distinct_rows", "gathered", "places", "sorted_rows"]

_Ints = NDArray[np.int64]


def added(index: _Ints, values: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return (count,) sums: each value is added at its index.

    >>> added(np.array([2, 0, 2]), np.array([1.0, 2.0, 3.0]), 3)
    array([2., 0., 4.])
    """
    return np.asarray(np.bincount(index, values, minlength=count), np.float64)


def bounds(sizes: _Ints) -> _Ints:
    """Return where rows of these sizes start, and where the last one ends.

    >>> bounds(np.array([3, 2]))
    array([0, 3, 5])
    """
    found = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=found[1:])
    return found


def places(starts: _Ints, rows: _Ints) -> tuple[_Ints, _Ints]:
    """Return where the elements of these rows lie in the flat array, one row after another, and the rows' sizes.

    >>> places(np.array([0, 3, 5]), np.array([1, 0]))
    (array([3, 4, 0, 1, 2]), array([2, 3]))
    """
    # ``ends - sizes`` is where a row starts in what is returned, so that each row is a shift of the places there.
    # Example: rows 1 and 0 go to 0 and 2; shifts of 3 and -2 take 0 1 | 2 3 4 to 3 4 | 0 1 2.
    first = starts[rows]
    sizes = starts[rows + 1] - first
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(first - ends + sizes, sizes), sizes


def gathered(flat: _Ints, starts: _Ints, rows: _Ints) -> _Ints:
    """Return the elements of these rows, one row after another."""
    return flat[places(starts, rows)[0]]


def sorted_rows(flat: _Ints, sizes: _Ints) -> _Ints:
    """Return the rows with the elements of each in ascending order."""
    if len(sizes) and (sizes == sizes[0]).all():
        return np.sort(flat.reshape(len(sizes), -1), axis=1).ravel()
    return flat[np.lexsort((flat, np.repeat(np.arange(len(sizes)), sizes)))]


def distinct_rows(flat: _Ints, sizes: _Ints) -> tuple[_Ints, _Ints]:
    """Return the first of each kind of equal rows, in ascending order, and for each row the place of its kind there.

    >>> distinct_rows(np.array([0, 1, 2, 0, 1]), np.array([2, 1, 2]))
    (array([0, 1]), array([0, 1, 0]))
    """
    starts, first = bounds(sizes), np.arange(len(sizes))
    for size in np.unique(sizes):
        same = np.flatnonzero(sizes == size)
        rows = gathered(flat, starts, same).reshape(len(same), size)
        order = np.lexsort(rows.T[::-1])  # stable: of equal rows the first comes first
        new = np.ones(len(same), bool)
        new[1:] = (rows[order][1:] != rows[order][:-1]).any(axis=1)
        first[same[order]] = same[order][new][np.cumsum(new) - 1]
    kinds, inverse = np.unique(first, return_inverse=True)
    return kinds, inverse
