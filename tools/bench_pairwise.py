"""Time four kinds of CP sweeps, and two of Tucker sweeps: exact or by pairwise perturbation, plain or extrapolated.

    python tools/bench_pairwise.py [--quick] [--data FILE.npz] [--json FILE] [--plot FILE.png]

"plain" is alternating least squares on a dimension tree, the baseline of Ma and Solomonik (arXiv 1811.10573).
"pairwise" is their method on top of it, for which they report 1.3 to 2.8x. "extrapolated" is the default of this
package, and "both" is its ``method="pp"``. All start from the same factors (HOSVD), run in the same process, and stop
at the same tolerance or after the same number of sweeps. Seconds are CPU time of one thread, so that other work on the
machine counts little. They run until an exact sweep reaches a common error, 1.0001 times the largest of the final
errors. "gains" are those of pairwise perturbation over plain and over extrapolated sweeps, each at the larger final
error of the two. Problems are those of the paper (``tools/pairwise_cases.py``), with orders 3 to 6, and images. Tucker
is HOOI, timed over whole runs.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from surgery.solvers.cp import als_sweeps, start
from surgery.solvers.cp_model import CpModel
from surgery.solvers.dimension_tree import Array
from surgery.solvers.pairwise import pairwise_sweeps
from surgery.solvers.tucker import tucker
from surgery.system.machine import cpu_name
from tools.pairwise_cases import Problem, problems, tuckers

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10_jpeg.npz"
SIDES = {  # how to sweep, and whether to extrapolate
    "plain": (als_sweeps, False),
    "pairwise": (pairwise_sweeps, False),
    "extrapolated": (als_sweeps, True),
    "both": (pairwise_sweeps, True),
}
TUCKER = {"plain": "als", "pairwise": "pp"}
TOLERANCE = 1e-6
Trace = list[tuple[float, float]]  # seconds and error after each exact sweep


class Traced(CpModel):
    """A CP model that records the time and the error of each exact sweep."""

    def __init__(self, tensor: Array, factors: list[Array], *, extrapolated: bool) -> None:
        super().__init__(tensor, factors, extrapolated=extrapolated)
        self.begin, self.trace = time.process_time(), Trace()

    def step(self, sweep: Callable[[], None]) -> Array:
        """Take a step, and record the error if it was an exact sweep."""
        fell = super().step(sweep)
        if sweep == self.sweep:
            self.trace.append((time.process_time() - self.begin, float(np.sqrt(self.residual.mean()))))
        return fell


def measure(problem: Problem) -> dict[str, Any]:
    """Return the row of one CP problem, with the traces."""
    tensor = problem.build()
    assert isinstance(problem.rank, int)
    first, traces = start(tensor, problem.rank), {}
    for side, (run, extrapolated) in SIDES.items():
        model = Traced(first.tensor, first.factors, extrapolated=extrapolated)
        run(model, sweeps=problem.sweeps, tolerance=TOLERANCE)
        traces[side] = model.trace
    errors = {side: min(error for _, error in trace) for side, trace in traces.items()}
    target = 1.0001 * max(errors.values())
    seconds = {side: seconds_to(trace, target) for side, trace in traces.items()}
    pairs = {"plain": "pairwise", "extrapolated": "both"}
    gains = {f"{new} over {old}": gain(traces[old], traces[new]) for old, new in pairs.items()}
    return row_of(problem, tensor, seconds, errors) | {"gain": gains, "trace": traces}


def seconds_to(trace: Trace, error: float) -> float:
    """Return the seconds after which a trace first reached an error."""
    return next(seconds for seconds, reached in trace if reached <= error)


def gain(before: Trace, after: Trace) -> float:
    """Return how many times as fast one trace reaches the larger of the final errors of both."""
    target = 1.0001 * max(min(error for _, error in trace) for trace in (before, after))
    return seconds_to(before, target) / seconds_to(after, target)


def measure_tucker(problem: Problem) -> dict[str, Any]:
    """Return the row of one Tucker problem: whole runs, start included."""
    tensor, seconds, errors = problem.build(), {}, {}
    assert isinstance(problem.rank, tuple)
    for side, method in TUCKER.items():
        begin = time.process_time()
        found = tucker(tensor, problem.rank, method=method, sweeps=problem.sweeps, tolerance=1e-6)
        seconds[side], errors[side] = time.process_time() - begin, found.error
    return row_of(problem, tensor, seconds, errors)


def row_of(problem: Problem, tensor: Tensor, seconds: dict[str, float], errors: dict[str, float]) -> dict[str, Any]:
    """Return the row of a table: seconds and errors of all methods, and their speed relative to plain sweeps."""
    row = {"problem": problem.name, "shape": list(tensor.shape[1:]), "rank": problem.rank}
    gains = {side: seconds["plain"] / spent for side, spent in seconds.items()}
    return row | {"seconds": seconds, "error": errors, "speedup": gains}


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows."""
    sides = list(rows[0]["seconds"])
    table = Table(title=title, title_justify="left", box=None)
    for name in (
        "problem",
        "shape",
        "rank",
        "plain",
        *(f"{side}" for side in sides[1:]),
        "error",
        "others, over it",
        "gains",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["problem"], "x".join(map(str, row["shape"])), str(row["rank"]), f"{row['seconds']['plain']:.2f} s"]
        cells += [f"{row['seconds'][side]:.2f} s, {row['speedup'][side]:.2f}x" for side in sides[1:]]
        plain = row["error"]["plain"]
        cells += [f"{plain:.5f}", " ".join(f"{row['error'][side] / plain - 1:+.0e}" for side in sides[1:])]
        table.add_row(*cells, " ".join(f"{value:.2f}x" for value in row.get("gain", {}).values()))
    console.print(table)
    for side in sides[1:]:
        mean = math.exp(sum(math.log(row["speedup"][side]) for row in rows) / len(rows))
        console.print(f"{side}: {mean:.2f}x as fast as plain sweeps in the geometric mean")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw fit against time near the end, one panel for each problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 4
    lines = math.ceil(len(rows) / columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(15, 3.4 * lines), layout="constrained")
    for axis, row in zip(axes.flat, rows, strict=False):
        for side, trace in row["trace"].items():
            seconds, errors = zip(*trace, strict=True)
            axis.plot(seconds, [1 - error for error in errors], marker=".", markersize=3, linewidth=1, label=side)
        lowest, highest = min(row["error"].values()), max(row["error"].values())
        axis.set_ylim(1 - 1.02 * highest - (highest - lowest), 1 - 0.998 * lowest)
        axis.set_title(f"{row['problem']}\n{'x'.join(map(str, row['shape']))}, rank {row['rank']}", fontsize=9)
        axis.set_xlabel("CPU seconds")
        axis.set_ylabel("fit, 1 - error")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small tensors, which tell little about speed")
    parser.add_argument("--data", type=Path, default=DATA, help="cifar10_jpeg.npz; without it the images are left out")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="also draw fit against time here")
    options = parser.parse_args()
    console = Console(width=150)
    torch.set_num_threads(1)
    threadpool_limits(1)
    environment = {"cpu": cpu_name(), "python": platform.python_version(), "torch": torch.__version__, "threads": 1}
    console.print(", ".join(f"{k} {v}" for k, v in environment.items()))
    measure(Problem("warm up", lambda: torch.ones(1, 8, 8, 8), 2))
    rows = [measure(problem) for problem in problems(quick=options.quick, data=options.data)]
    show(console, "CP", rows)
    others = [measure_tucker(problem) for problem in tuckers(quick=options.quick, data=options.data)]
    show(console, "Tucker by HOOI, where nothing is extrapolated", others)
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        options.json.write_text(json.dumps({"environment": environment, "rows": rows + others}, indent=2) + "\n")


if __name__ == "__main__":
    main()
