"""Recover planted CP components: over-parameterised gradient descent, plain gradient descent, and ALS.

    python tools/bench_overparameterized.py [--seeds 20] [--quick] [--json FILE] [--plot FILE.png]

Each seed plants ``rank`` unit vectors in every mode, orthonormal or random, with weights of 1. A tensor is recovered if
the relative error is below 1e-3 and each planted component matches a found component of its own, with a product of
cosines of at least 0.99. Both kinds of descent take the same number of steps on m components and end in the same way:
merging, pruning to the rank, 50 sweeps of ALS (in the symmetric form: plain descent). "fit" is the median relative
error of the m components before that. ALS is `surgery.solvers.cp` with its defaults, its own starts and acceleration.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from dataclasses import asdict, dataclass
from functools import partial, reduce
from operator import mul
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch import Tensor

from surgery.solvers.components import reduce_rank
from surgery.solvers.cp import cp
from surgery.solvers.overparameterized import Method, descend, symmetric_cp
from surgery.system.machine import cpu_name

TIMES_RANK = (1, 2, 4)
METHODS: dict[str, Method] = {"over-parameterised": "overparameterized", "plain descent": "plain"}


@dataclass(frozen=True)
class Case:
    """A planted tensor: ``rank`` components in ``order`` modes of ``size``."""

    kind: str
    size: int
    rank: int
    order: int
    symmetric: bool = False

    def __str__(self) -> str:
        shape = "x".join([str(self.size)] * self.order)
        return f"{'symmetric ' * self.symmetric}{self.kind} {shape}, r = {self.rank}"


CASES = [
    Case("orthogonal", 10, 10, 3),
    Case("random", 10, 10, 3),
    Case("random", 10, 15, 3),
    Case("orthogonal", 6, 6, 4),
    Case("random", 6, 10, 4),
    Case("orthogonal", 10, 10, 3, symmetric=True),
    Case("random", 10, 10, 3, symmetric=True),
    Case("orthogonal", 6, 6, 4, symmetric=True),
    Case("random", 6, 6, 4, symmetric=True),
]
QUICK = [CASES[0], CASES[7]]


def planted(case: Case, seeds: int) -> list[Tensor]:
    """Return the unit vectors of each mode, (seeds, size, rank)."""
    modes = []
    for mode in range(1 if case.symmetric else case.order):
        vectors = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(100 * seed + mode)
            normal = torch.randn(case.size, case.rank, generator=generator, dtype=torch.float64)
            vectors.append(torch.linalg.qr(normal).Q if case.kind == "orthogonal" else normal / normal.norm(dim=0))
        modes.append(torch.stack(vectors).float())
    return modes * (case.order // len(modes))


def tensor_of(factors: list[Tensor]) -> Tensor:
    """Return the sum of the components, (seeds, n_1, ..., n_N)."""
    letters = "abcd"[: len(factors)]
    return torch.einsum(",".join(f"g{letter}r" for letter in letters) + "->g" + letters, *factors)


def errors_of(tensor: Tensor, factors: list[Tensor]) -> Tensor:
    """Return the relative Frobenius error of each seed."""
    tensor = tensor.double()
    missed = (tensor - tensor_of([factor.double() for factor in factors])).flatten(1)
    errors: Tensor = missed.norm(dim=1) / tensor.flatten(1).norm(dim=1)
    return errors


def matched(truth: list[Tensor], factors: list[Tensor]) -> Tensor:
    """Return for each seed whether the components match the planted ones, one for one, up to the signs of vectors."""
    pairs = zip(truth, factors, strict=True)
    normalize = partial(torch.nn.functional.normalize, dim=1)
    cosines = reduce(mul, (true.double().mT @ normalize(found.double()) for true, found in pairs)).abs()
    nearest = cosines.argmax(-1).sort(-1).values
    return (cosines.amax(-1) >= 0.99).all(-1) & (nearest.diff(dim=-1) > 0).all(-1)


def solve(case: Case, tensor: Tensor, name: str, components: int) -> tuple[list[Tensor], float | None]:
    """Return the factors that a method finds, and the median error of its ``components`` before they are reduced."""
    if name == "ALS":
        results = [cp(one[None], case.rank, method="als", seed=seed).factors for seed, one in enumerate(tensor)]
        return [torch.cat(factors) for factors in zip(*results, strict=True)], None
    if case.symmetric:
        vectors, weights = symmetric_cp(tensor, case.rank, components=components, method=METHODS[name])
        return [vectors * weights[:, None], *[vectors] * (case.order - 1)], None
    fitted = descend(tensor, components, method=METHODS[name])
    return reduce_rank(tensor, fitted, case.rank), float(errors_of(tensor, fitted).median())


def measure(case: Case, name: str, times_rank: int, seeds: int) -> dict[str, Any]:
    """Return one row: how many seeds were recovered, errors and seconds."""
    truth = planted(case, seeds)
    tensor = tensor_of(truth)
    start = time.perf_counter()
    factors, fit = solve(case, tensor, name, times_rank * case.rank)
    seconds = time.perf_counter() - start
    errors = errors_of(tensor, factors)
    low = errors < 1e-3
    row = {"case": str(case), **asdict(case), "method": name, "times_rank": times_rank, "seeds": seeds}
    row |= {"recovered": int((low & matched(truth, factors)).sum()), "low_error": int(low.sum())}
    return row | {"median_error": float(errors.median()), "median_fit": fit, "seconds": seconds}


def rows_of(case: Case, seeds: int) -> list[dict[str, Any]]:
    """Return the rows of all methods; ALS does not keep symmetry, and is measured on the same symmetric tensors."""
    runs = [(name, times) for name in METHODS for times in TIMES_RANK] + [("ALS", 1)]
    return [measure(case, name, times, seeds) for name, times in runs]


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one case."""
    table = Table(title=rows[0]["case"], title_justify="left", box=None)
    for column in ("method", "m", "recovered", "error < 1e-3", "median error", "fit", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=True)
    for row in rows:
        m = "r" if row["times_rank"] == 1 else f"{row['times_rank']} r"
        counts = [f"{row[key]} of {row['seeds']}" for key in ("recovered", "low_error")]
        fit = "" if row["median_fit"] is None else f"{row['median_fit']:.1e}"
        table.add_row(row["method"], m, *counts, f"{row['median_error']:.1e}", fit, f"{row['seconds']:.1f}")
    console.print(table)
    console.print()


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the share of recovered seeds as bars, a group for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys(row["case"] for row in rows))
    bars = list(dict.fromkeys((row["method"], row["times_rank"]) for row in rows))
    shades = {"over-parameterised": "Blues", "plain descent": "Oranges", "ALS": "Greys"}
    figure, axes = pyplot.subplots(figsize=(10, 0.75 * len(cases) + 2), layout="constrained")
    for place, (name, times) in enumerate(bars):
        shares = [100 * r["recovered"] / r["seeds"] for r in rows if (r["method"], r["times_rank"]) == (name, times)]
        color = matplotlib.colormaps[shades[name]](0.4 + 0.13 * times)
        label = f"{name}, m = {'' if times == 1 else times}r" if name in METHODS else name
        heights = [case + 0.12 * (place - len(bars) / 2 + 0.5) for case in range(len(cases))]
        axes.barh(heights, shares, height=0.11, color=color, label=label)
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel(f"recovered, % of {rows[0]['seeds']} seeds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two cases, at most five seeds")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="also draw the recovered shares here")
    options = parser.parse_args()
    console = Console(width=120)
    torch.set_num_threads(1)  # a second thread costs more than it saves on tensors this small
    threadpool_limits(1)
    environment = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    environment |= {"torch": torch.__version__}
    console.print(", ".join(f"{k} {v}" for k, v in environment.items()))
    rows: list[dict[str, Any]] = []
    for case in QUICK if options.quick else CASES:
        rows += rows_of(case, min(options.seeds, 5) if options.quick else options.seeds)
        show(console, [row for row in rows if row["case"] == str(case)])
    if options.json:
        options.json.write_text(json.dumps({"environment": environment, "rows": rows}, indent=2) + "\n")
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
