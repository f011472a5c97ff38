"""Compare the tensor's methods with the best known ones: cuts, agreement and seconds, and predictions of hyperedges.

    pip install mtkahypar hypergraphx
    python tools/bench_hypergraph.py [--quick] [--data FOLDER] [--seeds N] [--picture FILE] [--json FILE]

Partitions into two parts, 3 % out of balance at most: planted ones, and the real hypergraphs that hypergraphx brings
along (``--data`` is the folder where it lies, if it is not installed). Sweeps cut a Fiedler vector and refine nothing;
"tensor" is the Laplacian tensor's vector for even sizes, its absolute form for odd ones. Mt-KaHyPar has one thread and
its default preset; its seconds are those of partitioning alone. Cuts are medians over the seeds; "of peer" is the best
cut over the best of Mt-KaHyPar's over the same seeds. Predictions: area under the ROC curve against two kinds of
negatives, and Student's 95 % intervals over the seeds. ``--picture`` draws a planted partition along the vectors.
All takes a quarter of an hour, and ``--quick`` two minutes.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import importlib.metadata

from surgery import hypergraph as hg
from surgery.errors import InputError
from surgery.system.machine import cpu_name
from tools.hypergraph_cases import Case, data_folder, kahypar, planted, planted_cases, real_cases, timed
from tools.hypergraph_picture import picture

PEER = "Mt-KaHyPar"
OWN = ("clique sweep", "tensor sweep", "clique + FM", "tensor + FM", "auto")
WITHIN = 1.05  # of the peer's cut, on each real hypergraph
MOST_SECONDS = 1.0  # of the tensor's vector of 5,000 nodes and 15,000 hyperedges of four nodes


def agreement(part: Any, labels: Any) -> float:
    """Return the share of nodes in the right part, with the parts matched to the labels as well as may be."""
    counts = np.zeros((part.max() + 1, labels.max() + 1))
    np.add.at(counts, (part, labels), 1)
    rows, columns = linear_sum_assignment(-counts)
    return float(counts[rows, columns].sum() / len(part))


def own(name: str, case: Case, parts: int, seed: int) -> tuple[Any, float]:
    """Return the parts that one of our methods finds, and its seconds."""
    first, *rest = name.split()
    method: Any = first if first != "tensor" or (case.h.uniform or 2) % 2 == 0 else "absolute"
    refine = rest != ["sweep"]
    seconds, found = timed(lambda: hg.partition(case.h, parts, method=method, refine=refine, seed=seed))
    return found.part, seconds


def measure(cases: Sequence[Case], parts: int, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return for each method its cuts, agreements and seconds over all cases and seeds, or why it refused."""
    methods: dict[str, Callable[[Case, int], tuple[Any, float]]] = {
        name: lambda case, seed, name=name: own(name, case, parts, seed)  # type: ignore[misc]
        for name in OWN
    }
    methods[PEER] = lambda case, seed: kahypar(case.h, parts, seed=seed)
    found: dict[str, dict[str, Any]] = {}
    for name, run in methods.items():
        row: dict[str, Any] = {"cuts": [], "agreements": [], "seconds": [], "imbalance": 0.0}
        try:
            for case in cases:
                for seed in seeds:
                    part, seconds = run(case, seed)
                    costs = hg.cuts(case.h, part)
                    row["cuts"].append(costs.hyperedges)
                    row["seconds"].append(seconds)
                    row["imbalance"] = max(row["imbalance"], costs.imbalance)
                    if case.labels is not None and parts == case.labels.max() + 1:
                        row["agreements"].append(agreement(part, case.labels))
        except InputError as error:
            row = {"refused": str(error).split(";")[0]}
        found[name] = row
    return found


def best(row: dict[str, Any]) -> float:
    """Return the lowest cut."""
    return min(row["cuts"])


def add(table: Table, title: str, h: hg.Hypergraph, found: dict[str, dict[str, Any]]) -> None:
    """Add the rows of one family or hypergraph to a table."""
    peer = found[PEER]
    for number, (name, row) in enumerate(found.items()):
        first = [title, str(h.nodes), str(h.edges)] if number == 0 else ["", "", ""]
        if "refused" in row:
            table.add_row(*first, name, f"refused: {row['refused']}")
            continue
        cut = f"{statistics.median(row['cuts']):.0f}"
        agrees = f"{statistics.mean(row['agreements']):.3f}" if row["agreements"] else "-"
        cells = [cut, f"{best(row) / best(peer):.3f}" if best(peer) else "-", agrees]
        table.add_row(*first, name, *cells, f"{statistics.median(row['seconds']):.3f}", f"{row['imbalance']:.1%}")
    table.add_section()


def new_table(title: str) -> Table:
    """Return an empty table of partitions."""
    table = Table(title=title, title_justify="left", box=None)
    for name in ("hypergraph", "nodes", "hyperedges", "method", "cut", "of peer", "agreement", "seconds", "imbalance"):
        table.add_column(name, justify="left" if name in ("hypergraph", "method") else "right")
    return table


def partitions(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print all partitions."""
    found: dict[str, Any] = {}
    table = new_table("planted: two halves, three hyperedges a node")
    for name, cases in planted_cases(options.seeds, quick=options.quick):
        found[name] = measure(cases, 2, [0])
        add(table, name, cases[0].h, found[name])
    console.print(table)
    table = new_table("real: two parts, and as many as there are classes")
    real: dict[str, dict[str, Any]] = {}
    for case in real_cases(data_folder(options.data), quick=options.quick):
        classes = 2 if case.labels is None else int(case.labels.max()) + 1
        for parts in sorted({2, classes}):
            name = case.name if parts == 2 else f"{case.name}, {parts} parts"
            real[name] = measure([case], parts, range(options.seeds))
            add(table, name, case.h, real[name])
    console.print(table)
    verdict(console, real)
    return found | real


def verdict(console: Console, real: dict[str, dict[str, Any]]) -> None:
    """Print how the own best compares with the peer, and where the tensor loses to the clique expansion."""
    ratios = {
        name: min(best(row) for own, row in rows.items() if own != PEER and "cuts" in row) / max(best(rows[PEER]), 1)
        for name, rows in real.items()
    }
    above = [name for name, ratio in ratios.items() if ratio > WITHIN]
    console.print(
        f"own best over {PEER}'s best: at most {max(ratios.values()):.3f} on {len(ratios)} real problems, ", end=""
    )
    console.print(f"above {WITHIN}: {', '.join(above) or 'none'}")
    for kind in ("sweep", "+ FM"):
        both = [rows for rows in real.values() if "cuts" in rows[f"tensor {kind}"]]
        worse = sum(best(rows[f"tensor {kind}"]) > best(rows[f"clique {kind}"]) for rows in both)
        better = sum(best(rows[f"tensor {kind}"]) < best(rows[f"clique {kind}"]) for rows in both)
        console.print(f"tensor {kind} against clique {kind}: cuts more in {worse}, less in {better} of {len(both)}")


def vector_speed(console: Console, *, quick: bool) -> dict[str, Any]:
    """Print how long the tensor's vector takes, and what kind of point it is."""
    nodes = 1000 if quick else 5000
    h, _ = planted(nodes, 4, 3 * nodes, noise=0.55, seed=0)
    runs = [timed(lambda: hg.fiedler(h, "tensor")) for _ in range(3)]
    seconds, found = min(run[0] for run in runs), runs[0][1]
    console.print(
        f"tensor vector of {h.nodes} nodes and {h.edges} 4-edges: {seconds:.2f} s (goal for 5000: {MOST_SECONDS:g} s), "
        f"{found.steps} steps; {found.kind}, residual {found.residual:.1e}, eigenvector {found.eigen_residual:.1e}"
    )
    return {"nodes": h.nodes, "edges": h.edges, "seconds": seconds, "residual": found.residual, "kind": found.kind}


def predictions(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print all predictions."""
    rows: dict[str, Any] = {}
    for case in real_cases(data_folder(options.data), quick=options.quick):
        try:
            found = hg.evaluate(case.h, seeds=2 if options.quick else 5)
        except InputError as error:
            console.print(f"predictions, {case.name}: {error}\n")
            continue
        console.print(f"predictions, {case.name}: {found}\n", highlight=False)
        rows[case.name] = [vars(row) for row in found.rows]
    return rows


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small hypergraphs only")
    parser.add_argument("--data", type=Path, help="the folder in which hypergraphx lies")
    parser.add_argument("--seeds", type=int, default=3, help="for each hypergraph and each method")
    parser.add_argument("--picture", type=Path, help="an SVG file to write")
    parser.add_argument("--json", type=Path, help="a file to write all figures to")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    versions = {name: importlib.metadata.version(name) for name in ("mtkahypar", "hypergraphx")}
    versions |= {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__}
    console.print(f"{cpu_name()}; " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    if options.picture:
        options.picture.write_text(picture(), encoding="utf-8")
    figures = {"cpu": cpu_name(), "versions": versions, "vector": vector_speed(console, quick=options.quick)}
    figures |= {"partitions": partitions(console, options), "predictions": predictions(console, options)}
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1, default=float) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
