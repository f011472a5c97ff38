"""The Fiedler vector of a hypergraph: where the Laplacian's form is least across the constant vector.

``clique``    the second solution of L x = value D x, L = D - W the clique expansion's Laplacian matrix; any sizes
``tensor``    the least f(x) / |x|^k across the constant vector, f the Laplacian tensor's form; one size k, even (or 2)
``absolute``  the same for the sum of the absolute terms of f; one size k, odd ones too; not smooth, so less exact

Without D the matrix's vector rests on a few nodes of least degree. The tensor's vector is found by L-BFGS on the
projected quotient, from the clique expansion's vector: from random starts it ends near chance. What it
finds is a critical point of the *constrained* problem,

    L x^(k-1) = value x + shift 1,

and an eigenvector of the tensor only where the shift is 0. A lower value is no better partition: see the example
``examples/hypergraph_trap.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import numpy as np
from scipy import sparse
from scipy.optimize import minimize
from scipy.sparse import linalg

from surgery.errors import InputError
from surgery.hypergraph.hypergraph import Floats, Hypergraph
from surgery.hypergraph.laplacian import Form, clique

__all__ = ["KINDS", "VECTORS", "Fiedler", "Kind", "Vector", "fiedler"]

Vector: TypeAlias = Literal["clique", "tensor", "absolute"]
VECTORS: tuple[Vector, ...] = get_args(Vector)
Kind: TypeAlias = Literal["minimum", "saddle", "flat", "unfinished", "not smooth"]
KINDS: tuple[Kind, ...] = get_args(Kind)

_DENSE = 300  # nodes: up to there a dense eigendecomposition costs no more
_CRITICAL = 1e-4  # relative residual of a critical point
_FLAT = 1e-3  # curvature, relative to the largest, that counts as none
_MOST_ORDER = 64
_STEPS, _ESCAPES = 1000, 3
_SLOPE = 1e-7  # in entries of the gradient of (f / n) where entries of x are about 1


@dataclass(frozen=True, eq=False)
class Fiedler:
    """A Fiedler vector of unit length (n,), its sum of cubes not negative; 0 at nodes that no hyperedge ties.

    It lies across the constant vector; that of the clique expansion, across the degrees.

    ``value`` is the form at the vector, ``shift`` the part of L x^(k-1) along the constant vector. ``residual`` is the
    length of the gradient on the sphere across the constant vector, relative to that of the degrees' d_i x_i^(k-1).
    ``eigen_residual`` is that of L x^(k-1) - value x likewise: small only where the vector is an eigenvector.
    ``kind`` says what is known of the point: a "minimum" curves up all around, a "saddle" curves down somewhere,
    a "flat" one curves up but for some directions in which it hardly curves; "unfinished" is no critical point to 1e-4;
    "not smooth" tells that the absolute form has no curvature to judge by. ``steps`` counts the steps of the solver.
    """

    vector: Floats
    value: float
    shift: float
    residual: float
    eigen_residual: float
    kind: Kind
    steps: int
    method: Vector


def fiedler(h: Hypergraph, method: Vector = "clique") -> Fiedler:
    """Return the Fiedler vector by the clique expansion, or by the Laplacian tensor; what ties no two nodes is ignored.

    Raises ``InputError`` for fewer than two nodes, for mixed sizes but with "clique", and for odd sizes with "tensor",
    whose form then has no least value. The tensor: Maurya and Ravindran, arXiv 2011.07683; even orders, by another
    solver: Chen, Qi and Zhang, "The Fiedler vector of a Laplacian tensor for hypergraph partitioning".

    >>> h = Hypergraph.from_edges([(0, 1, 2, 3), (3, 4, 5, 6), (0, 1, 2, 4)])
    >>> found = fiedler(h, "tensor")
    >>> found.kind, bool(found.residual < 1e-4)
    ('minimum', True)
    """
    if method not in VECTORS:
        raise InputError(f"method {method!r}", allowed=", ".join(VECTORS))
    if h.nodes < 2:
        raise InputError(f"a hypergraph of {h.nodes} nodes", allowed="two nodes or more")
    ties = h.subset((h.sizes > 1) & (h.weights > 0))
    tied = ties.degrees > 0
    if not tied.any():
        tied[:] = True
    found = _of_clique(ties.inside(tied)) if method == "clique" else _of_tensor(ties.inside(tied), method)
    vector = np.zeros(h.nodes)
    vector[tied] = found.vector
    return replace(found, vector=vector)


def _of_clique(h: Hypergraph) -> Fiedler:
    matrix = clique(h)
    vector, steps = _second(matrix)
    return _judged(vector, matrix @ vector, matrix.diagonal() * vector, "clique", "minimum", steps)


def _second(matrix: sparse.csr_array) -> tuple[Floats, int]:
    """Return the unit vector x of L x = value D x with the second value, and the products that it took."""
    # With y = sqrt(D) x this is the second eigenvector of L / sqrt(D) / sqrt(D), whose values lie in 0 .. 2.
    nodes, root = matrix.shape[0], np.sqrt(matrix.diagonal())
    root[root == 0] = 1.0
    scaled = (sparse.diags_array(1 / root) @ matrix @ sparse.diags_array(1 / root)).tocsr()
    first = root / np.linalg.norm(root)
    turned = _Turned(lambda x: 2 * x - scaled @ x, [first])
    start = np.random.default_rng(0).standard_normal(nodes)
    if nodes <= _DENSE:
        # The first eigenvector's value goes from 0 to 4, above all others, so that the second comes first.
        vector = np.linalg.eigh(scaled.toarray() + 4 * np.outer(first, first))[1][:, 0]
    else:
        try:
            vector = linalg.eigsh(turned.operator(), 1, which="LA", v0=start, tol=1e-9, maxiter=100)[1][:, 0]
        except linalg.ArpackNoConvergence:  # the gap is small, as in long chains: these factor cheaply
            # Of the two least, the one across the known first is wanted. A shift below 0 leaves a
            # definite matrix to factor.
            both = linalg.eigsh(scaled.tocsc(), 2, sigma=-1e-7, which="LM", v0=start)[1]
            vector = both[:, int(np.argmin(np.abs(first @ both)))]
    vector = turned.across(vector) / root
    return vector / np.linalg.norm(vector), turned.products


class _Turned:
    """A symmetric operator between projections across some orthonormal vectors; counts its products."""

    def __init__(self, product: Callable[[Floats], Floats], left_out: list[Floats]) -> None:
        self.product, self.left_out, self.products = product, left_out, 0

    def across(self, x: Floats) -> Floats:
        for vector in self.left_out:
            x = x - (vector @ x) * vector
        return x

    def __call__(self, x: Floats) -> Floats:
        self.products += 1
        return self.across(self.product(self.across(x.reshape(-1))))

    def operator(self) -> linalg.LinearOperator:
        nodes = len(self.left_out[0])
        return linalg.LinearOperator((nodes, nodes), matvec=self, dtype=np.float64)


def _of_tensor(h: Hypergraph, method: Vector) -> Fiedler:
    table = h.table()
    if method == "tensor" and table.shape[1] % 2:
        what = f"hyperedges of {h.say_sizes()}: a form of odd order has no least value"
        raise InputError(what, allowed="an even size", next_step='take method="absolute" or "clique"')
    if table.shape[1] > _MOST_ORDER:
        what = f"hyperedges of {h.say_sizes()}: powers of that order are no numbers"
        raise InputError(what, allowed=f"a size up to {_MOST_ORDER}", next_step='take method="clique"')
    form = Form(table, h.weights, h.nodes, absolute=method == "absolute")
    start = _second(clique(h))[0]
    start -= start.mean()
    vector, steps = _descended(form, start / np.linalg.norm(start))
    for _ in range(_ESCAPES):
        kind, down = _curved(form, vector)
        if kind != "saddle":
            break
        other, more = _descended(form, vector + 0.1 * down)
        steps += more
        if form(other) >= form(vector):
            break
        vector = other
    slope = form.with_gradient(vector)[1] / form.order
    own = h.degrees * vector ** (form.order - 1)
    return _judged(vector, slope, own, method, _curved(form, vector)[0], steps)


def _descended(form: Form, start: Floats) -> tuple[Floats, int]:
    """Return the unit vector across the constant one at which L-BFGS ends, and its steps."""
    # In units in which entries are about 1 and the value about a degree, so that one tolerance fits all sizes.
    scale = float(np.sqrt(form.nodes))

    def quotient(x: Floats) -> tuple[float, Floats]:
        x = x - x.mean()
        # f is homogeneous of order k: x . grad f = k f. With |unit|^2 = n, taking k f / n times ``unit`` from the
        # gradient leaves what lies along the sphere, and taking the mean what lies across the constant vector.
        length = float(np.linalg.norm(x))
        unit = x * (scale / length)
        value, slope = form.with_gradient(unit)
        slope -= (form.order * value / form.nodes) * unit
        return value / form.nodes, (slope - slope.mean()) * (scale / length / form.nodes)

    options = {"maxiter": _STEPS, "maxfun": 2 * _STEPS, "ftol": 1e-9 if form.absolute else 0.0, "gtol": _SLOPE}
    found = minimize(quotient, start * scale, jac=True, method="L-BFGS-B", options=options)
    x = found.x - found.x.mean()
    return x / np.linalg.norm(x), int(found.nit)


def _curved(form: Form, vector: Floats) -> tuple[Kind, Floats]:
    """Return how the form curves on the sphere across the constant vector, and the direction in which it does least."""
    if form.absolute:
        return "not smooth", vector
    # On the unit sphere the curvature is that of the Hessian less x . grad f = k f. ``top``, the largest sum
    # of a row's magnitudes, bounds the Hessian's eigenvalues, so that the least curvature is ``top`` less
    # the largest eigenvalue here.
    matrix, bend = form.hessian(vector), form.order * form(vector)
    top = float(abs(matrix).sum(axis=1).max()) or 1.0
    nodes = form.nodes
    if nodes == 2:
        return "minimum", vector
    turned = _Turned(lambda x: (top + bend) * x - matrix @ x, [np.full(nodes, nodes**-0.5), vector])
    if nodes <= _DENSE:
        across = np.eye(nodes) - sum(np.outer(x, x) for x in turned.left_out)
        dense = across @ (np.eye(nodes) * (top + bend) - matrix.toarray()) @ across
        values, vectors = np.linalg.eigh(dense)
        most, down = values[-1], vectors[:, -1]
    else:
        start = np.random.default_rng(0).standard_normal(nodes)
        found = linalg.eigsh(turned.operator(), 1, which="LA", v0=start, tol=1e-4)
        most, down = found[0][0], found[1][:, 0]
    least = (top - most) / top
    return "saddle" if least < -_FLAT else "flat" if least < _FLAT else "minimum", down


def _judged(vector: Floats, slope: Floats, own: Floats, method: Vector, kind: Kind, steps: int) -> Fiedler:
    """Return the vector with its residuals; ``slope`` is L x^(k-1), ``own`` the part of it that the degrees give."""
    scale = max(float(np.linalg.norm(own)), 1e-300)
    if method == "clique":
        value, shift = float(vector @ slope) / max(float(vector @ own), 1e-300), 0.0
        off = slope - value * own
    else:
        value, shift = float(vector @ slope), float(slope.mean())
        off = slope - value * vector
    residual, eigen_residual = (float(np.linalg.norm(rest)) / scale for rest in (off - shift, off))
    if residual > _CRITICAL and kind != "not smooth":
        kind = "unfinished"
    signed = -vector if (vector**3).sum() < 0 else vector
    return Fiedler(signed, value, shift, residual, eigen_residual, kind, steps, method)
