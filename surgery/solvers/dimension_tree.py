"""Dimension trees: what the updates of different modes share is contracted once (Phan et al. 2013, Ma and Solomonik).

A node is the tensor with some modes contracted. The root has all modes left; a leaf has one. A split into a left and a
right run of modes gives two children, each with the other run contracted. Visiting the leaves in order is one sweep of
alternating least squares: each update of a factor is used from then on. For CP (rank r) the root

    tensor (g, left * right)  x  product of the right factors (g, r, right)  ->  (g, r, left)        one GEMM

costs g r * size for each of its two children, wherever it is split, and makes no copy. A node below it (g, r, ...) has
the rank as a batch axis and costs as much as reading it. The split chosen is the one whose nodes cost least. For
example a convolution kernel (O, 3, 3, I) contracts O to get all of (3, 3, I), and the rest to get O: two GEMMs a sweep,
not four.

Pair operators (all modes but two contracted) come from three runs of modes. Any two modes lie outside of one of the
runs, so that three contractions of the root give all pairs. The same rule holds for the nodes below.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

__all__ = ["Array", "Modes", "Node", "contract", "khatri_rao", "matmul", "pair_nodes", "visit"]

Array = NDArray[Any]
Modes = tuple[int, ...]
_LOOP = 8  # elements in whose time an inner loop starts
_FEW = 2**22  # multiplications of matrices below which a call of NumPy's is quicker than one of torch's
Node = TypeVar("Node")
"""An array or a tensor. Contracting takes a node, its modes and a run of them, and returns the node without the run."""


def visit(
    node: Node,
    modes: Modes,
    sizes: Modes,
    contract: Callable[[Node, Modes, Modes], Node],
    update: Callable[[int, Node], None],
) -> None:
    """Call ``update(mode, leaf)`` for each mode of a node in order; it may change what ``contract`` contracts with.

    ``sizes`` are those of all modes of the root.
    """
    if len(modes) == 1:
        update(modes[0], node)
        return
    place = _place(modes, sizes)
    left, right = modes[:place], modes[place:]
    visit(contract(node, modes, right), left, sizes, contract, update)
    visit(contract(node, modes, left), right, sizes, contract, update)


def pair_nodes(
    node: Node,
    modes: Modes,
    sizes: Sequence[int],
    contract: Callable[[Node, Modes, Modes], Node],
    wanted: set[tuple[int, int]] | None = None,
) -> dict[tuple[int, int], Node]:
    """Return the node with all modes contracted but i and j, for each pair i < j (of those wanted, if given)."""
    if len(modes) == 2:
        return {(modes[0], modes[1]): node}
    wanted = set(combinations(modes, 2)) if wanted is None else set(wanted)
    found: dict[tuple[int, int], Node] = {}
    # Two modes lie in at most two of three runs, so that one run can be contracted without either of them.
    for run in _three_runs(modes, sizes):
        rest = tuple(mode for mode in modes if mode not in run)
        missing = wanted.intersection(combinations(rest, 2)) - found.keys()
        if missing:
            found |= pair_nodes(contract(node, modes, run), rest, sizes, contract, missing)
    return found


@lru_cache(maxsize=4096)
def _place(modes: Modes, sizes: Modes) -> int:
    return _split(tuple(sizes[mode] for mode in modes))[0]


@lru_cache(maxsize=4096)
def _split(sizes: Modes) -> tuple[int, int]:
    """Return where to split, and what all nodes below cost.

    Each part of a split is a child, whose cost is its own and that of the best split below it.

    >>> _split((64, 3, 3, 32))[0]  # 64 | 3 3 32: a leaf of 64, and one node of 288 entries to split again
    1
    """
    if len(sizes) == 1:
        return 0, 0
    costs = []
    for place in range(1, len(sizes)):
        children = sizes[:place], sizes[place:]
        costs.append((sum(_work(child) + _split(child)[1] for child in children), place))
    cost, place = min(costs)
    return place, cost


def _work(sizes: Modes) -> int:
    """Return what a node costs: both of its contractions read it, and its factors are multiplied once for its sibling.

    The unit is an element. Each inner loop, over a last mode, adds as much as some elements. A leaf costs nothing.
    """
    if len(sizes) == 1:
        return 0
    # Khatri-Rao products are made from the last mode on. Example of 3 x 3 x 32: of 96, then of 288 entries; with two
    # passes over the 288 of the node the elements are 960, and the 30 loops over the last mode add 8 each: 1200.
    products = [sizes[first:] for first in range(len(sizes) - 1)]
    passes = [sizes, sizes, *products]
    return sum(math.prod(part) + _LOOP * math.prod(part[:-1]) for part in passes)


def _three_runs(modes: Modes, sizes: Sequence[int]) -> list[Modes]:
    """Return the three runs of modes whose contractions leave least in all, and the one that leaves least first.

    For example (64, 3, 3, 32) is cut as 64 | 3 3 | 32: the pair (3, 32) has no mode in the first.
    """

    def left_by(run: Modes) -> int:
        return math.prod(sizes[mode] for mode in modes if mode not in run)

    cuts = combinations(range(1, len(modes)), 2)
    choices = [(modes[:first], modes[first:second], modes[second:]) for first, second in cuts]
    return sorted(min(choices, key=lambda runs: sum(map(left_by, runs))), key=left_by)


def matmul(left: Array, right: Array) -> Array:
    """Return the product of two batches of matrices, by torch where they are large: it has all threads."""
    if left.size * right.shape[-1] < _FEW:
        return left @ right
    return (torch.from_numpy(left) @ torch.from_numpy(right)).numpy()


def khatri_rao(factors: Sequence[Array]) -> Array:
    """Return the row-wise Kronecker products (g, r, n_1 n_2 ...) of factors (g, r, n_i), the last mode fastest."""
    *others, product = factors
    for factor in reversed(others):  # the products of small last modes first, which are what inner loops run over
        product = np.einsum("gri,grj->grij", factor, product).reshape(*product.shape[:2], -1)
    return product


def contract(node: Array, modes: Modes, run: Modes, factors: Sequence[Array]) -> Array:
    """Return a CP node (g, r, sizes of its modes) without a run of them, contracted with factors (g, r, n_i).

    ``node`` is (g, sizes), the tensor itself, or (g, r, sizes). ``run`` is a run of ``modes`` without gaps.
    """
    # Axes in front of the modes: 1, the batch, for the tensor itself; 2 with the rank. Example: from (g, 64, 3, 3, 32)
    # without the run of modes 2 and 3, ``before`` is (64, 3), ``after`` is empty, and the result is (g, r, 64, 3).
    axes = node.ndim - len(modes)
    start = axes + modes.index(run[0])
    shape, before, after = node.shape[:axes], node.shape[axes:start], node.shape[start + len(run) :]
    weights = khatri_rao([factors[mode] for mode in run])
    groups, rank, count = weights.shape
    if not before:
        found = _from_left(node.reshape(*shape, count, -1), weights)
    elif not after:
        found = _from_right(node.reshape(*shape, -1, count), weights)
    else:
        found = _from_within(node.reshape(*shape, math.prod(before), count, -1), weights)
    return found.reshape(groups, rank, *before, *after)


def _from_left(matrix: Array, weights: Array) -> Array:
    """Return (g, r, b) of (g, c, b), or for one of the rank each, of (g, r, c, b), and (g, r, c)."""
    return matmul(weights, matrix) if matrix.ndim == 3 else weights[:, :, None] @ matrix


def _from_right(matrix: Array, weights: Array) -> Array:
    """Return (g, r, a) of (g, a, c), or (g, r, a, c), and (g, r, c)."""
    return matmul(weights, matrix.swapaxes(1, 2)) if matrix.ndim == 3 else matrix @ weights[..., None]


def _from_within(cube: Array, weights: Array) -> Array:
    """Return (g, r, a, b) of (g, a, c, b), or (g, r, a, c, b), and (g, r, c)."""
    return (weights[:, None] @ cube).swapaxes(1, 2) if cube.ndim == 4 else weights[:, :, None, None] @ cube
