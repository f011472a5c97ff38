"""What a partition costs: the cut, the connectivity, the ratio cut and the normalised cut of its parts.

A hyperedge e of weight w_e that touches lambda_e parts costs

    cut            w_e if lambda_e > 1, else 0: all or nothing, however it is split
    connectivity   w_e (lambda_e - 1): what is sent if its value goes once to each other part
    ratio          w_e (the sum of 1 / |V_p| over the parts p that it touches) if lambda_e > 1; |V_p| is a node weight
    normalised     the same with the volume of V_p, its nodes' degrees added, in the place of |V_p|
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import ArrayLike

from surgery.errors import InputError
from surgery.hypergraph.hypergraph import Floats, Hypergraph, Integers
from surgery.hypergraph.ragged import added

__all__ = ["OBJECTIVES", "Cuts", "Objective", "checked", "counted", "cuts", "part_sizes"]

Objective: TypeAlias = Literal["cut", "connectivity", "ratio", "normalised"]
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True, eq=False)
class Cuts:
    """The costs of one partition; ``hyperedges`` counts those that are cut, ``weights`` are the parts' node weights.

    ``imbalance`` is how much the heaviest part is above an equal share: 0.03 is 3 %.
    """

    cut: float
    connectivity: float
    ratio: float
    normalised: float
    hyperedges: int
    weights: tuple[float, ...]

    @property
    def imbalance(self) -> float:
        """How much the heaviest part is above an equal share of all node weight, as a share of that."""
        total = sum(self.weights)
        return len(self.weights) * max(self.weights) / total - 1 if total else 0.0


def cuts(h: Hypergraph, part: ArrayLike) -> Cuts:
    """Return what a partition costs; ``part`` has the number of each node's part, from 0 on.

    A part of no volume makes the normalised cut infinite if it is cut off, and likewise for the ratio cut. Raises
    ``InputError`` for anything but one number a node.

    >>> h = Hypergraph.from_edges([(0, 1, 2), (2, 3), (3, 4, 5)])
    >>> found = cuts(h, [0, 0, 0, 1, 1, 1])
    >>> found.cut, found.connectivity, round(found.ratio, 3), found.normalised
    (1.0, 1.0, 0.667, 0.5)
    """
    of = checked(h, part)
    parts = int(of.max(initial=0)) + 1
    # (m, parts): which parts each hyperedge touches; the row sums are lambda_e. ``border`` is, for each part, the
    # weight of the cut hyperedges that touch it.
    there = counted(h, of, parts) > 0
    touched = there.sum(axis=1)
    split = touched > 1
    border = np.where(split, h.weights, 0.0) @ there
    weights = part_sizes(of, h.node_weights, parts)
    return Cuts(
        cut=float(h.weights[split].sum()),
        connectivity=float(h.weights @ np.maximum(touched - 1, 0)),
        ratio=_shares(border, weights),
        normalised=_shares(border, part_sizes(of, h.degrees, parts)),
        hyperedges=int(split.sum()),
        weights=tuple(weights.tolist()),
    )


def checked(h: Hypergraph, part: ArrayLike) -> Integers:
    """Return a part for each node as integers; raise if it is not that."""
    of = np.asarray(part)
    if of.shape != (h.nodes,) or (h.nodes and (of.dtype.kind not in "iub" or of.astype(np.int64).min() < 0)):
        what = f"parts of shape {of.shape} and type {of.dtype}"
        raise InputError(what, allowed=f"({h.nodes},), a whole number from 0 on for each node")
    return of.astype(np.int64)


def counted(h: Hypergraph, part: Integers, parts: int) -> Integers:
    """Return how many nodes of each hyperedge each part has, (m, parts)."""
    row = np.repeat(np.arange(h.edges), h.sizes)
    return np.bincount(row * parts + part[h.pins], minlength=h.edges * parts).reshape(h.edges, parts)


def part_sizes(part: Integers, weights: Floats, parts: int) -> Floats:
    """Return the weight of each part."""
    return added(part, weights, parts)


def _shares(border: Floats, size: Floats) -> float:
    """Return the sum of border / size, where nothing of nothing is nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(border > 0, border / size, 0.0).sum())
