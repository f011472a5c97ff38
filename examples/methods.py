"""Measure what each method does to one real layer: error, MACs and latency, as a table, JSON, a plot and a page.

    python examples/methods.py [--model FILE] [--site NAME] [--threads N] [--seconds S] [--output FOLDER]

Each factorization that fits the layer is tried over a sweep of ranks, spaced evenly in the logarithm of the MACs, up to
as many MACs as the dense layer has. A method with several ranks keeps the singular values above one threshold, as
`--ranks keep_macs=0.5` does. Ranks that are numbers of channels are rounded up to the multiple that the kernels like,
as `--ranks auto` does. Each chain is timed against the dense layer at the layer's real input shape, interleaved, under
onnxruntime; no latency comes from the cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in examples/ only

import surgery
from examples.methods_page import COLUMNS, Point, Report, cells, fill, page_table, plot
from surgery.algebra import relative_error
from surgery.cost.base import make_backend
from surgery.cost.onnxruntime.backend import OnnxRuntime
from surgery.cost.timing import Budget
from surgery.errors import InputError, RankError, Refusal
from surgery.factorizations import Ranks
from surgery.plans.candidates import Candidate, candidates_of, say_ranks
from surgery.plans.faster import snap
from surgery.plans.quality import Keep
from surgery.runtime.bench import environment
from surgery.sites import Site, Totals

HERE = Path(__file__).parent
MODEL, RESULTS, PAGE = HERE / "data" / "fashion_resnet.pt2", HERE / "results", HERE / "methods.md"
SHARES = np.geomspace(0.05, 0.95, 9)  # of the dense layer's MACs
NOT_CHANNELS = ("depthwise", "tr")  # their ranks count branches and pieces, not channels, so they are not rounded


def choose(sites: Sequence[Site], name: str | None) -> Site:
    """Return the site of this name, or without a name the first 3x3 convolution with the most parameters."""
    if name is None:
        kernels = [site for site in sites if tuple(site.operator.kernel.shape[3:]) == (3, 3)]
        return max(kernels or sites, key=lambda site: site.parameters)
    if name not in (names := [site.name for site in sites]):
        raise InputError(f"the model has no site {name!r}", allowed=", ".join(names))
    return next(site for site in sites if site.name == name)


def sweep(candidate: Candidate, multiple: int) -> list[Ranks]:
    """Return distinct ranks in order of MACs, for each of ``SHARES`` in reach; none needs more MACs than dense."""
    dense, found = candidate.dense_cost.macs, set()
    for share in SHARES:
        if (ranks := _ranks_of(candidate, float(share))) is None:
            continue
        if candidate.factorization.name not in NOT_CHANNELS:
            rounded = (snap(rank, multiple=multiple) for rank in ranks)
            ranks = tuple(min(full, rank) for full, rank in zip(candidate.max_ranks, rounded, strict=True))
        found.add(ranks)
    return sorted((r for r in found if candidate.cost(r).macs <= dense), key=lambda r: candidate.cost(r).macs)


def _ranks_of(candidate: Candidate, share: float) -> Ranks | None:
    """Return the ranks that keep this share of the MACs, or None if even rank 1 needs more."""
    dense = candidate.dense_cost
    if len(candidate.max_ranks) == 1:
        rank = int(share * dense.macs / candidate.cost((1,)).macs)
        return (min(rank, *candidate.max_ranks),) if rank else None
    try:
        rule = Keep("macs", share).settle([[candidate]], Totals(dense.parameters, dense.macs))
    except RankError:
        return None
    return rule.ranks(candidate)


def measure(candidate: Candidate, ranks: Ranks, latencies: OnnxRuntime) -> Point | Refusal:
    """Factor the layer at these ranks and time the chain; if there is no good chain, return the reason."""
    site, dense, cost = candidate.site, candidate.dense_cost, candidate.cost(ranks)
    chain = candidate.factorization.factor(site.operator, ranks)
    if isinstance(chain, Refusal):
        return chain
    composed = chain.compose()
    if isinstance(composed, Refusal):
        return composed
    timing = latencies.compare(site.operator, chain, site.input_shape)
    return Point(
        method=candidate.factorization.name,
        ranks=ranks,
        error=relative_error(composed.weight, site.operator.weight),
        parameters=cost.parameters / dense.parameters,
        macs=cost.macs / dense.macs,
        latency=1 / timing.speedup,
        low=1 / timing.high,
        high=1 / timing.low,
        verdict=timing.verdict,
        dense_s=timing.dense_s,
        chain_s=timing.chain_s,
    )


def study(site: Site, latencies: OnnxRuntime, show: Callable[[list[Any]], Iterable[Any]]) -> Report:
    """Measure all methods at all ranks of the sweep; ``show`` wraps the work in a progress bar."""
    work, points, refused = [], [], {}
    for name in surgery.FACTORIZATIONS:
        if isinstance(found := candidates_of(site, name), Refusal):
            refused[name] = found.reason
            continue
        if not (ranks := sweep(found[0], make_backend().channel_multiple)):
            refused[name] = "no rank of the sweep needs as few MACs as the dense layer"
        work += [(found[0], each) for each in ranks]
    for candidate, ranks in show(work):
        point = measure(candidate, ranks, latencies)
        if isinstance(point, Refusal):
            refused[f"{candidate.factorization.name} {say_ranks(ranks)}"] = point.reason
        else:
            points.append(point)
    where = asdict(environment(latencies.threads))
    weight, today = tuple(site.operator.weight.shape), date.today().isoformat()
    shape, macs = site.input_shape, site.operator.macs(site.input_shape)
    return Report(site.name, site.description, weight, shape, macs, today, where, tuple(points), refused)


def print_table(report: Report, console: Console) -> None:
    """Print all points and refusals."""
    table = Table(title=f"{report.site}, {report.layer}, multiples of dense", title_justify="left", box=None)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("method", "verdict") else "right", no_wrap=True)
    last = ""
    for point in report.points:
        table.add_row(*cells(point), end_section=point.method != last)
        last = point.method
    console.print(table)
    for what, why in report.refused.items():
        console.print(f"{what}: {why}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL, help="a file that surgery.load reads")
    parser.add_argument("--site", help="a layer; by default the 3x3 convolution with the most parameters")
    parser.add_argument("--threads", type=int, help="of onnxruntime; by default the physical cores")
    parser.add_argument("--seconds", type=float, default=1.0, help="to time each pair of dense layer and chain")
    parser.add_argument("--output", type=Path, default=RESULTS, help="another folder; methods.md then stays as it is")
    options = parser.parse_args(arguments)
    console = Console(width=100)
    sites, _ = surgery.find_sites(surgery.load(options.model))
    budget = Budget(options.seconds, max_rounds=5000)
    latencies = OnnxRuntime(threads=options.threads, budget=budget, keep=False)
    site = choose(sites, options.site)
    report = study(site, latencies, lambda work: track(work, f"measuring {site.name}", console=console))
    print_table(report, console)
    options.output.mkdir(exist_ok=True)
    (options.output / "methods.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
    plot(report, options.output / "methods.png")
    if options.output == RESULTS:
        PAGE.write_text(fill(PAGE.read_text(), page_table(report)))


if __name__ == "__main__":
    main()
