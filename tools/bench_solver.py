"""Time Tucker-2 against TensorLy's `partial_tucker` on the sixteen 3x3 convolutions of a ResNet-18, at half ranks.

    python tools/bench_solver.py [--repeats 3] [--json FILE]
    python tools/bench_solver.py --all [--quick] [--methods M ..] [--kernels normal] [--threads 2]
        [--cpu-time] [--json FILE]

TensorLy runs 10 iterations; another column has its default tolerance of 1e-4, which stops it early at a larger error.
Both libraries run in the same process on the same kernels, in turns. The table has the medians, the errors of both
(measured on the reconstruction), and the floor: one Gram product of the unfolding in float64. Kernels are random
("normal", the hardest, with a flat spectrum), or random with decaying spectra, like trained ones ("decaying").

``--all`` times every solver against TensorLy's on the distinct weights of ResNet-18, ResNet-50 and ViT-B, and the
factoring of all sites of a ResNet-50 and of a ViT-B; ``--quick`` keeps only the small weights.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorly
import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from surgery.algebra import relative_error
from surgery.factorizations import FACTORIZATIONS
from surgery.solvers import gram, hooi, reference
from surgery.system.machine import cpu_name
from tools.solver_cases import TITLES, Case, cases, gram_floor, kernel_of, parafac_setting, sites

SHAPES = [
    *[(64, 64)] * 4,
    (128, 64),
    *[(128, 128)] * 3,
    (256, 128),
    *[(256, 256)] * 3,
    (512, 256),
    *[(512, 512)] * 3,
]
CLOCK = [time.perf_counter]  # the last one is read
MOST_RATIO = 1.002
MOST_REPEATS, ENOUGH = 15, 0.5  # of quick cases: so often, or for so many seconds
TARGETS = {"resnet50": 10, "vit_b": 15}  # seconds


def error_of(factors: list[Tensor], kernel: Tensor) -> float:
    """Return the relative Frobenius error of the reconstruction."""
    core, out_basis, in_basis = factors
    return relative_error(torch.einsum("grsk,gor,gis->goik", core, out_basis, in_basis), kernel)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of one run, and its result."""
    start = CLOCK[-1]()
    result = run()
    return CLOCK[-1]() - start, result


def measure(kind: str, out: int, columns: int, *, seed: int, repeats: int) -> dict[str, Any]:
    """Return medians and errors of one layer; both libraries take turns."""
    kernel, ranks = kernel_of(kind, out, columns, seed), (out // 2, columns // 2)
    sides: dict[str, Callable[[], Any]] = {
        "gram": lambda: gram.gram(kernel.flatten(2)),
        "ours": lambda: hooi.tucker2(kernel, ranks),
        "tensorly": lambda: reference.tucker2(kernel, ranks),
        "tensorly_early": lambda: reference.tucker2(kernel, ranks, tolerance=1e-4),
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    results: dict[str, Any] = {}
    for _ in range(repeats):
        for side, run in sides.items():
            seconds, results[side] = timed(run)
            times[side].append(seconds)
    row: dict[str, Any] = {side: statistics.median(values) for side, values in times.items()}
    errors = {side: error_of(results[side], kernel) for side in ("ours", "tensorly")}
    return row | {
        "kernels": kind,
        "shape": [out, columns, 3, 3],
        "error": errors["ours"],
        "error_ratio": errors["ours"] / errors["tensorly"],
        "speedup": row["tensorly"] / row["ours"],
        "spread": (max(times["ours"]) - min(times["ours"])) / row["ours"],
    }


def show(console: Console, kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print the rows of one kind of kernels and their totals; return the totals."""
    table = Table(title=f"{kind} kernels, half ranks", title_justify="left", box=None)
    columns = ("layer", "Gram", "ours", "spread", "TensorLy", "faster", "stops early", "faster", "error")
    for name in (*columns, "error / TensorLy's", "ours / Gram"):
        table.add_column(name, justify="right", no_wrap=True)
    total = {side: sum(row[side] for row in rows) for side in ("gram", "ours", "tensorly", "tensorly_early")}
    total |= {"speedup": total["tensorly"] / total["ours"], "early_speedup": total["tensorly_early"] / total["ours"]}
    total |= {"worst_error_ratio": max(r["error_ratio"] for r in rows)}
    for row in rows:
        cells = [f"{1e3 * row[side]:.1f} ms" for side in ("gram", "ours")] + [f"{100 * row['spread']:.0f} %"]
        cells += [f"{1e3 * row['tensorly']:.0f} ms", f"{row['speedup']:.1f}x"]
        cells += [f"{1e3 * row['tensorly_early']:.0f} ms", f"{row['tensorly_early'] / row['ours']:.1f}x"]
        cells.append(f"{row['error']:.4f}")
        table.add_row(
            "x".join(map(str, row["shape"])), *cells, f"{row['error_ratio']:.5f}", f"{row['ours'] / row['gram']:.1f}"
        )
    console.print(table)
    console.print(
        f"all sixteen: ours {total['ours']:.2f} s, TensorLy {total['tensorly']:.2f} s, {total['speedup']:.1f}x faster; "
        f"{total['early_speedup']:.1f}x faster than TensorLy where it stops early; "
        f"largest error ratio {total['worst_error_ratio']:.5f}; floor {total['gram']:.2f} s\n"
    )
    return total


def compare(case: Case, method: str, least: int) -> dict[str, Any]:
    """Return medians and errors of one case; both libraries take turns, more often if they are quick.

    TensorLy's time is that of its fastest setting, and its error is the lowest of all settings.
    """
    times: list[tuple[float, float]] = []
    while len(times) < least or (len(times) < MOST_REPEATS and sum(map(sum, times)) < ENOUGH):
        ours_seconds, ours = timed(case.ours)
        their_seconds, theirs = timed(case.tensorly)
        times.append((ours_seconds, their_seconds))
    mine, other = (list(side) for side in zip(*times, strict=True))
    results = [ours, theirs, *([case.slower()] if case.slower else [])]
    error, *errors = (relative_error(case.assemble(parts), case.weight) for parts in results)
    row: dict[str, Any] = {"method": method, "weight": case.name, "rank": case.rank, "repeats": len(times)}
    row |= {"ours": statistics.median(mine), "tensorly": statistics.median(other)}
    row |= {"spread": (max(mine) - min(mine)) / row["ours"], "error": error, "error_ratio": error / min(errors)}
    return row | {"speedup": row["tensorly"] / row["ours"]}


def show_method(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one method and their totals."""
    table = Table(title=title, title_justify="left", box=None)
    for name in ("weight", "rank", "ours", "spread", "TensorLy", "faster", "error", "error / TensorLy's", "repeats"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{1e3 * row['ours']:.1f} ms", f"{100 * row['spread']:.0f} %", f"{1e3 * row['tensorly']:.1f} ms"]
        cells += [f"{row['speedup']:.1f}x", f"{row['error']:.4f}", f"{row['error_ratio']:.5f}", str(row["repeats"])]
        table.add_row(row["weight"], row["rank"], *cells)
    console.print(table)
    ours, theirs = (sum(row[side] for row in rows) for side in ("ours", "tensorly"))
    console.print(
        f"all {len(rows)}: ours {ours:.2f} s, TensorLy {theirs:.2f} s, {theirs / ours:.1f}x faster, at least "
        f"{min(row['speedup'] for row in rows):.1f}x; largest error ratio {max(r['error_ratio'] for r in rows):.5f}\n"
    )


def factor_network(console: Console, network: str, repeats: int) -> dict[str, Any]:
    """Time factoring all sites of a network at half ranks, and the Gram products that any solver needs."""
    operators = sites(network)
    plan = [(o, FACTORIZATIONS[name]) for o, name in operators]
    ranks = [tuple(max(1, full // 2) for full in method.max_ranks(o)) for o, method in plan]
    times = []
    for _ in range(repeats):
        floor, _ = timed(lambda: gram_floor(operators))
        ours, _ = timed(lambda: [m.factor(o, r) for (o, m), r in zip(plan, ranks, strict=True)])
        times.append((floor, ours))
    floor, ours = (statistics.median(side) for side in zip(*times, strict=True))
    spread = max(t for _, t in times) - min(t for _, t in times)
    tucker = sum(name == "tucker" for _, name in operators)
    console.print(
        f"{network}: {len(operators)} sites ({tucker} by tucker, {len(operators) - tucker} by svd) factored in "
        f"{ours:.2f} s (spread {100 * spread / ours:.0f} %), target {TARGETS[network]} s; "
        f"floor, one float32 Gram product for each unfolding, {floor:.2f} s: {ours / floor:.1f}x"
    )
    return {"network": network, "sites": len(operators), "seconds": ours, "floor": floor}


def run_all(console: Console, options: argparse.Namespace) -> dict[str, Any]:
    """Measure and print all methods and networks, then the rows in which TensorLy is better."""
    rows = []
    for method in options.methods:
        found: list[Any] = []
        title = TITLES[method]
        for case in cases(method, kind=options.kernels, quick=options.quick):
            if not found:
                case.ours(), case.tensorly()  # warm up, outside of the measurement
            found.append(compare(case, method, options.repeats))
        if method == "cp":
            settings = {row["rank"]: "{}, {}".format(*parafac_setting(int(row["rank"]))) for row in found}
            title += "; fastest start and tenalg: " + "; ".join(f"rank {r}: {s}" for r, s in settings.items()) + ")"
        show_method(console, title, found)
        rows += found
    networks = [
        factor_network(console, network, options.repeats)
        for network in TARGETS
        if not options.quick and len(options.methods) == len(TITLES)
    ]
    worse = [r for r in rows if r["speedup"] < 1 or r["error_ratio"] > MOST_RATIO]
    names = ", ".join(f"{r['method']} {r['weight']} rank {r['rank']}" for r in worse)
    console.print(f"slower than TensorLy, or with more than {MOST_RATIO} times its error: {names or 'none'}")
    return {"rows": rows, "networks": networks}


def run_tucker(console: Console, repeats: int) -> dict[str, Any]:
    """Measure and print the sixteen convolutions of a ResNet-18."""
    report: dict[str, Any] = {"layers": [], "totals": {}}
    for side in (hooi.tucker2, reference.tucker2):  # warm up, outside of the measurement
        side(kernel_of("normal", 64, 64, 0), (32, 32))
    for kind in ("normal", "decaying"):
        rows = [measure(kind, *shape, seed=i, repeats=repeats) for i, shape in enumerate(SHAPES)]
        report["layers"] += rows
        report["totals"][kind] = show(console, kind, rows)
    return report


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--all", action="store_true", help="every solver, and whole networks")
    parser.add_argument("--quick", action="store_true", help="with --all: small weights only")
    parser.add_argument("--kernels", choices=("normal", "decaying"), default="decaying", help="with --all")
    parser.add_argument("--methods", nargs="+", choices=TITLES, default=TITLES, help="with --all: some of its tables")
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of one thread, for a shared machine")
    parser.add_argument("--threads", type=int, help="by default the libraries' own choice")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    if options.cpu_time:
        CLOCK.append(time.process_time)
    if options.threads or options.cpu_time:
        torch.set_num_threads(options.threads or 1)
        threadpool_limits(options.threads or 1)  # of NumPy's BLAS
    console = Console(width=140)
    environment = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    environment |= {"torch": torch.__version__, "tensorly": tensorly.__version__}
    console.print(", ".join(f"{k} {v}" for k, v in environment.items()))
    report = {"environment": environment}
    report |= run_all(console, options) if options.all else run_tucker(console, options.repeats)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
