"""Promises of `auto` on data that it has never seen: how many of those that it says it kept are kept.

    python tools/bench_promises.py --json promises.json
    python tools/bench_promises.py --network cifar --network mnist --data FOLDER

Of each network's labelled images some calibrate, some are for the metric, and the rest are for this test alone. Each
promise of the grid is asked for; what is returned is measured again:

    max_error        relative error of the output on the unseen images
    max_drop         accuracy lost on the unseen images; the metric's scores are given for each image
    target_speedup   a timing of its own, both models interleaved

Two networks that cannot get faster come last, one of depthwise convolutions and a tiny one: `auto` is to return them as
they are, and to say why.

A promise that `auto` itself says it cannot keep (exit status 3 on the command line) counts as refused. Where it returns
the original, what it promises of quality is kept, and the speed-up is 1.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, python looks in tools/ only

import surgery
from surgery.benchmark import bench, environment
from surgery.cost.latency import Latencies
from tools.trained import NETWORKS, Network, read_options, split

GRID: dict[str, tuple[float, ...]] = {
    "max_error": (0.02, 0.05, 0.1, 0.2),
    "max_drop": (0.002, 0.005, 0.01, 0.02),
    "target_speedup": (1.1, 1.25, 1.5, 2.0),
}
NEAR = 1.1  # a promise that is missed counts as near within a tenth of its limit


@dataclass(frozen=True)
class Row:
    """One promise: what `auto` said, what was measured afterwards, and the speed-up that it found."""

    network: str
    kind: str
    limit: float
    said_kept: bool
    said: float
    found: float
    original: bool
    speedup: float | None
    seconds: float

    @property
    def kept(self) -> bool:
        """Whether it is kept on what was never seen."""
        return self.found >= self.limit if self.kind == "target_speedup" else self.found <= self.limit

    @property
    def near(self) -> bool:
        """Whether it is missed by a tenth of its limit at most."""
        if self.kind == "target_speedup":
            return self.found * NEAR >= self.limit
        return self.found <= self.limit * NEAR


@torch.no_grad()
def output_error(network: Network, changed: Any) -> float:
    """Return the relative error of the outputs on all images of a network."""
    before, after = network.program.module(), changed.module()
    pairs = [(before(x).double(), after(x).double()) for x in network.images.split(250)]
    lost = sum(float((y - x).square().sum()) for x, y in pairs)
    return (lost / sum(float(x.square().sum()) for x, _ in pairs)) ** 0.5


def measure(kind: str, test: Network, changed: Any, seconds: float) -> float:
    """Return what a promise is about, of a changed program on unseen images."""
    if kind == "max_error":
        return output_error(test, changed)
    if kind == "max_drop":
        return test.accuracy(test.program.module()) - test.accuracy(changed.module())
    return bench([test.program, changed], seconds=seconds).comparisons[0].speedup


def rows(name: str, network: Network, samples: int, seconds: float) -> Iterator[Row]:
    """Yield the row of each promise of the grid."""
    calibration, rest = split(network, samples, seed=0)
    metric, test = split(rest, len(rest.labels) // 2, seed=1)
    for kind, limits in GRID.items():
        for limit in limits:
            start = time.perf_counter()
            asked: dict[str, Any] = {kind: limit}
            if kind == "max_drop":
                asked["eval_fn"] = metric.right
            result = surgery.decompose(network.program, calibration=calibration.images, **asked)
            taken = time.perf_counter() - start
            assert result.promise is not None
            original = not result.changes
            same = float(kind == "target_speedup")
            found = same if original else measure(kind, test, result.model, seconds)
            timing = None if result.search is None else result.search.timing
            speedup = None if timing is None else timing.comparisons[0].speedup
            promise = result.promise
            yield Row(name, kind, limit, promise.kept, promise.measured, found, original, speedup, taken)


def unpaying() -> dict[str, nn.Module]:
    """Return networks that factoring cannot make faster: most work is depthwise, or there is hardly any."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for _ in range(6):
        blocks += [nn.Conv2d(24, 24, 7, padding=3, groups=24), nn.Conv2d(24, 24, 1), nn.ReLU()]
    stem, head = nn.Conv2d(1, 24, 3, padding=1), (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    small = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    return {
        "depthwise": nn.Sequential(stem, nn.ReLU(), *blocks, *head, nn.Linear(24, 10)).eval(),
        "tiny": nn.Sequential(*small, *head, nn.Linear(8, 10)).eval(),
    }


def show_unpaying(console: Console) -> None:
    """Print what `auto` makes of the networks that cannot get faster, asked for an error and for a speed-up."""
    images = torch.randn(256, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    table = Table("network", "asked for", "returned", "why")
    for name, model in unpaying().items():
        for asked in ({"max_error": 0.05}, {"target_speedup": 1.5}):
            result = surgery.decompose(model, images[:1], calibration=images, **asked)
            assert result.promise is not None
            timing = None if result.search is None else result.search.timing
            returned = "the original" if result.model is model else "a changed model"
            if timing is not None:
                returned += f", {timing.comparisons[0].speedup:.2f}x"
            table.add_row(name, " ".join(f"{k}={v}" for k, v in asked.items()), returned, result.promise.note)
    console.print(table)


def show(console: Console, found: list[Row]) -> None:
    """Print each promise, and the share of those kept."""
    table = Table("network", "promise", "limit", "auto says", "on unseen", "", "at", "seconds")
    for row in found:
        said = f"{row.said:.3g}" if row.said_kept else f"{row.said:.3g}, not kept"
        verdict = "kept" if row.kept else "refused" if not row.said_kept else "near" if row.near else "MISSED"
        speedup = "original" if row.original else "-" if row.speedup is None else f"{row.speedup:.2f}x"
        cells = (f"{row.limit:g}", said, f"{row.found:.3g}", verdict, speedup, f"{row.seconds:.0f}")
        table.add_row(row.network, row.kind, *cells)
    console.print(table)
    promised = [row for row in found if row.said_kept]
    kept, near = sum(row.kept for row in promised), sum(row.near and not row.kept for row in promised)
    console.print(
        f"{len(found)} asked for, {len(promised)} promised, {len(found) - len(promised)} refused; of those promised "
        f"{kept} ({100 * kept / max(1, len(promised)):.1f} %) are kept on unseen data, {near} more within a tenth of "
        f"the limit; {sum(row.original for row in promised)} by the original"
    )


def main() -> None:
    """Ask, measure, print and write."""
    warnings.simplefilter("ignore")  # of torch about itself
    options = read_options(__doc__.splitlines()[0])
    console, found = Console(), []
    for name in options.network or ["fashion"]:
        for row in rows(name, NETWORKS[name](options.data), options.samples, options.seconds):
            found.append(row)
            console.print(f"{row.network} {row.kind} {row.limit:g}: {row.seconds:.0f} s")
    show(console, found)
    show_unpaying(console)
    where = environment(Latencies().threads)
    console.print(f"{where.cpu}, {where.threads} threads, onnxruntime {where.onnxruntime}, torch {where.torch}")
    if options.json:
        values = {"rows": [asdict(row) for row in found], "environment": asdict(where)}
        options.json.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
