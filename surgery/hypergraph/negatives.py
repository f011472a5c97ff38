"""Sets of nodes that are no hyperedges, to tell the hyperedges from: easy ones and hard ones.

``uniform``  nodes by chance: easy, since hardly any pair of them is tied
``motif``    grown along the ties of the training hyperedges, a neighbour of a member at a time (Patil and others 2020);
             pairs are two neighbours of one node. All are tied, as hyperedges that were held out of a sparse hypergraph
             often are not: there scores of ties fall below chance
``clique``   a training hyperedge with one node replaced by a neighbour of all others: so near that they share all but
             one node with what is known; report them, and rank no method by them alone
"""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import numpy as np
from scipy import sparse

from surgery.errors import InputError
from surgery.hypergraph.hypergraph import Hypergraph, Integers
from surgery.hypergraph.laplacian import pairs

__all__ = ["NEGATIVES", "Negatives", "sample"]

Negatives: TypeAlias = Literal["uniform", "motif", "clique"]
NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)
_ROUNDS = 200


def sample(
    kind: Negatives, train: Hypergraph, size: int, count: int, *, known: set[tuple[int, ...]], rng: np.random.Generator
) -> Integers:
    """Return ``count`` distinct sets (count, size), none of them in ``known``; raises ``InputError`` if too few exist.

    Sets are drawn until there are enough. What is known is only kept out: nothing is drawn by it.
    """
    ties = pairs(train)
    same = train.of_size(size).table() if kind == "clique" else None
    found: dict[tuple[int, ...], None] = {}
    for _ in range(_ROUNDS):
        drawn = _drawn(kind, ties, size, 2 * (count - len(found)) + 16, same, rng)
        for row in np.sort(drawn, axis=1).tolist():
            if tuple(row) not in known:
                found.setdefault(tuple(row))
        if len(found) >= count:
            return np.array(list(found)[:count], np.int64).reshape(count, size)
    what = f"{len(found)} {kind} negatives of size {size} found"
    raise InputError(what, allowed=f"{count}", next_step="hold out fewer hyperedges, or take other negatives")


def _drawn(
    kind: Negatives, ties: sparse.csr_array, size: int, count: int, same: Integers | None, rng: np.random.Generator
) -> Integers:
    """Return some sets; those with a node twice, and those that could not be completed, are left out."""
    nodes = ties.shape[0]
    if kind == "uniform":
        rows = rng.integers(nodes, size=(count, size))
    elif same is None:
        rows = _grown(ties, size, count, rng)
    else:
        rows = _replaced(ties, same, count, rng)
    ordered = np.sort(rows, axis=1)
    return rows[(ordered[:, :1] >= 0).all(axis=1) & (np.diff(ordered, axis=1) > 0).all(axis=1)]


def _grown(ties: sparse.csr_array, size: int, count: int, rng: np.random.Generator) -> Integers:
    if not ties.nnz:
        return np.zeros((0, size), np.int64)
    rows = np.full((count, size), -1)
    first = rng.integers(ties.nnz, size=count)  # a tie by chance: its two nodes
    # The row of an entry is the last whose start is not behind it. Example: of starts 0, 2, 3 entry 2 is in row 1.
    rows[:, 0] = np.searchsorted(ties.indptr, first, side="right") - 1
    rows[:, 1] = ties.indices[first]
    if size == 2:  # two neighbours of one node: tied pairs are hyperedges themselves too often
        rows[:, 0] = _neighbour(ties, rows[:, 0], rng)
    for j in range(2, size):
        member = rows[np.arange(count), rng.integers(j, size=count)]
        rows[:, j] = _neighbour(ties, member, rng)
    return rows


def _neighbour(ties: sparse.csr_array, nodes: Integers, rng: np.random.Generator) -> Integers:
    """Return a neighbour of each node by chance; each has one."""
    degree = np.diff(ties.indptr)[nodes]
    return ties.indices[ties.indptr[nodes] + (rng.random(len(nodes)) * degree).astype(np.int64)]


def _replaced(ties: sparse.csr_array, same: Integers, count: int, rng: np.random.Generator) -> Integers:
    if not len(same):
        return same
    rows = same[rng.integers(len(same), size=count)].copy()
    rows = rng.permuted(rows, axis=1)
    new = _neighbour(ties, rows[:, 1], rng)
    for j in range(1, rows.shape[1]):
        # Invariant: ``new`` is a neighbour of members 1 to j and not the one replaced, or -1, which stays -1.
        tied = np.asarray(ties[new, rows[:, j]]).reshape(-1) > 0
        new = np.where(tied & (new != rows[:, 0]), new, -1)
    rows[:, 0] = new
    return rows
