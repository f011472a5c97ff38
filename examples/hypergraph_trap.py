"""The trap of the Laplacian tensor: of two partitions, the one with the lower value cuts nearly all hyperedges.

    python examples/hypergraph_trap.py

400 nodes are in one of two communities, and of one of two types, all four combinations alike. 1,200 hyperedges of four
nodes mostly keep to one community, and most take two nodes of each type. The tensor's form

    f(x) = sum_e w_e (sum_{i in e} x_i^4 - 4 prod_{i in e} x_i)

costs nothing where a hyperedge is split two to two. So the types look better to it than the communities, although that
partition cuts nearly everything. Minimised from either one, it stays there: f bounds no cut from below.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in examples/ only

from surgery import hypergraph as hg

NODES, EDGES = 400, 1200
STRAY, MIXED = 0.22, 0.17  # shares of the hyperedges that keep to no community, and to no two of each type


def crossed(seed: int = 0) -> tuple[hg.Hypergraph, dict[str, np.ndarray]]:
    """Return the hypergraph, and each node's community and type."""
    rng = np.random.default_rng(seed)
    of = {"communities": np.arange(NODES) % 2, "types": np.arange(NODES) // 2 % 2}
    rows: set[tuple[int, ...]] = set()
    while len(rows) < EDGES:
        side = rng.integers(2) if rng.random() > STRAY else None
        there = np.flatnonzero((of["communities"] == side) | (side is None))
        if rng.random() < MIXED:
            row = rng.choice(there, 4, replace=False)
        else:
            row = np.concatenate([rng.choice(there[of["types"][there] == t], 2, replace=False) for t in (0, 1)])
        rows.add(tuple(sorted(row.tolist())))
    return hg.Hypergraph.from_edges(sorted(rows), nodes=NODES), of


def descended(form: hg.Form, start: np.ndarray) -> float:
    """Return f(x) where a descent from this start ends, across the constant vector, |x| as long as it was."""

    def quotient(x: np.ndarray) -> tuple[float, np.ndarray]:
        x = x - x.mean()
        unit = x / np.linalg.norm(x) * np.sqrt(form.nodes)
        value, slope = form.with_gradient(unit)
        slope = (slope - 4 * value / form.nodes * unit) * np.sqrt(form.nodes) / np.linalg.norm(x)
        return value, slope - slope.mean()

    return float(minimize(quotient, start, jac=True, method="L-BFGS-B").fun)


def main() -> None:
    """Print what the form says of both partitions, and what they cut."""
    h, of = crossed()
    form = hg.Form(h.table(), h.weights, h.nodes)
    found = hg.partition(h)
    table = Table(title=f"{h}", title_justify="left", box=None)
    for name in ("partition", "f at +1 and -1", "f minimised from there", "hyperedges cut"):
        table.add_column(name, justify="right")
    for name, part in {**of, f"found by {found.method}": found.part}.items():
        ones = np.where(part == 0, 1.0, -1.0)
        table.add_row(name, f"{form(ones):.0f}", f"{descended(form, ones):.0f}", str(hg.cuts(h, part).hyperedges))
    Console().print(table)


if __name__ == "__main__":
    main()
