"""Time Tucker-2 against TensorLy's `partial_tucker` on the sixteen 3x3 convolutions of a ResNet-18, at half ranks.

    python tools/bench_solver.py [--repeats 3] [--json FILE]

TensorLy runs its 10 iterations; beside it, its default tolerance of 1e-4, which stops it early at a larger error.
Both sides run in the same process on the same kernels, one after the other in turn; the table has medians, the errors
of both (measured on the reconstruction), and beside them the floor: one Gram product of the unfolding in float64.
Kernels are random ("normal", the hardest: a flat spectrum) and random with decaying spectra, as trained ones have
("decaying").
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tensorly
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from surgery.chain import relative_error
from surgery.cost.latency import cpu_name
from surgery.solvers import gram, hooi, reference

SHAPES = [
    *[(64, 64)] * 4,
    (128, 64),
    *[(128, 128)] * 3,
    (256, 128),
    *[(256, 256)] * 3,
    (512, 256),
    *[(512, 512)] * 3,
]


def kernel_of(kind: str, out: int, columns: int, seed: int) -> Tensor:
    """Return a kernel (1, out, columns, 9)."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(out, columns, 9, generator=generator)
    if kind == "decaying":
        for mode, size in enumerate((out, columns)):
            basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
            values = torch.arange(1, size + 1) ** -0.7
            kernel = torch.tensordot((basis * values) @ basis.mT, kernel, dims=([1], [mode])).movedim(0, mode)
    return kernel.contiguous().unsqueeze(0)


def error_of(factors: list[Tensor], kernel: Tensor) -> float:
    """Return the relative Frobenius error of the reconstruction."""
    core, out_basis, in_basis = factors
    return relative_error(torch.einsum("grsk,gor,gis->goik", core, out_basis, in_basis), kernel)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of one run, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def measure(kind: str, out: int, columns: int, *, seed: int, repeats: int) -> dict[str, Any]:
    """Return medians and errors of one layer; the sides take turns."""
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


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    console = Console(width=140)
    environment = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    environment |= {"torch": torch.__version__, "tensorly": tensorly.__version__}
    console.print(", ".join(f"{k} {v}" for k, v in environment.items()))
    report: dict[str, Any] = {"environment": environment, "layers": [], "totals": {}}
    for side in (hooi.tucker2, reference.tucker2):  # warm up, outside of the measurement
        side(kernel_of("normal", 64, 64, 0), (32, 32))
    for kind in ("normal", "decaying"):
        rows = [measure(kind, *shape, seed=i, repeats=options.repeats) for i, shape in enumerate(SHAPES)]
        report["layers"] += rows
        report["totals"][kind] = show(console, kind, rows)
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
