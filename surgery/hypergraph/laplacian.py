"""The Laplacians of a hypergraph: the clique expansion's matrix, and the Laplacian tensor's polynomial, both sparse.

The tensor of a hypergraph whose hyperedges have k nodes each is never formed. What is needed of it is the form

    f(x) = sum_e w_e (sum_{i in e} x_i^k - k prod_{i in e} x_i)
    df/dx_i = k sum_{e at i} w_e (x_i^(k-1) - prod_{j in e, j != i} x_j)
    d2f/dx_i dx_j = -k sum_{e at i, j} w_e prod_{l in e, l != i, j} x_l,      d2f/dx_i^2 = k (k-1) d_i x_i^(k-2)

in time proportional to the pins (Maurya and Ravindran, arXiv 2011.07683). Around the constant vector f is the clique
expansion: f(1 + t y) = t^2 (k / 2) sum_e w_e sum_{i<j in e} (y_i - y_j)^2 + O(t^3). Far from it, f is no cut: for even
k a hyperedge of plus and minus ones costs nothing if the minus ones are even in number. For odd k, f is odd in x and
has no least value; ``absolute`` sums |each hyperedge's term| in its place, which is not smooth.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

from surgery.hypergraph.hypergraph import Floats, Hypergraph, Integers
from surgery.hypergraph.ragged import added

__all__ = ["Form", "clique", "pairs"]


def pairs(h: Hypergraph) -> sparse.csr_array:
    """Return the clique expansion's weights (n, n): each hyperedge gives each of its pairs w_e / (|e| - 1).

    So the row sums are the degrees in hyperedges of two nodes or more.

    >>> pairs(Hypergraph.from_edges([(0, 1, 2), (1, 2)])).toarray()
    array([[0. , 0.5, 0.5],
           [0.5, 0. , 1.5],
           [0.5, 1.5, 0. ]])
    """
    each = np.where(h.sizes > 1, h.weights / np.maximum(h.sizes - 1, 1), 0.0)
    # H^T diag(w_e / (|e| - 1)) H, whose diagonal says nothing of pairs.
    found = h.around @ sparse.diags_array(each) @ h.incidence
    found.setdiag(0.0)
    found.eliminate_zeros()
    return found.tocsr()


def clique(h: Hypergraph) -> sparse.csr_array:
    """Return the Laplacian matrix of the clique expansion: degrees minus ``pairs``; any sizes."""
    weights = pairs(h)
    return (sparse.diags_array(weights.sum(axis=1)) - weights).tocsr()


@dataclass(frozen=True, eq=False)
class Form:
    """The polynomial f over the hyperedges ``table`` (m, k) of weights (m,); with ``absolute``, sum of |terms|."""

    table: Integers
    weights: Floats
    nodes: int
    absolute: bool = False

    @property
    def order(self) -> int:
        """The order k of the tensor: how many nodes a hyperedge has."""
        return self.table.shape[1]

    def terms(self, x: Floats) -> Floats:
        """Return each hyperedge's term of f, without its weight (m,)."""
        at = x[self.columns]
        return _power(at, self.order).sum(axis=0) - self.order * at.prod(axis=0)

    def __call__(self, x: Floats) -> float:
        """Return f(x)."""
        terms = self.terms(x)
        return float(self.weights @ (np.abs(terms) if self.absolute else terms))

    @cached_property
    def columns(self) -> Integers:
        """The table, turned (k, m): so the loops over hyperedges are the inner ones."""
        return np.ascontiguousarray(self.table.T)

    def with_gradient(self, x: Floats) -> tuple[float, Floats]:
        """Return f(x) and its gradient (n,)."""
        at, k = x[self.columns], self.order
        powers, others = _power(at, k - 1), _without_each(at)
        # sum x_i^k - k prod x_i, and for each entry k w_e (x_i^(k-1) - the product of the others).
        terms = (powers * at).sum(axis=0) - k * (others[0] * at[0])
        weights = self.weights * np.sign(terms) if self.absolute else self.weights
        powers -= others
        powers *= k * weights
        return float(weights @ terms), added(self.columns.ravel(), powers.ravel(), self.nodes)

    def hessian(self, x: Floats) -> sparse.csr_array:
        """Return the second derivatives (n, n)."""
        # Of sum x_i^k - k prod x_i: -k times the product of the others for a pair, k (k - 1) x_i^(k-2) on the diagonal.
        at, k = x[self.table], self.order
        weights = self.weights * np.sign(self.terms(x)) if self.absolute else self.weights
        rows: list[Integers] = []
        columns: list[Integers] = []
        values: list[Floats] = []
        for i in range(k):
            for j in range(i + 1, k):
                rest = np.delete(at, (i, j), axis=1).prod(axis=1)
                rows.append(self.table[:, i])
                columns.append(self.table[:, j])
                values.append(-k * weights * rest)
        shape = (self.nodes, self.nodes)
        places = (np.concatenate(rows), np.concatenate(columns))
        upper = sparse.coo_array((np.concatenate(values), places), shape=shape).tocsr()
        curves = (k * (k - 1) * weights)[:, None] * _power(at, k - 2)
        diagonal = added(self.table.ravel(), curves.ravel(), self.nodes)
        return (upper + upper.T + sparse.diags_array(diagonal)).tocsr()


def _power(at: Floats, exponent: int) -> Floats:
    """Return at**exponent by products, which is much quicker than a power for small exponents."""
    found = np.ones_like(at) if exponent == 0 else at.copy()
    for _ in range(exponent - 1):
        found *= at
    return found


def _without_each(at: Floats) -> Floats:
    """Return the product of each column without each of its entries (k, m)."""
    # Products from above times products from below, so that nothing is divided by an entry that is 0.
    # Example: (a, b, c) has 1, a, ab from above and bc, c, 1 from below.
    found = np.ones_like(at)
    for i in range(1, len(at)):
        np.multiply(found[i - 1], at[i - 1], out=found[i])
    below = at[-1].copy()
    for i in range(len(at) - 2, -1, -1):
        found[i] *= below
        below *= at[i]
    return found
