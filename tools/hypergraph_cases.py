"""The hypergraphs that the bench partitions: planted ones, and the real ones that the package hypergraphx brings along.

The peer, Mt-KaHyPar, is imported when it is first asked for; neither package is a dependency.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from surgery.hypergraph import Hypergraph

__all__ = ["Case", "data_folder", "kahypar", "planted", "planted_cases", "real_cases"]

Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Case:
    """A hypergraph to partition, and the parts that are known for its nodes, if they are."""

    name: str
    h: Hypergraph
    labels: Labels | None = None


def planted(
    nodes: int, size: int, edges: int, *, noise: float, seed: int, even: bool = False
) -> tuple[Hypergraph, Labels]:
    """Return hyperedges inside of two halves, but for a share ``noise`` over all nodes, and each node's half.

    With ``even`` that share is split exactly in two: what the tensor's form cannot see.
    """
    rng = np.random.default_rng(seed)
    half = np.arange(nodes) % 2
    sides = [np.flatnonzero(half == side) for side in (0, 1)]
    rows: set[tuple[int, ...]] = set()
    while len(rows) < edges:
        if rng.random() >= noise:
            row = rng.choice(sides[rng.integers(2)], size, replace=False)
        elif even:
            row = np.concatenate([rng.choice(side, size // 2, replace=False) for side in sides])
        else:
            row = rng.choice(nodes, size, replace=False)
        rows.add(tuple(sorted(row.tolist())))
    return Hypergraph.from_edges(sorted(rows), nodes=nodes), half


def planted_cases(seeds: int, *, quick: bool) -> Iterator[tuple[str, list[Case]]]:
    """Yield a family's name and its hypergraphs, one a seed."""
    families = [(200, 3, 0.5, False), (200, 4, 0.6, False), (200, 4, 0.5, True)]
    if not quick:
        families += [(1000, 3, 0.5, False), (1000, 4, 0.6, False), (1000, 4, 0.5, True)]
        families += [(5000, 3, 0.55, False), (5000, 4, 0.55, False)]
    for nodes, size, noise, even in families:
        name = f"n={nodes} k={size}, {noise:.0%} {'split evenly' if even else 'by chance'}"
        few = min(seeds, 2) if nodes > 1000 else seeds
        made = [planted(nodes, size, 3 * nodes, noise=noise, seed=seed, even=even) for seed in range(few)]
        yield name, [Case(name, h, labels) for h, labels in made]


def data_folder(given: Path | None) -> Path:
    """Return the folder in which hypergraphx was installed, with its ``tests`` and ``tutorials``."""
    return given or Path(str(importlib.metadata.distribution("hypergraphx").locate_file("")))


def real_cases(folder: Path, *, quick: bool) -> Iterator[Case]:
    """Yield the real hypergraphs: distinct hyperedges of weight 1 over the nodes that they have."""
    school, labels = _from_json(folder / "tests/test_data/hs/hs.json")
    work, departments = _from_json(folder / "tests/test_data/workplace/workplace.json")
    yield _kept("high school, k=3", school, labels, size=3)
    yield _kept("high school, k=2-5", school, labels)
    yield _kept("workplace, k=2-4", work, departments)
    if not quick:
        baskets = folder / "tutorials/_example_data"
        yield _kept("justices, k=2-9", _from_lines(baskets / "justice_data/hyperedges.txt"), None)
        for size in (3, 4):
            walmart = _from_lines(baskets / "walmart_data/walmart-trips-reduced.txt")
            yield _kept(f"walmart trips, k={size}", walmart, None, size=size)


def _from_json(path: Path) -> tuple[list[tuple[int, ...]], dict[int, str]]:
    rows = json.loads(path.read_text())
    edges = [tuple(row["interaction"]) for row in rows if row.get("type") == "edge"]
    return edges, {row["idx"]: row["metadata"].get("class", "") for row in rows if row.get("type") == "node"}


def _from_lines(path: Path) -> list[tuple[int, ...]]:
    lines = (line.replace(",", " ").split() for line in path.read_text().splitlines())
    return [tuple(set(map(int, line))) for line in lines if line]


def _kept(name: str, edges: list[tuple[int, ...]], classes: dict[int, str] | None, size: int | None = None) -> Case:
    sets = sorted({tuple(sorted(edge)) for edge in edges if len(edge) == size or (size is None and len(edge) > 1)})
    names, place = np.unique(np.concatenate([np.array(row) for row in sets]), return_inverse=True)
    ends = np.cumsum([len(row) for row in sets])[:-1]
    h = Hypergraph.from_edges([row.tolist() for row in np.split(place, ends)], nodes=len(names))
    labels = None if classes is None else np.unique([classes[n] for n in names.tolist()], return_inverse=True)[1]
    return Case(name, h, labels)


@cache
def _kahypar() -> tuple[Any, Any]:
    module = importlib.import_module("mtkahypar")
    return module, module.initialize(1)


def kahypar(h: Hypergraph, parts: int, *, seed: int) -> tuple[Labels, float]:
    """Return Mt-KaHyPar's parts for the cut (default preset, 3 %, one thread) and the seconds of partitioning alone."""
    module, library = _kahypar()
    module.set_seed(seed)
    context = library.context_from_preset(module.PresetType.DEFAULT)
    context.set_partitioning_parameters(parts, 0.03, module.Objective.CUT)
    rows = [row.tolist() for row in np.split(h.pins, h.starts[1:-1])]
    graph = library.create_hypergraph(context, h.nodes, h.edges, rows, [1] * h.nodes, h.weights.astype(int).tolist())
    seconds, found = timed(lambda: graph.partition(context))
    return np.array(found.get_partition()), seconds


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of one run, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result
