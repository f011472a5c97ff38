"""Time recurrent layers with dense and with factored weights, under torch and under onnxruntime, interleaved.

    python tools/bench_recurrent.py [--threads N] [--seconds S] [--json FILE]

A step of an LSTM or a GRU is ``gates = W x + R h + b`` with W (G H, I), R (G H, H), G = 4 or 3. At rank r:

    input    W = U V. V is one linear layer on all steps, before the runtime's own kernel with U as its input weight
    both     R = Q P as well. The kernels take a dense R only, so there is a loop over the steps: W's part of all gates
             at once, then two products and the gates for each step (a Python loop in torch, Scan in onnxruntime)
    loop     the same loop with dense weights: what the loop alone costs

Ranks are a half and a quarter of I for W and of H for R. Weights are random: times do not depend on their values. Each
row's output is checked against the kernel's with the composed weights. Speed-ups are over the dense kernel of the same
runtime, with 95 % intervals: above 1, the row is faster.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from recurrent_cases import Kernel, Layer, Loop, Weights, composed, onnx_kernel, onnx_loop, random_weights
from rich.console import Console
from rich.table import Table
from torch import Tensor

from surgery.benchmark import environment
from surgery.chain import relative_error
from surgery.cost.timing import Budget, bind, compare_samples, interleave, open_session

TOLERANCE = 1e-4  # of float32 outputs over all steps
FRACTIONS = (0.5, 0.25)
LAYERS = [Layer(kind, *size) for kind in ("LSTM", "GRU") for size in ((256, 512), (512, 512), (512, 512, 64, 1))]


def variants(layer: Layer) -> Iterator[tuple[str, Weights, bool]]:
    """Yield each row's name, its weights, and whether it is a loop; the dense kernel comes first."""
    dense = random_weights(layer, None, None)
    yield "dense kernel", dense, False
    yield "loop, dense", dense, True
    for fraction in FRACTIONS:
        rank, recurrent = int(fraction * layer.inputs), int(fraction * layer.hidden)
        yield f"input, rank {rank}", random_weights(layer, rank, None), False
        yield f"both, ranks {rank} and {recurrent}", random_weights(layer, rank, recurrent), True


def torch_run(layer: Layer, weights: Weights, loop: bool, x: Tensor) -> tuple[Callable[[], object], Tensor]:
    """Return what runs a variant under torch, and its output."""
    module = (Loop if loop else Kernel)(layer, weights).eval()
    return lambda: module(x), module(x)


def onnx_run(layer: Layer, weights: Weights, loop: bool, x: Tensor) -> tuple[Callable[[], object], Tensor]:
    """Return what runs a variant under onnxruntime, and its output."""
    session = open_session((onnx_loop if loop else onnx_kernel)(layer, weights), threads=torch.get_num_threads())
    [out] = session.run(None, {"x": x.numpy()})
    return bind(session, {"x": x.numpy()}), torch.from_numpy(out)


RUNTIMES = {"torch": torch_run, "onnxruntime": onnx_run}


def measure(layer: Layer, seconds: float) -> list[dict[str, Any]]:
    """Check all variants, then time those of one runtime at a time, interleaved."""
    x = torch.randn(layer.steps, layer.batch, layer.inputs, generator=torch.Generator().manual_seed(1))
    rows, all_variants = [], list(variants(layer))
    for runtime, build in RUNTIMES.items():
        runs = []
        for name, weights, loop in all_variants:
            run, out = build(layer, weights, loop, x)
            error = relative_error(out, Kernel(layer, composed(weights))(x))
            if error > TOLERANCE:
                raise SystemExit(f"{runtime}, {layer}, {name}: the output is off by {error:.1g}")
            runs.append(run)
        samples = interleave(runs, Budget(seconds))
        for (name, *_), sample in zip(all_variants, samples, strict=True):
            speedup = compare_samples(samples[0], sample)
            row = {"layer": str(layer), **asdict(layer), "runtime": runtime, "variant": name, "seconds": sample.median}
            interval = {"speedup": speedup.value, "low": speedup.low, "high": speedup.high}
            rows.append(row | interval | {"verdict": speedup.verdict})
    return rows


def show(console: Console, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one layer."""
    table = Table(title=rows[0]["layer"], title_justify="left", box=None)
    for column in ("runtime", "weights", "ms", "speed-up", "95 % interval", "verdict"):
        table.add_column(column, justify="right" if column in ("ms", "speed-up", "95 % interval") else "left")
    for row in rows:
        first = row["variant"] == "dense kernel"
        compared = [f"{row['speedup']:.2f}x", f"{row['low']:.2f} to {row['high']:.2f}", row["verdict"]]
        table.add_row(row["runtime"], row["variant"], f"{1e3 * row['seconds']:.2f}", *([] if first else compared))
    console.print(table)
    console.print()


@torch.inference_mode()
def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="by default the physical cores")
    parser.add_argument("--seconds", type=float, default=6.0, help="to time all rows of one layer and runtime")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    where = environment(options.threads)
    torch.set_num_threads(where.threads)
    console = Console(width=120)
    console.print(", ".join(f"{name} {value}" for name, value in asdict(where).items()))
    rows: list[dict[str, Any]] = []
    for layer in LAYERS:
        rows += measure(layer, options.seconds)
        show(console, [row for row in rows if row["layer"] == str(layer)])
    if options.json:
        options.json.write_text(json.dumps({"environment": asdict(where), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
