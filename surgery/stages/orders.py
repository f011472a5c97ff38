"""Orders: topological orders of the blocks, of different kinds; dynamic programming cuts each of them."""

from __future__ import annotations

import heapq
import random
import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import ArpackError, eigsh

from surgery.stages.blocks import Blocks

__all__ = ["fiedler", "orders", "sorted_by"]

_DENSE = 300


def orders(blocks: Blocks, *, seeds: int = 8) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the names of the orders and the orders, as numbers of blocks; the graph's own comes first.

    Of the blocks that are ready, the next is that of the least number, of the least entry of the Fiedler vector (or
    of its negative), of the latest to become ready (depth first), of the greatest number from the end backwards, or
    of the least random number.
    """
    numbers = list(range(len(blocks)))
    yield "graph", tuple(numbers)
    yield "depth first", _depth_first(blocks)
    yield "reverse", _reverse(blocks)
    vector = fiedler(blocks)
    yield "spectral", sorted_by(blocks, vector.tolist())
    yield "spectral, reversed", sorted_by(blocks, (-vector).tolist())
    for seed in range(seeds):
        draw = random.Random(seed)
        yield f"random {seed}", sorted_by(blocks, [draw.random() for _ in numbers])


def sorted_by(blocks: Blocks, keys: Sequence[float]) -> tuple[int, ...]:
    """Return the topological order that always takes the ready block of the least key, and of those the first."""
    waits = [len(before) for before in blocks.before]
    ready = [(keys[block], block) for block, number in enumerate(waits) if not number]
    heapq.heapify(ready)
    order = []
    while ready:
        block = heapq.heappop(ready)[1]
        order.append(block)
        for after in blocks.after[block]:
            waits[after] -= 1
            if not waits[after]:
                heapq.heappush(ready, (keys[after], after))
    return tuple(order)


def _depth_first(blocks: Blocks) -> tuple[int, ...]:
    waits = [len(before) for before in blocks.before]
    ready, order = [block for block, number in reversed(list(enumerate(waits))) if not number], []
    while ready:
        block = ready.pop()
        order.append(block)
        for after in reversed(blocks.after[block]):
            waits[after] -= 1
            if not waits[after]:
                ready.append(after)
    return tuple(order)


def _reverse(blocks: Blocks) -> tuple[int, ...]:
    """Return the order in which each block comes as late as the graph lets it, of those that are free the last."""
    waits = [len(after) for after in blocks.after]
    ready, order = [block for block, number in enumerate(waits) if not number], []
    while ready:
        block = ready.pop()
        order.append(block)
        for before in blocks.before[block]:
            waits[before] -= 1
            if not waits[before]:
                ready.append(before)
    return tuple(reversed(order))


def fiedler(blocks: Blocks) -> NDArray[np.float64]:
    """Return the Fiedler vector of the clique expansion: of a value with k blocks, each pair weighs bytes / (k - 1).

    Its sign is that with which the blocks go up in the order of the graph, on the whole.
    """
    count = len(blocks)
    pairs, weights = [], []
    scale = max((value.bytes for value in blocks.values), default=1) or 1
    for value in blocks.values:
        inside = value.blocks
        weight = (value.bytes / scale + 1e-6) / (len(inside) - 1)
        # A value of very many readers adds a star instead: k^2 pairs would take too long.
        found = [(a, b) for i, a in enumerate(inside[: 1 if len(inside) > 64 else None]) for b in inside[i + 1 :]]
        pairs += found
        weights += [weight] * len(found)
    if count < 3 or not pairs:
        return np.arange(count, dtype=float)
    # The Laplacian D - W: W has the weights of all pairs both ways, D the sums of its rows.
    rows, columns = np.array(pairs, int).T
    half = csr_array((np.array(weights), (rows, columns)), shape=(count, count))
    # A weak path holds together what nothing else does: two graphs side by side have no Fiedler vector.
    half = half + csr_array(([1e-9] * (count - 1), (range(count - 1), range(1, count))), shape=(count, count))
    near = half + half.T
    vector = _second(diags_array(near.sum(1)) - near, count)
    # sum of v_b (b - mean of b) >= 0: entries go up along the order of the graph.
    return vector if vector @ np.arange(count) >= vector.sum() * (count - 1) / 2 else -vector


def _second(laplacian: csr_array, count: int) -> NDArray[np.float64]:
    if count <= _DENSE:
        return np.asarray(np.linalg.eigh(laplacian.toarray())[1][:, 1])
    # The Fiedler vector of a path, which most networks are nearly.
    start = np.cos(np.pi * (np.arange(count) + 0.5) / count)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # A shift below 0 leaves a definite matrix to factor. Of the two least eigenvalues the larger one is wanted.
            found = eigsh(laplacian.tocsc() + 1e-12 * diags_array(np.ones(count)), 2, sigma=-1e-8, v0=start)
    except (ArpackError, RuntimeError):
        return np.arange(count, dtype=float)
    return np.asarray(found[1][:, int(np.argmax(found[0]))])
