"""Metrics without retraining at equal measured speed-up: `auto` with calibration data against the usual rank rules.

    python tools/bench_accuracy.py --json accuracy.json
    python tools/bench_accuracy.py --network cifar --data FOLDER
    python tools/bench_accuracy.py --network minilm --groups      # the table of groups alone

Each rule is swept over its own parameter. Every model is timed against the original, interleaved. Its metric (accuracy,
cosine or agreement, as in `trained.py`) is measured on test samples that neither training nor calibration has seen.
`auto` is asked for each target. The metric of a rule is read off the line through its points (best metric at that
speed-up or more): in the table at the target, and for the loss of `auto` against the best rule at the speed-up that was
measured for `auto`.

    energy      SVD of every layer at one energy threshold
    vbmf        Tucker at the ranks of EVBMF, weakened or strengthened by a factor
    uniform     all ranks the same share of full
    auto        --calibration --target-speedup

`predicted` is the latency of the whole model that `auto` expected before fitting, from a model with random factors (or
from what each site saves alone), divided by the latency measured at the end.

The table of groups has the same SVD ranks in all columns of a row, at one share of all parameters. It compares the
factors nearest to the weights with those fitted to calibration data in 1 group, in 6 groups and in the default number
of groups. A fit with a metric below that of the factors without data is shown with the difference divided by its
standard error, and marked WORSE if that is beyond two.
"""

from __future__ import annotations

import itertools
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
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from surgery.cost.base import make_backend
from surgery.errors import RankError
from surgery.factorizations import fitting
from surgery.passes.preview import find_sites, plan
from surgery.plans.goal import Goal
from surgery.runtime.bench import environment
from tools.trained import Network, open_network, option_parser, split

TARGETS = (1.25, 1.3, 1.5, 2.0, 3.0)
SWEEPS: dict[str, tuple[float, ...]] = {
    "energy": (0.99, 0.97, 0.94, 0.9, 0.8, 0.6),
    "vbmf": (2.0, 1.5, 1.0, 0.75, 0.5, 0.3),
    "uniform": (0.7, 0.55, 0.4, 0.3, 0.2, 0.1),
}
SHARES = (0.7, 0.5, 0.25)  # shares of the parameters in the table of groups
SURE = 2.0  # standard errors from which a difference is certain
PLAIN = "plain SVD"
GROUPS: dict[str, int | None] = {"groups=1": 1, "groups=6": 6, "default": None}


@dataclass(frozen=True)
class Point:
    """One factored model: how it was made, its measured speed-up, and its metric."""

    rule: str
    parameter: float
    speedup: float
    metric: float
    predicted: float | None = None


@dataclass(frozen=True)
class Fit:
    """The metric of one fit at one share of the parameters; its gain over plain SVD, also in standard errors."""

    share: float
    way: str
    metric: float
    gain: float
    deviations: float

    @property
    def worse(self) -> bool:
        """Whether the fit is certainly worse than the factors without data."""
        return self.gain < 0 and self.deviations < -SURE


def baseline_ranks(network: Network, rule: str, parameter: float) -> dict[str, Any]:
    """Return the arguments of decompose for a rule at one value of its parameter."""
    if rule == "energy":
        return {"ranks": f"energy={parameter}", "factorization": "svd"}
    if rule == "vbmf":
        found = plan(network.model, network.example, ranks="vbmf", factorization="tucker")
        ranks = {d.site: tuple(max(1, round(parameter * r)) for r in d.rank) for d in found if d.rank is not None}
    else:
        ranks = {}
    sites = {site.name: site for site in find_sites(network.model, network.example)[0]}
    if rule == "uniform":
        for name, site in sites.items():
            methods = fitting(site.operator)
            if isinstance(methods, list):
                ranks[name] = tuple(max(1, math.ceil(parameter * full)) for full in methods[0].max_ranks(site.operator))
        return {"ranks": ranks}
    limits = {name: fitting(sites[name].operator, "tucker") for name in ranks}
    full = {name: found[0].max_ranks(sites[name].operator) for name, found in limits.items() if isinstance(found, list)}
    return {"ranks": {n: tuple(map(min, ranks[n], full[n])) for n in full}, "factorization": "tucker"}


def baselines(network: Network, test: Network, seconds: float) -> Iterator[Point]:
    """Yield the points of every rule."""
    for rule, parameters in SWEEPS.items():
        for parameter in parameters:
            result = network.decompose(**baseline_ranks(network, rule, parameter))
            if result.changes:
                yield Point(rule, parameter, network.speedup(result.model, seconds), test.score(result.model))


def automatic(network: Network, calibration: Network, test: Network) -> Iterator[Point]:
    """Yield the point of `auto` at each target."""
    for target in TARGETS:
        result = network.decompose(calibration=calibration.inputs, ranks=Goal.speedup(target))
        search = result.search
        if search is None or search.timing is None:
            yield Point("auto", target, 1.0, test.score(network.model))
            continue
        metric = test.score(result.model)
        speedup, predicted = search.timing.comparisons[0].speedup, search.predicted
        yield Point("auto", target, speedup, metric, None if predicted is None else speedup / predicted)


def fits(network: Network, calibration: Network, test: Network) -> Iterator[Fit]:
    """Yield the metric of each way to fit at each share; nothing at a share that the rank rule cannot meet."""
    for share in SHARES:
        asked: dict[str, Any] = {"factorization": "svd", "ranks": f"keep_params={share}"}
        plain: Tensor | None = None
        for way in (PLAIN, *GROUPS):
            data = {"calibration": calibration.inputs, "groups": GROUPS[way]} if way in GROUPS else {}
            try:
                result = network.decompose(**asked, **data)
            except RankError as error:
                print(f"{network.name} at {share:g} of the parameters: {error}", file=sys.stderr)
                break
            scores = test.scores(result.model)
            plain = scores if plain is None else plain
            gains = scores - plain
            gain, deviation = float(gains.mean()), float(gains.std()) / math.sqrt(len(gains))
            yield Fit(share, way, float(scores.mean()), gain, gain / deviation if deviation else 0.0)


def at_least(points: list[Point], rule: str, target: float) -> float | None:
    """Return the best metric of a rule at a speed-up of at least the target, interpolated between its points."""
    row = sorted((p for p in points if p.rule == rule), key=lambda p: p.speedup)
    found = [p.metric for p in row if p.speedup >= target]
    for low, high in itertools.pairwise(row):
        if low.speedup < target <= high.speedup:
            share = (target - low.speedup) / (high.speedup - low.speedup)
            found.append(low.metric + share * (high.metric - low.metric))
    return max(found, default=None)


def show(console: Console, network: Network, original: float, points: list[Point]) -> None:
    """Print the metric at each target, and what `auto` loses against the best of the others."""
    table = Table("target", *SWEEPS, "auto", "at", "lost / best other", "predicted")
    for target in TARGETS:
        others = [at_least(points, rule, target) for rule in SWEEPS]
        auto = next(p for p in points if p.rule == "auto" and p.parameter == target)
        equal = (at_least(points, rule, auto.speedup) for rule in SWEEPS)
        best = max((a for a in equal if a is not None), default=None)
        lost = "-" if best is None else f"{100 * (original - auto.metric):.2f} / {100 * (original - best):.2f}"
        cells = ["-" if a is None else f"{100 * a:.2f}" for a in others]
        predicted = "-" if auto.predicted is None else f"{auto.predicted:.2f}"
        table.add_row(f"{target:g}x", *cells, f"{100 * auto.metric:.2f}", f"{auto.speedup:.2f}x", lost, predicted)
    console.print(f"\n{network.name}: {network.metric} of the original {100 * original:.2f} % (per cent below)")
    console.print(table)


def show_groups(console: Console, network: Network, original: float, rows: list[Fit]) -> None:
    """Print the metric of each way to fit at each share of the parameters; red if certainly worse than plain SVD."""
    table = Table("parameters", PLAIN, *GROUPS)
    for share in dict.fromkeys(row.share for row in rows):
        cells = []
        for row in (row for row in rows if row.share == share):
            text = f"{100 * row.metric:.2f}"
            text += f" ({row.deviations:.1f} s.e.)" if row.gain < 0 else ""
            cells.append(f"[red]{text} WORSE[/red]" if row.worse else text)
        table.add_row(f"{share:g}", *cells)
    below, worse = sum(row.gain < 0 for row in rows), sum(row.worse for row in rows)
    console.print(f"\n{network.name}: {network.metric} at equal SVD ranks, in per cent; original {100 * original:.2f}")
    console.print(table)
    fitted = sum(row.way != PLAIN for row in rows)
    console.print(f"{below} of {fitted} fits to calibration data are below plain SVD, {worse} of them certainly")


def main() -> None:
    """Measure, print and write."""
    warnings.simplefilter("ignore")  # torch warns about itself
    parser = option_parser(__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256, help="calibration samples")
    parser.add_argument("--groups", action="store_true", help="only the table of groups")
    options = parser.parse_args()
    console, report = Console(), {}
    for name in options.network or ["fashion"]:
        network = open_network(name, options)
        calibration, test = split(network, options.samples, seed=0)
        original = test.score(network.model)
        values: dict[str, Any] = {"metric": network.metric, "original": original}
        if not options.groups:
            points = [*baselines(network, test, options.seconds), *automatic(network, calibration, test)]
            show(console, network, original, points)
            values["points"] = [asdict(point) for point in points]
        rows = list(fits(network, calibration, test))
        show_groups(console, network, original, rows)
        report[name] = values | {"groups": [asdict(row) for row in rows]}
    where = environment(make_backend().threads)
    console.print(f"{where.cpu}, {where.threads} threads, onnxruntime {where.onnxruntime}, torch {where.torch}")
    if options.json:
        options.json.write_text(json.dumps(report | {"environment": asdict(where)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
