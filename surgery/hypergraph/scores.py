"""Scores of pairs of nodes from the clique expansion: how near two nodes are. High means near.

W are the expansion's weights, d its row sums, Z the neighbours that two nodes share:

    neighbours   |Z|, the number of nodes that both are tied to
    pairs        W_uv, the weight of what ties the two already
    resource     sum over Z of W_uz W_zv / d_z, what u sends to v through them (resource allocation)
    hpra         W_uv + the same: hyperedge prediction by resource allocation, one hop (Kumar and others 2020)
    katz         sum over l > 0 of (b W)^l at u, v, with b half of the largest that converges (Katz 1953)

The matrices of node pairs are never formed: only the pairs that are asked for are computed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse
from scipy.sparse import linalg

from surgery.hypergraph.hypergraph import Floats, Integers

__all__ = ["PAIRS", "PairScore"]

PairScore = Callable[[sparse.csr_array, Integers, Integers], Floats]
_CHUNK = 50_000  # pairs whose shared neighbours are computed at a time
_BLOCK = 256  # nodes whose walks are computed at a time
_HOPS = 24  # walks of more steps weigh less than 1e-7 of the first, at half of the largest b


def _neighbours(weights: sparse.csr_array, u: Integers, v: Integers) -> Floats:
    ties = weights.copy()
    ties.data[:] = 1.0
    return _shared(ties, np.ones(weights.shape[0]), u, v)


def _pairs(weights: sparse.csr_array, u: Integers, v: Integers) -> Floats:
    return np.asarray(weights[u, v]).reshape(-1) if len(u) else np.zeros(0)


def _resource(weights: sparse.csr_array, u: Integers, v: Integers) -> Floats:
    degrees = weights.sum(axis=1)
    return _shared(weights, 1 / np.where(degrees > 0, degrees, 1.0), u, v)


def _hpra(weights: sparse.csr_array, u: Integers, v: Integers) -> Floats:
    return _pairs(weights, u, v) + _resource(weights, u, v)


def _katz(weights: sparse.csr_array, u: Integers, v: Integers) -> Floats:
    if not weights.nnz:
        return np.zeros(len(u))
    top = _top(weights)
    step = weights * (0.5 / top)
    nodes, place = np.unique(u, return_inverse=True)
    found = np.empty(len(u))
    for first in range(0, len(nodes), _BLOCK):
        block = nodes[first : first + _BLOCK]
        # Invariant: ``walks`` is (b W)^l for the block's rows, ``total`` the sum up to l.
        walks = step[block].toarray()
        total = walks.copy()
        for _ in range(_HOPS - 1):
            walks = walks @ step
            total += walks
        own = np.flatnonzero((place >= first) & (place < first + _BLOCK))
        found[own] = total[place[own] - first, v[own]]
    return found


def _top(weights: sparse.csr_array) -> float:
    """Return the largest eigenvalue; no other is larger in absolute value, since no weight is negative."""
    if weights.shape[0] <= _BLOCK:
        return float(np.linalg.eigvalsh(weights.toarray())[-1])
    start = np.random.default_rng(0).random(weights.shape[0])
    return float(linalg.eigsh(weights, 1, which="LA", v0=start, tol=1e-6, return_eigenvectors=False)[0])


def _shared(weights: sparse.csr_array, worth: Floats, u: Integers, v: Integers) -> Floats:
    """Return the sum over z of W_uz W_zv worth_z for each pair."""
    sent = (weights * worth[None, :]).tocsr()
    parts = [slice(first, first + _CHUNK) for first in range(0, len(u), _CHUNK)]
    found = [np.asarray(sent[u[part]].multiply(weights[v[part]]).sum(axis=1)).reshape(-1) for part in parts]
    return np.concatenate(found) if found else np.zeros(0)


PAIRS: dict[str, PairScore] = {
    "neighbours": _neighbours,
    "pairs": _pairs,
    "resource": _resource,
    "hpra": _hpra,
    "katz": _katz,
}
