"""Time recurrent layers with dense and with factored weights, under torch and under onnxruntime, interleaved.

    python tools/bench_recurrent.py [--threads N] [--seconds S] [--json FILE]

A step of an LSTM or a GRU is ``gates = W x + R h + b`` with W (G H, I), R (G H, H), G = 4 or 3. ``surgery.decompose``
factors W and R at a half and at a quarter of the full ranks:

    input    W alone: one linear layer on all steps, before the runtime's own kernel with the other factor as its W
    both     R as well: a loop over the steps (in Python under torch, a Scan under onnxruntime), because no kernel takes
             a factored R

Weights are random, since times do not depend on their values. Each row's output is checked against the recomposed
layer, and the output of onnxruntime against that of torch. Speed-ups are relative to the dense kernel of the same
runtime, with 95 % intervals; above 1 the row is faster.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import surgery
from surgery.algebra import relative_error
from surgery.cost.onnxruntime.sessions import bind
from surgery.cost.timing import Budget, compare_samples, interleave
from surgery.kinds.onnx.session import open_session
from surgery.runtime.bench import environment

TOLERANCE = 1e-4  # relative error of float32 outputs over all steps
FRACTIONS = (0.5, 0.25)


@dataclass(frozen=True)
class Layer:
    """A kind, its sizes, and the sizes of its input."""

    kind: str
    inputs: int
    hidden: int
    steps: int = 64
    batch: int = 8

    def __str__(self) -> str:
        return f"{self.kind} {self.inputs} -> {self.hidden}, {self.steps} steps, batch {self.batch}"


SIZES = ((128, 256), (256, 512), (512, 512), (512, 512, 64, 1), (1024, 1024))
LAYERS = [Layer(kind, *size) for kind in ("LSTM", "GRU") for size in SIZES]


class Network(nn.Module):
    """A recurrent layer that returns only its hidden states."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.rnn = getattr(nn, layer.kind)(layer.inputs, layer.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden states (steps, batch, H) of inputs (steps, batch, I)."""
        out: Tensor = self.rnn(x)[0]
        return out


def variants(layer: Layer, x: Tensor) -> Iterator[tuple[str, nn.Module]]:
    """Yield each row's name and its network; the dense kernel comes first."""
    dense = Network(layer).eval()
    yield "dense kernel", dense
    for fraction in FRACTIONS:
        full = {"rnn.ih_l0": layer.inputs, "rnn.hh_l0": layer.hidden}
        ranks = {name: int(fraction * rank) for name, rank in full.items()}
        for words, names in (("input", ["rnn.ih_l0"]), ("both", list(ranks))):
            done = surgery.decompose(dense, x, ranks=ranks, factorization="svd", include=names)
            whole = surgery.recompose(done.model, x).model
            check(f"{layer}, {words}", done.model(x), whole(x))
            yield f"{words}, rank {' and '.join(str(ranks[name]) for name in names)}", done.model


def check(what: str, actual: Tensor, expected: Tensor) -> None:
    """Stop if two outputs differ by more than rounding."""
    error = relative_error(actual, expected)
    if error > TOLERANCE:
        raise SystemExit(f"{what}: the output is off by {error:.1g}")


def measure(layer: Layer, seconds: float) -> list[dict[str, Any]]:
    """Check all variants, then time those of one runtime at a time, interleaved."""
    x = torch.randn(layer.steps, layer.batch, layer.inputs, generator=torch.Generator().manual_seed(1))
    found = list(variants(layer, x))
    runs: dict[str, list[Any]] = {"torch": [lambda model=model: model(x) for _, model in found], "onnxruntime": []}
    with tempfile.TemporaryDirectory() as folder:
        for number, (_, model) in enumerate(found):
            file = Path(folder) / f"{number}.onnx"
            surgery.export_onnx(model, file, x)
            session = open_session(file, threads=torch.get_num_threads())
            runs["onnxruntime"].append(bind(session, {session.get_inputs()[0].name: x.numpy()}))
        rows = []
        for runtime, calls in runs.items():
            samples = interleave(calls, Budget(seconds))
            for (name, _), sample in zip(found, samples, strict=True):
                speedup = compare_samples(samples[0], sample)
                row = {"layer": str(layer), **asdict(layer), "runtime": runtime, "variant": name}
                row |= {"seconds": sample.median, "speedup": speedup.value, "low": speedup.low, "high": speedup.high}
                rows.append(row | {"verdict": speedup.verdict})
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
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
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
