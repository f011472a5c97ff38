"""Check promises of `auto` on data that it has never seen: count how many of those that it reports as kept are kept.

    python tools/bench_promises.py --json promises.json
    python tools/bench_promises.py --network cifar --network mnist --data FOLDER
    python tools/bench_promises.py --network minilm --network efficientnet-module

Some of each network's samples calibrate, some are for the metric, and the rest are for this test alone. Each promise of
the grid is asked for; so is the default promise, without data. The returned model is measured again:

    max_error        relative error of the output on the unseen samples, without positions that a mask hides
    max_drop         loss of the metric (accuracy, cosine, agreement) on the unseen samples; each sample has a score
    target_speedup   median speed-up of the ONNX files of torch's own exporter, each model in new processes

The speed-up is measured of every changed model, and compared with the reported one, if there is one.

Two networks that cannot get faster come last, one of depthwise convolutions and a tiny one: `auto` must return them
unchanged, and say why.

A promise that `auto` itself says it cannot keep (exit status 3 on the command line) counts as refused. If `auto`
returns the original, a promise of quality is kept, and the speed-up is 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
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
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import surgery
from surgery.cost.base import make_backend
from surgery.passes.results import DecomposeResult
from surgery.plans.goal import Goal, GoalKind
from surgery.runtime.bench import environment
from tools.fresh import fresh_speedups
from tools.trained import Model, Network, open_network, option_parser, split

GRID: dict[GoalKind, tuple[float, ...]] = {
    "max_error": (0.02, 0.05, 0.1, 0.2),
    "max_drop": (0.002, 0.005, 0.01, 0.02),
    "target_speedup": (1.1, 1.25, 1.5, 2.0),
}
NEAR = 1.1  # a missed promise counts as near if the measured value is within a tenth of its limit


@dataclass(frozen=True)
class Row:
    """One promise: its limit, the report of `auto`, and the values measured afterwards.

    ``speedup`` is the reported one, and ``fresh`` has those of new processes; both are empty if the original came back.
    """

    network: str
    asked: str
    kind: str
    limit: float
    said_kept: bool
    said: float
    found: float
    original: bool
    speedup: float | None
    fresh: tuple[float, ...]
    seconds: float

    @property
    def kept(self) -> bool:
        """Whether the promise is kept on unseen data."""
        return self.found >= self.limit if self.kind == "target_speedup" else self.found <= self.limit

    @property
    def near(self) -> bool:
        """Whether the promise is missed by at most a tenth of its limit."""
        if self.kind == "target_speedup":
            return self.found * NEAR >= self.limit
        return self.found <= self.limit * NEAR

    @property
    def verdict(self) -> str:
        """The outcome of the promise, in a word or two."""
        return "kept" if self.kept else "refused" if not self.said_kept else "near" if self.near else "MISSED"


def output_error(network: Network, changed: Model) -> float:
    """Return the relative error of all floating-point outputs on the samples of a network."""
    lost = whole = 0.0
    for part in network.parts():
        for x, y in zip(_outputs(network.model, part), _outputs(changed, part), strict=True):
            lost, whole = lost + float((y - x).square().sum()), whole + float(x.square().sum())
    return (lost / whole) ** 0.5


@torch.no_grad()
def _outputs(model: Model, part: Network) -> list[Tensor]:
    module = model.module() if isinstance(model, ExportedProgram) else model
    leaves = pytree.tree_leaves(module(*part.inputs.values()))
    floats = [leaf.double() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    shown = part.inputs.get("attention_mask")
    return [leaf if shown is None or leaf.shape[:2] != shown.shape else leaf[shown.bool()] for leaf in floats]


def check(result: DecomposeResult[Any], test: Network, name: str, options: argparse.Namespace, taken: float) -> Row:
    """Measure the promise of a result on unseen samples and in new processes."""
    promise = result.promise
    assert promise is not None
    fresh: list[float] = []
    if result.changes:
        example = test.program.example_inputs[0]
        fresh = fresh_speedups(test.model, result.model, example, options.seconds, options.processes)
    if promise.kind == "target_speedup":
        found = statistics.median(fresh) if fresh else 1.0
    elif promise.kind == "max_error":
        found = output_error(test, result.model) if fresh else 0.0
    else:
        found = test.score(test.model) - test.score(result.model) if fresh else 0.0
    timing = None if result.search is None else result.search.timing
    speedup = None if timing is None or not fresh else timing.comparisons[0].speedup
    values = (promise.kind, promise.limit, promise.kept, promise.measured, found, not fresh, speedup)
    return Row(test.name, name, *values, tuple(fresh), taken)


def rows(network: Network, options: argparse.Namespace) -> Iterator[Row]:
    """Yield the row of each promise of the grid, and of the default promise."""
    calibration, rest = split(network, options.samples, seed=0)
    metric, test = split(rest, len(rest) // 2, seed=1)
    asked: list[tuple[str, dict[str, Any]]] = [("nothing", {})]
    for kind in options.promise or GRID:
        for limit in GRID[kind]:
            goal = Goal(kind, limit, metric.scores if kind == "max_drop" else None)
            asked.append((str(goal), {"calibration": calibration.inputs, "ranks": goal}))
    for name, arguments in asked:
        start = time.perf_counter()
        result = network.decompose(**arguments)
        taken = time.perf_counter() - start
        if result.promise is not None:
            yield check(result, test, name, options, taken)


def unpaying() -> dict[str, nn.Module]:
    """Return networks that factoring cannot make faster: most work is depthwise, or there is hardly any work."""
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
    """Print the answers of `auto` for networks that cannot get faster, asked for an error and for a speed-up."""
    images = torch.randn(256, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    table = Table("network", "asked for", "returned", "why")
    for name, model in unpaying().items():
        for goal in (Goal.error(0.05), Goal.speedup(1.5)):
            result = surgery.decompose(model, images[:1], calibration=images, ranks=goal)
            assert result.promise is not None
            timing = None if result.search is None else result.search.timing
            returned = "the original" if result.model is model else "a changed model"
            if timing is not None:
                returned += f", {timing.comparisons[0].speedup:.2f}x"
            table.add_row(name, str(goal), returned, result.promise.note)
    console.print(table)


def show(console: Console, found: list[Row]) -> None:
    """Print all promises, then those that are not kept, then the share of kept ones."""
    table = Table("network", "asked for", "promised", "auto says", "on unseen", "", "says", "new processes", "seconds")
    for row in found:
        said = f"{row.said:.3g}" if row.said_kept else f"{row.said:.3g}, not kept"
        says = "original" if row.original else "-" if row.speedup is None else f"{row.speedup:.2f}x"
        fresh = " ".join(f"{speedup:.2f}" for speedup in row.fresh)
        limit, seconds = f"{row.kind} {row.limit:g}", f"{row.seconds:.0f}"
        table.add_row(row.network, row.asked, limit, said, f"{row.found:.3g}", row.verdict, says, fresh, seconds)
    console.print(table)
    promised = [row for row in found if row.said_kept]
    for row in promised:
        if not row.kept:
            console.print(f"not kept: {row.network}, {row.asked}: {row.kind} {row.limit:g}, found {row.found:.4g}")
    kept, near = sum(row.kept for row in promised), sum(row.near and not row.kept for row in promised)
    console.print(
        f"{len(found)} asked for, {len(promised)} promised, {len(found) - len(promised)} refused; of those promised "
        f"{kept} ({100 * kept / max(1, len(promised)):.1f} %) are kept on unseen data, {near} more within a tenth of "
        f"the limit; {sum(row.original for row in promised)} by the original"
    )
    show_speeds(console, found)


def show_speeds(console: Console, found: list[Row]) -> None:
    """Print the speed-ups in new processes divided by the reported ones, and list the models that are slower."""
    changed = [row for row in found if row.fresh]
    for row in changed:
        if statistics.median(row.fresh) < 1:
            console.print(f"slower: {row.network}, {row.asked}: {statistics.median(row.fresh):.3f}x in new processes")
    said = [statistics.median(row.fresh) / row.speedup for row in changed if row.speedup is not None]
    faster = sum(statistics.median(row.fresh) >= 1 for row in changed)
    console.print(f"{faster} of {len(changed)} changed models are no slower than the original in new processes")
    if said:
        console.print(
            f"speed-up in new processes over that said: median {statistics.median(said):.3f}, "
            f"{min(said):.3f} to {max(said):.3f}"
        )


def main() -> None:
    """Ask, measure, print and write."""
    warnings.simplefilter("ignore")  # torch warns about itself
    parser = option_parser(__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument("--promise", choices=GRID, action="append", help="may be repeated  [default: all]")
    parser.add_argument("--processes", type=int, default=3, help="how often both models are timed in new processes")
    options = parser.parse_args()
    console, found = Console(), []
    where = environment(make_backend().threads)
    for name in options.network or ["fashion"]:
        for row in rows(open_network(name, options), options):
            found.append(row)
            console.print(f"{row.network} {row.asked}: {row.seconds:.0f} s, found {row.found:.4g}, {row.verdict}")
            if options.json:  # print each row as soon as it is known, since all together take long
                values = {"rows": [asdict(row) for row in found], "environment": asdict(where)}
                options.json.write_text(json.dumps(values, indent=2) + "\n")
    show(console, found)
    show_unpaying(console)
    console.print(f"{where.cpu}, {where.threads} threads, onnxruntime {where.onnxruntime}, torch {where.torch}")


if __name__ == "__main__":
    main()
