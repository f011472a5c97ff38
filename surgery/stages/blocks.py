"""Blocks: operations that no cut may part, as one node each, with what flows between them. All planning works on them.

Two operations that have to stay together, and all that lies on a path between them, are one block: a stage that has the
ends and not the middle would be both before and after another. So blocks are the strongly connected components of the
graph of operations with an edge there and back between those that stay together:

    a -> b -> c, together {a, c}:   a <-> c gives the circle a b c, which is one block
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from surgery.stages.problem import Problem

__all__ = ["Blocks", "Shared", "blocks_of"]


@dataclass(frozen=True)
class Shared:
    """Something that several blocks touch, and its bytes: a value (first its producer, then its readers), or a tensor.

    For a tensor, ``blocks`` are all that read it, in order.
    """

    blocks: tuple[int, ...]
    bytes: int


@dataclass(frozen=True, eq=False)
class Blocks:
    """A graph without circles: block b comes after all of ``before[b]``, and these have lower numbers.

    ``seconds`` has the time of each block. ``values`` are those that one block gives and another reads.
    """

    block_of: tuple[int, ...]
    before: tuple[tuple[int, ...], ...]
    after: tuple[tuple[int, ...], ...]
    seconds: tuple[float, ...]
    values: tuple[Shared, ...]
    tensors: tuple[Shared, ...]

    def __len__(self) -> int:
        return len(self.seconds)


def blocks_of(problem: Problem) -> Blocks:
    """Return the blocks of a problem, numbered in the order of the graph as far as that is possible."""
    network = problem.network
    readers = {value: found for value, found in network.readers.items() if value in network.producer}
    edges = {(network.producer[value], reader) for value, found in readers.items() for reader in found}
    block_of = _numbered(len(network.operations), edges, _groups(problem))
    between = sorted({(block_of[a], block_of[b]) for a, b in edges if block_of[a] != block_of[b]})
    count = max(block_of, default=-1) + 1
    values = []
    for value, found in readers.items():
        first = block_of[network.producer[value]]
        later = tuple(sorted({block_of[reader] for reader in found} - {first}))
        if later:
            values.append(Shared((first, *later), network.values[value].bytes))
    seconds = np.bincount(np.array(block_of, int), np.array(problem.seconds, float), count)
    return Blocks(
        block_of=block_of,
        before=_lists(count, ((b, a) for a, b in between)),
        after=_lists(count, between),
        seconds=tuple(float(time) for time in seconds),
        values=tuple(values),
        tensors=_tensors(problem, block_of),
    )


def _groups(problem: Problem) -> list[Sequence[int]]:
    groups: list[Sequence[int]] = [sorted(group) for group in problem.network.together]
    if problem.ties == "together":
        groups += _readers_by_key(problem).values()
    return groups


def _readers_by_key(problem: Problem) -> dict[Hashable, list[int]]:
    network, found = problem.network, dict[Hashable, list[int]]()
    for number, operation in enumerate(network.operations):
        for key in dict.fromkeys(network.keys.get(name, name) for name in operation.tensors):
            found.setdefault(key, []).append(number)
    return found


def _tensors(problem: Problem, block_of: Sequence[int]) -> tuple[Shared, ...]:
    network, size = problem.network, dict[Hashable, int]()
    for name in dict.fromkeys(name for operation in network.operations for name in operation.tensors):
        key = network.keys.get(name, name)
        size[key] = max(size.get(key, 0), network.bytes_of.get(name, 0))
    readers = _readers_by_key(problem).items()
    return tuple(Shared(tuple(sorted({block_of[n] for n in numbers})), size[key]) for key, numbers in readers)


def _numbered(count: int, edges: Iterable[tuple[int, int]], groups: Iterable[Sequence[int]]) -> tuple[int, ...]:
    """Return the block of each operation; blocks are in topological order, of those ready the first in the graph."""
    # A group 2, 5, 9 gives 2 <-> 5 <-> 9: four edges in place of six for all pairs make it strongly connected, too.
    rings = [pair for group in groups for a, b in itertools.pairwise(group) for pair in ((a, b), (b, a))]
    edges = set(edges)
    rows, columns = np.array([*edges, *rings], int).reshape(-1, 2).T
    graph = csr_array((np.ones(len(rows)), (rows, columns)), shape=(count, count))
    labels = connected_components(graph, connection="strong")[1].tolist() if count else []
    first = {label: number for number, label in reversed(list(enumerate(labels)))}
    found = [first[label] for label in labels]
    between = {(found[a], found[b]) for a, b in edges if found[a] != found[b]}
    # Each component is called after its first operation. There are no circles between components, so that each of them
    # becomes ready once all before it are numbered, and none is left over.
    waits, after = dict.fromkeys(found, 0), dict[int, list[int]]()
    for a, b in between:
        waits[b] += 1
        after.setdefault(a, []).append(b)
    ready, order = [one for one, number in waits.items() if not number], dict[int, int]()
    heapq.heapify(ready)
    while ready:
        one = heapq.heappop(ready)
        order[one] = len(order)
        for other in after.get(one, ()):
            waits[other] -= 1
            if not waits[other]:
                heapq.heappush(ready, other)
    return tuple(order[one] for one in found)


def _lists(count: int, pairs: Iterable[tuple[int, int]]) -> tuple[tuple[int, ...], ...]:
    lists: list[list[int]] = [[] for _ in range(count)]
    for a, b in pairs:
        lists[a].append(b)
    return tuple(tuple(found) for found in lists)
