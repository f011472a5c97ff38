"""Measure the peak resident memory of each solver on a large linear layer and a large convolution, in float32.

    python tools/bench_memory.py [--quick] [--double] [--low-rank] [--methods M ..] [--json FILE]

Each solver runs in a fresh process. The figure is the peak minus the memory after the weight was made, as a multiple of
the weight's size; copies for casts and results count, and imports do not. Ranks are half of the full ones; 64 for cp
and 16 for tr. Weights are random with flat spectra. With ``--low-rank`` they have the wanted rank plus noise of 1e-5:
float32 Gram matrices then tell too little about the remainder, and solvers do more work. The table also has the
estimate of ``surgery.system.memory.estimate``, and the relative error of the outputs for random inputs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script finds modules in tools/ only

METHODS = ("svd", "tucker", "cp", "tt", "tr")
SHAPES: dict[str, tuple[int, ...]] = {"linear": (4096, 4096), "convolution": (2048, 2048, 3, 3)}
QUICK: dict[str, tuple[int, ...]] = {"linear": (1024, 1024), "convolution": (512, 512, 3, 3)}
MOST_RANK = {"cp": 64, "tr": 16}
NOISE = 1e-5
TARGET = 6.0  # times the weight


def memory_bytes(*, peak: bool) -> int:
    """Return the bytes of resident memory of this process now, or the largest since ``forget_peak`` (Linux)."""
    name = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Reset the largest resident memory to the present one."""
    Path("/proc/self/clear_refs").write_text("5")


def operator_of(shape: tuple[int, ...], *, double: bool) -> Any:
    """Return an operator of random weights."""
    import torch

    from surgery.algebra import Conv, Geometry, Linear

    weight = torch.empty(shape, dtype=torch.float64 if double else torch.float32)
    weight.normal_(generator=torch.Generator().manual_seed(0))
    dims = len(shape) - 2
    return Conv(weight, Geometry.pointwise(dims)) if dims else Linear(weight)


def nearly_of_rank(factorization: Any, operator: Any, ranks: tuple[int, ...]) -> Any:
    """Return an operator that random factors of these ranks compose to, plus noise."""
    import torch

    factors = []
    for shape in factorization.shapes(tuple(operator.kernel.shape), ranks):
        factors.append(torch.randn(shape, dtype=operator.weight.dtype, generator=torch.Generator().manual_seed(1)))
    if factorization.name == "tt" and len(operator.kernel.shape) == 3:  # to compose a Kronecker sum takes far more
        (first, second), (rank,) = factors, ranks
        split = first.unflatten(1, (-1, rank)), second.unflatten(2, (-1, rank))
        composed = replace(operator, weight=torch.einsum("gprb,gqar->gpqab", *split).flatten(3).flatten(1, 2)[0])
    else:
        composed = factorization.assemble(operator, factors, ranks).compose()
    size = composed.weight.norm() / operator.weight.norm()
    return replace(composed, weight=composed.weight + NOISE * size * operator.weight)


def measure(method: str, shape: tuple[int, ...], *, double: bool, low_rank: bool) -> dict[str, Any]:
    """Factor a weight in this process; return bytes, seconds and error, or the reason why nothing was measured."""
    import torch

    from surgery.algebra import relative_error
    from surgery.errors import Refusal
    from surgery.factorizations import FACTORIZATIONS
    from surgery.system.memory import estimate

    factorization, operator = FACTORIZATIONS[method], operator_of(shape, double=double)
    if (refusal := factorization.refuse(operator)) is not None:
        return {"refused": refusal.reason}
    most = MOST_RANK.get(method, max(shape) * 9)
    ranks = tuple(max(1, min(full // 2, most)) for full in factorization.max_ranks(operator))
    if low_rank:
        operator = nearly_of_rank(factorization, operator, ranks)
    forget_peak()
    before, start = memory_bytes(peak=False), time.perf_counter()
    if isinstance(chain := factorization.factor(operator, ranks), Refusal):
        return {"refused": chain.reason}
    seconds, peak = time.perf_counter() - start, memory_bytes(peak=True) - before
    weight = operator.weight
    inputs = torch.randn((8, shape[1], *[4] * (len(shape) - 2)), dtype=weight.dtype)
    return {
        "ranks": ranks,
        "weight": weight.nbytes,
        "peak": peak,
        "estimated": estimate(method, tuple(operator.kernel.shape), weight.element_size()),
        "seconds": seconds,
        "error": relative_error(chain(inputs), operator(inputs)),
    }


def in_fresh_process(method: str, shape: tuple[int, ...], options: list[str]) -> dict[str, Any]:
    """Return the result of ``measure`` in a new process; this process stays small because it never imports torch."""
    command = [sys.executable, __file__, "--one", method, *map(str, shape), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"refused": (done.stderr.strip().splitlines() or ["it failed"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one weight."""
    print(
        f"\n{title}\n{'solver':8}{'ranks':>22}{'peak':>12}{'weights':>10}{'estimate':>10}{'seconds':>10}{'error':>10}"
    )
    for row in rows:
        if "refused" in row:
            print(f"{row['method']:8}  refused: {row['refused'][:100]}")
            continue
        times, estimated = row["peak"] / row["weight"], row["estimated"] / row["weight"]
        over = "" if times <= TARGET else "  over the target"
        ranks = ",".join(map(str, row["ranks"]))
        print(
            f"{row['method']:8}{ranks:>22}{row['peak'] / 2**20:9.0f} MB{times:9.1f}x{estimated:9.1f}x"
            f"{row['seconds']:10.1f}{row['error']:10.2g}{over}"
        )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small weights, where the process outweighs the solver")
    parser.add_argument("--double", action="store_true", help="float64 weights")
    parser.add_argument("--low-rank", action="store_true", help="weights that nearly have the wanted rank")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        method, *sizes = options.one
        print(json.dumps(measure(method, tuple(map(int, sizes)), double=options.double, low_rank=options.low_rank)))
        return
    flags = ["--double"] * options.double + ["--low-rank"] * options.low_rank
    dtype, report = "float64" if options.double else "float32", []
    for name, shape in (QUICK if options.quick else SHAPES).items():
        rows = [{"method": m} | in_fresh_process(m, shape, flags) for m in options.methods]
        show(f"{name} {'x'.join(map(str, shape))}, {' '.join([dtype, *flags])}", rows)
        report += [row | {"shape": shape} for row in rows]
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
