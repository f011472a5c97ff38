"""Accuracy without retraining at equal measured speed-up: `auto` with calibration data against the usual rank rules.

    python tools/bench_accuracy.py --json accuracy.json
    python tools/bench_accuracy.py --network cifar --data FOLDER

Each rule is swept over its own parameter; every model is timed against the original, interleaved, and its accuracy is
that of test images which neither training nor calibration has seen. `auto` is asked for each target; the accuracy of
a rule is read off the line through its points (best accuracy at that speed-up or more), in the table at the target, and
for what is lost against the best of them at the speed-up that was measured for `auto`.

    energy      SVD of every layer at one energy threshold
    vbmf        Tucker at the ranks of EVBMF, weakened or strengthened by a factor
    uniform     all ranks the same share of full
    auto        --calibration --target-speedup

`predicted` is the latency of the whole model that `auto` expected before it was fitted, from a model with random
factors (or from what each site saves alone), over the one measured in the end.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, python looks in tools/ only

import itertools

import surgery
from surgery.benchmark import bench, environment
from surgery.cost.latency import Latencies
from surgery.factorizations import fitting
from surgery.passes.decompose import find_sites, plan
from tools.trained import NETWORKS, Network, read_options, split

TARGETS = (1.25, 1.5, 2.0, 3.0)
SWEEPS: dict[str, tuple[float, ...]] = {
    "energy": (0.99, 0.97, 0.94, 0.9, 0.8, 0.6),
    "vbmf": (2.0, 1.5, 1.0, 0.75, 0.5, 0.3),
    "uniform": (0.7, 0.55, 0.4, 0.3, 0.2, 0.1),
}


@dataclass(frozen=True)
class Point:
    """One factored model: how it was made, its measured speed-up, and its accuracy."""

    rule: str
    parameter: float
    speedup: float
    accuracy: float
    predicted: float | None = None


def baseline_ranks(network: Network, rule: str, parameter: float) -> dict[str, Any]:
    """Return the arguments of decompose for a rule at one value of its parameter."""
    if rule == "energy":
        return {"ranks": f"energy={parameter}", "factorization": "svd"}
    if rule == "vbmf":
        found = plan(network.program, ranks="vbmf", factorization="tucker")
        ranks = {d.site: tuple(max(1, round(parameter * r)) for r in d.rank) for d in found if d.rank is not None}
    else:
        ranks = {}
    sites = {site.name: site for site in find_sites(network.program)[0]}
    if rule == "uniform":
        for name, site in sites.items():
            fits = fitting(site.operator)
            if isinstance(fits, list):
                ranks[name] = tuple(max(1, math.ceil(parameter * full)) for full in fits[0].max_ranks(site.operator))
        return {"ranks": ranks}
    limits = {name: fitting(sites[name].operator, "tucker") for name in ranks}
    full = {name: fits[0].max_ranks(sites[name].operator) for name, fits in limits.items() if isinstance(fits, list)}
    return {"ranks": {n: tuple(map(min, ranks[n], full[n])) for n in full}, "factorization": "tucker"}


def baselines(network: Network, test: Network, seconds: float) -> Iterator[Point]:
    """Yield the points of every rule."""
    for rule, parameters in SWEEPS.items():
        for parameter in parameters:
            result = surgery.decompose(network.program, **baseline_ranks(network, rule, parameter))
            if result.changes:
                timing = bench([network.program, result.model], seconds=seconds)
                accuracy = test.accuracy(result.model.module())
                yield Point(rule, parameter, timing.comparisons[0].speedup, accuracy)


def automatic(network: Network, calibration: Network, test: Network) -> Iterator[Point]:
    """Yield the point of `auto` at each target."""
    for target in TARGETS:
        result = surgery.decompose(network.program, calibration=calibration.images, target_speedup=target)
        timing = None if result.search is None else result.search.timing
        if timing is None:
            yield Point("auto", target, 1.0, test.accuracy(network.program.module()))
            continue
        accuracy = test.accuracy(result.model.module())
        speedup, predicted = timing.comparisons[0].speedup, result.search.predicted
        yield Point("auto", target, speedup, accuracy, None if predicted is None else speedup / predicted)


def at_least(points: list[Point], rule: str, target: float) -> float | None:
    """Return the best accuracy of a rule at a speed-up of at least the target; between points by the line."""
    row = sorted((p for p in points if p.rule == rule), key=lambda p: p.speedup)
    found = [p.accuracy for p in row if p.speedup >= target]
    for low, high in itertools.pairwise(row):
        if low.speedup < target <= high.speedup:
            share = (target - low.speedup) / (high.speedup - low.speedup)
            found.append(low.accuracy + share * (high.accuracy - low.accuracy))
    return max(found, default=None)


def show(console: Console, name: str, original: float, points: list[Point]) -> None:
    """Print accuracy at each target, and what `auto` loses against the best of the others."""
    table = Table("target", *SWEEPS, "auto", "at", "lost / best other", "predicted")
    for target in TARGETS:
        others = [at_least(points, rule, target) for rule in SWEEPS]
        auto = next(p for p in points if p.rule == "auto" and p.parameter == target)
        equal = (at_least(points, rule, auto.speedup) for rule in SWEEPS)
        best = max((a for a in equal if a is not None), default=None)
        lost = "-" if best is None else f"{100 * (original - auto.accuracy):.2f} / {100 * (original - best):.2f}"
        cells = ["-" if a is None else f"{100 * a:.2f}" for a in others]
        predicted = "-" if auto.predicted is None else f"{auto.predicted:.2f}"
        table.add_row(f"{target:g}x", *cells, f"{100 * auto.accuracy:.2f}", f"{auto.speedup:.2f}x", lost, predicted)
    console.print(f"\n{name}: accuracy of the original {100 * original:.2f} % (per cent below)")
    console.print(table)


def main() -> None:
    """Measure, print and write."""
    warnings.simplefilter("ignore")  # of torch about itself
    options = read_options(__doc__.splitlines()[0])
    console, report = Console(), {}
    for name in options.network or ["fashion"]:
        network = NETWORKS[name](options.data)
        calibration, test = split(network, options.samples, seed=0)
        original = test.accuracy(network.program.module())
        points = [*baselines(network, test, options.seconds), *automatic(network, calibration, test)]
        show(console, name, original, points)
        report[name] = {"original": original, "points": [asdict(point) for point in points]}
    where = environment(Latencies().threads)
    console.print(f"{where.cpu}, {where.threads} threads, onnxruntime {where.onnxruntime}, torch {where.torch}")
    if options.json:
        options.json.write_text(json.dumps(report | {"environment": asdict(where)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
