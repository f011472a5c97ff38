"""Measure the peak resident memory of each solver on a large linear layer and a large convolution, in float32.

    python tools/bench_memory.py [--quick] [--double] [--json FILE]

Each runs in a fresh process: what its peak adds to the peak after the weight is made, as a multiple of the weight's
size, so that copies made for casts and of results count, and imports do not. At half ranks; cp and tr at rank 64 and
16. Weights are random, of flat spectra; weights that nearly have the rank are solved in float64, as those with
``--double`` are. Beside it what ``surgery.solvers.memory.estimate`` says.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, python looks in tools/ only

METHODS = ("svd", "tucker", "cp", "tt", "tr")
SHAPES: dict[str, tuple[int, ...]] = {"linear": (4096, 4096), "convolution": (2048, 2048, 3, 3)}
QUICK: dict[str, tuple[int, ...]] = {"linear": (1024, 1024), "convolution": (512, 512, 3, 3)}
MOST_RANK = {"cp": 64, "tr": 16}
TARGET = 6.0  # times the weight


def peak_bytes() -> int:
    """Return the largest resident memory so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(method: str, shape: tuple[int, ...], *, double: bool) -> dict[str, Any]:
    """Factor a random weight in this process; return bytes and seconds, or why there is nothing to measure."""
    import torch

    from surgery.errors import Refusal
    from surgery.factorizations import FACTORIZATIONS
    from surgery.operators import Conv, Geometry, Linear
    from surgery.solvers.memory import estimate

    if method not in FACTORIZATIONS:
        return {"refused": "there is no such method"}
    factorization = FACTORIZATIONS[method]
    weight = torch.empty(shape, dtype=torch.float64 if double else torch.float32)
    weight.normal_(generator=torch.Generator().manual_seed(0))
    dims = len(shape) - 2
    operator = Conv(weight, Geometry.pointwise(dims)) if dims else Linear(weight)
    if (refusal := factorization.refuse(operator)) is not None:
        return {"refused": refusal.reason}
    most = MOST_RANK.get(method, max(shape) * 9)
    ranks = tuple(max(1, min(full // 2, most)) for full in factorization.max_ranks(operator))
    before, start = peak_bytes(), time.perf_counter()
    if isinstance(chain := factorization.factor(operator, ranks), Refusal):
        return {"refused": chain.reason}
    seconds, size = time.perf_counter() - start, weight.numel() * weight.element_size()
    estimated = estimate(method, tuple(operator.kernel.shape), weight.element_size())
    return {
        "ranks": ranks,
        "weight": size,
        "peak": peak_bytes() - before,
        "estimated": estimated,
        "seconds": seconds,
    }


def in_fresh_process(method: str, shape: tuple[int, ...], *, double: bool) -> dict[str, Any]:
    """Return what ``measure`` says in a process of its own; this one has not imported torch, so that it is small."""
    command = [sys.executable, __file__, "--one", method, *map(str, shape), *["--double"] * double]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"refused": (done.stderr.strip().splitlines() or ["it failed"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one weight."""
    print(f"\n{title}\n{'solver':8}{'ranks':>22}{'peak':>12}{'weights':>10}{'estimate':>10}{'seconds':>10}")
    for row in rows:
        if "refused" in row:
            print(f"{row['method']:8}  refused: {row['refused'][:100]}")
            continue
        times, estimated = row["peak"] / row["weight"], row["estimated"] / row["weight"]
        over = "" if times <= TARGET else "  over the target"
        ranks = ",".join(map(str, row["ranks"]))
        print(
            f"{row['method']:8}{ranks:>22}{row['peak'] / 2**20:9.0f} MB{times:9.1f}x{estimated:9.1f}x"
            f"{row['seconds']:10.1f}{over}"
        )


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small weights: quick, but of processes more than solvers")
    parser.add_argument("--double", action="store_true", help="float64 weights")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        method, *sizes = options.one
        print(json.dumps(measure(method, tuple(map(int, sizes)), double=options.double)))
        return
    report = []
    for name, shape in (QUICK if options.quick else SHAPES).items():
        rows = [{"method": m} | in_fresh_process(m, shape, double=options.double) for m in METHODS]
        show(f"{name} {'x'.join(map(str, shape))}, {'float64' if options.double else 'float32'}", rows)
        report += [row | {"shape": shape} for row in rows]
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
