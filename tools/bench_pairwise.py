"""Time pairwise perturbation against exact sweeps on the same dimension tree, and CP against TensorLy.

    python tools/bench_pairwise.py [--quick] [--repeats 3] [--data FILE.npz] [--json FILE] [--plot FILE.png]

Both sides start from the same factors (HOSVD), run in the same process by turns, and stop by the same tolerance. The
speed-up is that of the time until an exact sweep reaches the same error: 1.0001 times the larger of the two final ones.
Problems are those of Ma and Solomonik (arXiv 1811.10573), who report 1.3 to 2.8x over a dimension tree: random low rank
with noise, collinear factors with 1 % noise, orders 3 to 6, and a stack of CIFAR-10 images. Rows named "tucker" are
HOOI, whole runs. The last table has 10 sweeps of CP of a 3x3 convolution and 10 of TensorLy's parafac.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import tensorly
import torch
from rich.console import Console
from rich.table import Table
from tensorly.decomposition import parafac
from torch import Tensor

from surgery.chain import relative_error
from surgery.cost.latency import cpu_name
from surgery.solvers import cp as solver
from surgery.solvers.cp import CpModel, cp
from surgery.solvers.pairwise import pairwise_sweeps
from surgery.solvers.tucker import tucker

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10_jpeg.npz"
SIDES = ("als", "pp")
RUNS = {"als": solver._als_sweeps, "pp": pairwise_sweeps}
TOLERANCE = 1e-5
Trace = list[tuple[float, float]]  # seconds and error after each exact sweep


def compose(factors: list[Tensor]) -> Tensor:
    """Return the tensor (g, n_1, ...) of CP factors (g, n_i, r)."""
    letters = "abcdef"[: len(factors)]
    return torch.einsum(",".join(f"g{c}r" for c in letters) + f"->g{letters}", *factors)


def synthetic(sizes: tuple[int, ...], rank: int, *, noise: float, collinearity: float | None = None) -> Tensor:
    """Return a tensor (1, sizes) in float64 of normal factors, or of factors whose columns have the same cosines."""
    generator = torch.Generator().manual_seed(len(sizes))
    factors = [torch.randn(1, size, rank, generator=generator, dtype=torch.float64) for size in sizes]
    if collinearity is not None:
        cosines = torch.full((rank, rank), collinearity, dtype=torch.float64).fill_diagonal_(1)
        factors = [torch.linalg.qr(factor).Q @ torch.linalg.cholesky(cosines).mT for factor in factors]
    tensor = compose(factors)
    extra = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return tensor + noise * tensor.norm() / extra.norm() * extra


def images(path: Path, count: int) -> Tensor | None:
    """Return (1, count, 32, 32, 3) in float64 from the test images, or None where the file is not there."""
    if not path.exists():
        return None
    from PIL import Image

    archive = numpy.load(path)
    stream, offsets = archive["test_jpg"].tobytes(), archive["test_off"]
    pictures = [Image.open(io.BytesIO(stream[offsets[i] : offsets[i + 1]])) for i in range(count)]
    return torch.from_numpy(numpy.stack([numpy.asarray(p, dtype=numpy.float64) for p in pictures]))[None] / 255


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of one run, and its result."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def trace_of(side: str, start: CpModel, sweeps: int) -> Trace:
    """Run one side from the factors of a model."""
    model, trace = CpModel(start.tensor, start.factors), []
    step, begin = model.step, time.perf_counter()

    def recorded(sweep: Callable[[], None]) -> Tensor:
        fell = step(sweep)
        if sweep == model.sweep:
            trace.append((time.perf_counter() - begin, float(model.residual.mean().sqrt())))
        return fell

    model.step = recorded  # type: ignore[method-assign]
    RUNS[side](model, sweeps=sweeps, tolerance=TOLERANCE)
    return trace


def seconds_to(trace: Trace, error: float) -> float:
    """Return when a trace first reached an error."""
    return next(seconds for seconds, reached in trace if reached <= error)


def summary(name: str, shape: tuple[int, ...], rank: Any, times: dict[str, list[float]], errors: Any) -> dict[str, Any]:
    """Return a row: medians, spreads and errors of both sides."""
    median = {side: statistics.median(values) for side, values in times.items()}
    spread = {side: (max(values) - min(values)) / median[side] for side, values in times.items()}
    row = {"problem": name, "shape": list(shape), "rank": rank, "seconds": median, "spread": spread, "error": errors}
    return row | {"difference": errors["pp"] / errors["als"] - 1, "speedup": median["als"] / median["pp"]}


def measure(name: str, tensor: Tensor, rank: int, *, sweeps: int, repeats: int) -> dict[str, Any]:
    """Return the row of one CP problem, with the last traces."""
    start = solver._start(tensor, rank, restarts=0, seed=0)
    traces: dict[str, list[Trace]] = {side: [] for side in SIDES}
    for _ in range(repeats):
        for side in SIDES:
            traces[side].append(trace_of(side, start, sweeps))
    errors = {side: min(error for _, error in traces[side][-1]) for side in SIDES}
    target = 1.0001 * max(errors.values())
    times = {side: [seconds_to(trace, target) for trace in traces[side]] for side in SIDES}
    row = summary(name, tuple(tensor.shape[1:]), rank, times, errors)
    return row | {"trace": {side: traces[side][-1] for side in SIDES}}


def measure_tucker(name: str, tensor: Tensor, ranks: tuple[int, ...], *, repeats: int) -> dict[str, Any]:
    """Return the row of one Tucker problem: whole runs, start included."""
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    errors = {}
    for _ in range(repeats):
        for side in SIDES:
            seconds, found = timed(lambda side=side: tucker(tensor, ranks, method=side, sweeps=40, tolerance=1e-6))
            times[side].append(seconds)
            errors[side] = found.error
    return summary(name, tuple(tensor.shape[1:]), list(ranks), times, errors)


def measure_tensorly(rank: int, *, size: int, repeats: int) -> dict[str, Any]:
    """Return the row of CP of a convolution kernel, 10 sweeps on both sides, starts (SVD, HOSVD) included."""
    kernel = torch.randn(1, size, size, 3, 3, generator=torch.Generator().manual_seed(rank))
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: cp(kernel, rank, sweeps=10, tolerance=0, restarts=0).factors,
        "tensorly": lambda: [factor[None] for factor in parafac(kernel[0], rank, n_iter_max=10, tol=0)[1]],
    }
    times: dict[str, list[float]] = {side: [] for side in sides}
    errors = {}
    for _ in range(repeats):
        for side, run in sides.items():
            seconds, factors = timed(run)
            times[side].append(seconds)
            errors[side] = relative_error(compose(factors), kernel)
    median = {side: statistics.median(values) for side, values in times.items()}
    row = {"shape": [size, size, 3, 3], "rank": rank, "seconds": median, "error": errors}
    ratio = errors["ours"] / errors["tensorly"]
    return row | {"speedup": median["tensorly"] / median["ours"], "error_ratio": ratio}


def problems(*, quick: bool, data: Path, console: Console) -> list[tuple[str, Callable[[], Tensor], int]]:
    """Return name, tensor and rank of each CP problem."""
    cube, collinear = ((100,) * 3, 30) if quick else ((240,) * 3, 100), ((80,) * 3, 20) if quick else ((200,) * 3, 60)
    higher = [((24,) * 4, 20), ((12,) * 5, 12), ((8,) * 6, 8)] if quick else [((56,) * 4, 60), ((24,) * 5, 40)]
    higher += [] if quick else [((14,) * 6, 30)]
    rows: list[tuple[str, Callable[[], Tensor], int]] = []
    rows.append(("low rank, noise 0.1", lambda: synthetic(cube[0], cube[1], noise=0.1), cube[1]))
    for cosine in (0.5, 0.7, 0.9):
        name = f"collinearity {cosine}"
        rows.append(
            (name, lambda c=cosine: synthetic(collinear[0], collinear[1], noise=0.01, collinearity=c), collinear[1])
        )
    for sizes, rank in higher:
        name = f"collinearity 0.5, order {len(sizes)}"
        rows.append((name, lambda s=sizes, r=rank: synthetic(s, min(r, *s), noise=0.01, collinearity=0.5), rank))
    pictures = images(data, 100 if quick else 1000)
    if pictures is None:
        console.print(f"no images: {data} is not there; give the file with --data; their rows are left out")
    else:
        rows.append(("CIFAR-10 images", lambda: pictures, 10 if quick else 40))
    return rows


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the rows of pairwise perturbation."""
    table = Table(title="pairwise perturbation against exact sweeps", title_justify="left", box=None)
    for name in ("problem", "shape", "rank", "exact", "spread", "pairwise", "spread", "faster"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("exact error", "pairwise error", "difference"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["problem"], "x".join(map(str, row["shape"])), str(row["rank"])]
        for side in SIDES:
            cells += [f"{row['seconds'][side]:.3f} s", f"{100 * row['spread'][side]:.0f} %"]
        cells += [f"{row['speedup']:.2f}x", *(f"{row['error'][side]:.6f}" for side in SIDES)]
        table.add_row(*cells, f"{row['difference']:+.1e}")
    console.print(table)


def show_tensorly(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the rows of the comparison with TensorLy."""
    table = Table(title="CP of a convolution, 10 sweeps", title_justify="left", box=None)
    for name in ("kernel", "rank", "ours", "TensorLy", "faster", "error", "error / TensorLy's"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        seconds, error = row["seconds"], row["error"]
        cells = ["x".join(map(str, row["shape"])), str(row["rank"]), f"{seconds['ours']:.3f} s"]
        cells += [f"{seconds['tensorly']:.2f} s", f"{row['speedup']:.1f}x", f"{error['ours']:.5f}"]
        table.add_row(*cells, f"{row['error_ratio']:.5f}")
    console.print(table)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw fit (1 - error) against time, one panel a problem."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = 3
    figure, axes = pyplot.subplots(math.ceil(len(rows) / columns), columns, figsize=(13, 3 * len(rows) / columns))
    for axis, row in zip(axes.flat, rows, strict=False):
        for side, label in zip(SIDES, ("exact sweeps", "pairwise perturbation"), strict=True):
            seconds, errors = zip(*row["trace"][side], strict=True)
            axis.plot(seconds, [1 - error for error in errors], marker=".", markersize=3, label=label)
        axis.set_title(f"{row['problem']} {'x'.join(map(str, row['shape']))}, rank {row['rank']}", fontsize=8)
        axis.set_xlabel("seconds")
        axis.set_ylabel("fit")
    for axis in axes.flat[len(rows) :]:
        axis.set_axis_off()
    axes.flat[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small tensors, which say little about speed")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, default=DATA, help="cifar10_jpeg.npz")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--plot", type=Path, help="also draw fit against time here")
    options = parser.parse_args()
    console = Console(width=170)
    tensorly.set_backend("pytorch")
    warnings.simplefilter("ignore")  # TensorLy's, on ranks above a mode's size
    environment = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "python": platform.python_version()}
    environment |= {"torch": torch.__version__, "tensorly": tensorly.__version__}
    console.print(", ".join(f"{k} {v}" for k, v in environment.items()))
    cp(torch.randn(1, 32, 32, 32), 8, method="pp")  # warm up, outside of the measurement
    rows = []
    for name, build, rank in problems(quick=options.quick, data=options.data, console=console):
        rows.append(measure(name, build(), rank, sweeps=60, repeats=options.repeats))
    pictures = images(options.data, 100 if options.quick else 1000)
    sizes = (60,) * 3 if options.quick else (240,) * 3
    noise = torch.randn(1, *sizes, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tuckers = [measure_tucker("tucker, normal", noise, tuple(n // 8 for n in sizes), repeats=options.repeats)]
    if pictures is not None:
        ranks = (len(pictures[0]) // 10, 12, 12, 2)
        tuckers.append(measure_tucker("tucker, CIFAR-10 images", pictures, ranks, repeats=options.repeats))
    show(console, rows + tuckers)
    size = 64 if options.quick else 512
    against = [measure_tensorly(rank, size=size, repeats=options.repeats) for rank in (16, 64, 128)]
    show_tensorly(console, against)
    if options.plot:
        plot(rows, options.plot)
    if options.json:
        report = {"environment": environment, "pairwise": rows + tuckers, "tensorly": against}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
