"""Predict hyperedges: score sets of nodes by how likely each is to be a hyperedge. High means likely.

``neighbours``, ``pairs``, ``katz``, ``resource``, ``hpra``   the set's mean score of a pair: surgery.hypergraph.scores
``clique``                minus the spread of the clique expansion's Fiedler vector over the set
``tensor``, ``absolute``  minus the set's term of the Laplacian tensor's form at its Fiedler vector, that is, what it
                          would cost to add it (Maurya and Ravindran, arXiv 2102.04986). One vector says little.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from surgery.errors import InputError
from surgery.hypergraph.hypergraph import Floats, Hypergraph, Integers
from surgery.hypergraph.laplacian import Form, pairs
from surgery.hypergraph.ragged import added, bounds
from surgery.hypergraph.scores import PAIRS
from surgery.hypergraph.vectors import Vector, fiedler

__all__ = ["PREDICTORS", "Predictor", "predict"]

Predictor: TypeAlias = Literal["neighbours", "pairs", "katz", "resource", "hpra", "clique", "tensor", "absolute"]
PREDICTORS: tuple[Predictor, ...] = get_args(Predictor)


def predict(h: Hypergraph, candidates: Iterable[Iterable[int]] | NDArray[Any], *, method: Predictor = "hpra") -> Floats:
    """Return a score for each candidate, a set of two or more of h's nodes; high means likely.

    Only h is looked at, and a candidate that is a hyperedge of h is no special case. Ties are ties: do not rank them by
    their order. Raises ``InputError`` for candidates that are no sets of nodes, and where the Fiedler vector refuses:
    with "tensor" and "absolute" the candidates have the size of the hyperedges.

    >>> h = Hypergraph.from_edges([(0, 1, 2), (1, 2, 3), (4, 5, 6), (3, 6, 7)])
    >>> predict(h, [(0, 1, 3), (0, 4, 7)], method="pairs").round(2)
    array([0.33, 0.  ])
    """
    if method not in PREDICTORS:
        raise InputError(f"method {method!r}", allowed=", ".join(PREDICTORS))
    # Candidates may repeat, and hyperedges may not: so they are checked as a hypergraph, and then taken as they stand.
    rows = candidates if isinstance(candidates, np.ndarray) else [list(row) for row in candidates]
    Hypergraph.from_edges(rows, nodes=h.nodes)
    sizes = np.array([len(row) for row in rows], np.int64)
    if (sizes < 2).any():
        raise InputError(f"candidate {int(sizes.argmin())} of size {sizes.min()}", allowed="two nodes or more")
    flat = np.concatenate([np.asarray(row) for row in rows]).astype(np.int64) if len(rows) else np.zeros(0, np.int64)
    if method in PAIRS:
        return _mean_of_pairs(h, method, flat, sizes)
    if method == "clique":
        return _spread(fiedler(h, "clique").vector, flat, sizes)
    return _cost(h, "tensor" if method == "tensor" else "absolute", flat, sizes)


def _mean_of_pairs(h: Hypergraph, method: str, flat: Integers, sizes: Integers) -> Floats:
    u, v, row = _all_pairs(flat, sizes)
    low, high = np.minimum(u, v), np.maximum(u, v)
    # Pair (u, v) is number u n + v. A pair that stands in many candidates is scored once.
    both, place = np.unique(low * h.nodes + high, return_inverse=True)
    score = PAIRS[method](pairs(h), both // h.nodes, both % h.nodes)[place]
    return added(row, score, len(sizes)) / np.maximum(sizes * (sizes - 1) // 2, 1)


def _all_pairs(flat: Integers, sizes: Integers) -> tuple[Integers, Integers, Integers]:
    """Return the two nodes of all pairs of each row, and the row."""
    starts, found = bounds(sizes), []
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        table = flat[starts[rows][:, None] + np.arange(size)]
        i, j = np.triu_indices(size, 1)
        found.append((table[:, i].ravel(), table[:, j].ravel(), np.repeat(rows, len(i))))
    if not found:
        return flat, flat, flat
    u, v, row = (np.concatenate(part) for part in zip(*found, strict=True))
    return u, v, row


def _spread(x: Floats, flat: Integers, sizes: Integers) -> Floats:
    """Return minus the mean squared difference of x over each row's pairs."""
    row = np.repeat(np.arange(len(sizes)), sizes)
    # The sum of squared differences over all pairs of n numbers is n times their squared deviations, and there are n
    # (n - 1) / 2 pairs. Example of 0 and 1: deviations 1/4 + 1/4, times 2 / 1, is (1 - 0)^2.
    mean = added(row, x[flat], len(sizes)) / sizes
    return -2 * added(row, (x[flat] - mean[row]) ** 2, len(sizes)) / (sizes - 1)


def _cost(h: Hypergraph, method: Vector, flat: Integers, sizes: Integers) -> Floats:
    order = h.table().shape[1]
    if (sizes != order).any():
        what = f"candidates of size {sizes.min()} to {sizes.max()}"
        raise InputError(what, allowed=f"size {order}, as the hyperedges have", next_step='or take method="hpra"')
    form = Form(flat.reshape(len(sizes), order), np.ones(len(sizes)), h.nodes)
    return -np.abs(form.terms(fiedler(h, method).vector))
