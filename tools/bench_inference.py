"""Measure the real gain of factoring under onnxruntime on this CPU, at batch 1.

    python tools/bench_inference.py --json inference.json
    python tools/bench_inference.py --quick            # a small image and little time, to try the tool

Three tables, all measured in this run (the cache of latencies is not read):

1. layers: each distinct 3x3 convolution of ResNet-18's shapes against its chain; *realised* is the speed-up divided by
   the reduction of MACs, 1 if all saved work is saved time.
2. network: the same chains in the whole ResNet-18.
3. auto: `ranks="auto"` against the dense network, for several networks, with the verdict.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import surgery
from surgery.algebra import Conv, Operator
from surgery.cost.base import make_backend
from surgery.cost.onnxruntime.backend import OnnxRuntime
from surgery.cost.timing import Budget
from surgery.errors import SurgeryError
from surgery.factorizations import named
from surgery.passes.decompose import decompose
from surgery.passes.preview import find_sites
from surgery.plans.goal import Goal
from surgery.runtime.bench import environment as measured_on
from surgery.sites import Site
from tools.networks import NETWORKS, build

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("tucker", "spatial")
SHARES = (0.5, 0.25, 0.125)
DEMO = ROOT / "examples" / "data" / "fashion_resnet.pt2"
PRIMARY = "resnet18"


@dataclass(frozen=True)
class Gain:
    """One comparison with dense: seconds are medians, ``low`` and ``high`` the speed-up's 95 % interval."""

    what: str
    method: str
    rank: str
    mac_reduction: float
    dense_s: float
    factored_s: float
    speedup: float
    low: float
    high: float
    verdict: str

    @property
    def realised(self) -> float:
        """The speed-up divided by the reduction of MACs."""
        return self.speedup / self.mac_reduction


@dataclass(frozen=True)
class Auto:
    """``ranks="auto"`` on one network; ``error`` is the relative error of the output, on a random input."""

    network: str
    factored: int
    sites: int
    planning_s: float
    mac_reduction: float
    dense_s: float
    auto_s: float
    speedup: float
    low: float
    high: float
    verdict: str
    error: float


def ranks_at(operator: Operator, method: str, share: float) -> tuple[int, ...]:
    """Return ranks at a share of the channels, rounded to a multiple that onnxruntime's convolution likes."""
    multiple = make_backend().channel_multiple
    channels = (operator.out_channels, operator.in_channels)
    limits = named(method).max_ranks(operator)
    wanted = [min(channels)] if len(limits) == 1 else list(channels)
    return tuple(
        min(m, max(multiple, round(share * n / multiple) * multiple)) for n, m in zip(wanted, limits, strict=True)
    )


def is_candidate(site: Site) -> bool:
    """Whether this is a 3x3 convolution without groups."""
    operator = site.operator
    return isinstance(operator, Conv) and operator.kernel_size == (3, 3) and operator.groups == 1


def distinct(sites: tuple[Site, ...]) -> Iterator[Site]:
    """Yield the first site of each shape and geometry."""
    seen = set()
    for site in filter(is_candidate, sites):
        key = (tuple(site.operator.weight.shape), site.operator.geometry, site.input_shape)  # type: ignore[attr-defined]
        if key not in seen:
            seen.add(key)
            yield site


def measure_layers(sites: tuple[Site, ...], latencies: OnnxRuntime) -> list[Gain]:
    """Return the gain of each distinct layer, method and share."""
    gains = []
    for site in distinct(sites):
        shape = site.input_shape
        for method in METHODS:
            for ranks in dict.fromkeys(ranks_at(site.operator, method, share) for share in SHARES):
                chain = named(method).skeleton(site.operator, ranks)
                c = latencies.compare(site.operator, chain, shape)
                reduction = site.operator.macs(shape) / chain.macs(shape)
                channels = f"{site.operator.in_channels}->{site.operator.out_channels}"
                what = f"{site.description} {channels} at {shape[-1]}"
                row = (what, method, ",".join(map(str, ranks)), reduction, c.dense_s, c.chain_s)
                gains.append(Gain(*row, c.speedup, c.low, c.high, c.verdict))
    return gains


def measure_network(model: torch.nn.Module, x: torch.Tensor, sites: tuple[Site, ...], options: Any) -> list[Gain]:
    """Return the gain of the whole network for each method and share, all timed in one interleaved run."""
    labels, models = [], [model]
    for method in METHODS:
        for share in SHARES:
            ranks = {s.name: ranks_at(s.operator, method, share) if is_candidate(s) else None for s in sites}
            result = decompose(model, x, ranks=ranks, factorization=method)
            labels.append((method, f"{share:g} of the channels", result.before.macs / result.after.macs))
            models.append(result.model)
    timing = surgery.bench(models, x, threads=options.threads, seconds=options.seconds * len(models))
    dense = timing.models[0].median_s
    rows = zip(labels, timing.models[1:], timing.comparisons, strict=True)
    return [Gain(PRIMARY, *row, dense, m.median_s, c.speedup, c.low, c.high, c.verdict) for row, m, c in rows]


def measure_auto(name: str, model: Any, x: torch.Tensor | None, latencies: OnnxRuntime, options: Any) -> Auto:
    """Return the comparison of ``ranks="auto"`` with the dense networks."""
    start = time.perf_counter()
    result = decompose(model, x, ranks=Goal.error(backend=latencies))
    planning = time.perf_counter() - start
    timing = surgery.bench([model, result.model], x, threads=options.threads, seconds=2 * options.seconds)
    dense, auto = timing.models
    c = timing.comparisons[0]
    return Auto(
        name,
        len(result.changes),
        len(result.plan),
        planning,
        result.before.macs / result.after.macs,
        dense.median_s,
        auto.median_s,
        c.speedup,
        c.low,
        c.high,
        c.verdict,
        surgery.compare(model, result.model, x).relative,
    )


def networks(options: Any) -> Iterator[tuple[str, Any, torch.Tensor | None]]:
    """Yield each network with its input; the demo's program has an example input of its own."""
    for name in options.networks:
        size = options.image if name != "small_vit" else None  # its table of positions fixes the size
        yield name, build(name), NETWORKS[name].inputs(size)
    if DEMO.exists():
        yield DEMO.stem, surgery.load(DEMO), None


def show_gains(console: Console, title: str, gains: list[Gain]) -> None:
    """Print one row for each comparison."""
    table = Table(
        "what", "method", "rank", "MACs", "dense ms", "factored ms", "speed-up", "95 %", "realised", "verdict"
    )
    table.title = title
    for g in gains:
        table.add_row(
            g.what,
            g.method,
            g.rank,
            f"/{g.mac_reduction:.2f}",
            f"{g.dense_s * 1e3:.3f}",
            f"{g.factored_s * 1e3:.3f}",
            f"x{g.speedup:.2f}",
            f"{g.low:.2f} to {g.high:.2f}",
            f"{g.realised:.0%}",
            g.verdict,
        )
    console.print(table)


def show_auto(console: Console, rows: list[Auto]) -> None:
    """Print one row for each network."""
    table = Table(
        "network", "factored", "MACs", "dense ms", "auto ms", "speed-up", "95 %", "verdict", "error", "planned in"
    )
    table.title = 'ranks="auto" against dense'
    for r in rows:
        table.add_row(
            r.network,
            f"{r.factored} of {r.sites}",
            f"/{r.mac_reduction:.2f}",
            f"{r.dense_s * 1e3:.2f}",
            f"{r.auto_s * 1e3:.2f}",
            f"x{r.speedup:.2f}",
            f"{r.low:.2f} to {r.high:.2f}",
            r.verdict,
            f"{r.error:.2g}",
            f"{r.planning_s:.0f} s",
        )
    console.print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--threads", type=int, default=2, help="of onnxruntime (%(default)s)")
    parser.add_argument("--image", type=int, default=224, help="image size (%(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timing for each network (%(default)s)")
    parser.add_argument("--layer-seconds", type=float, default=0.5, help="of timing for each layer (%(default)s)")
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS), default=list(NETWORKS), help="for auto")
    parser.add_argument("--quick", action="store_true", help="64 pixels and a tenth of the time")
    options = parser.parse_args(arguments)
    if options.quick:
        options.image, options.seconds, options.layer_seconds = 64, options.seconds / 10, options.layer_seconds / 10
    return options


def run(options: argparse.Namespace) -> None:
    """Measure, print and write."""
    console = Console(width=None if sys.stdout.isatty() else 150)
    environment = asdict(measured_on(options.threads))
    console.print(f"image {options.image}, batch 1;", ", ".join(f"{k} {v}" for k, v in environment.items()))
    latencies = OnnxRuntime(threads=options.threads, budget=Budget(options.layer_seconds, max_rounds=1000), keep=False)
    model, x = build(PRIMARY), NETWORKS[PRIMARY].inputs(options.image)
    sites, _ = find_sites(model, x)
    layers = measure_layers(sites, latencies)
    show_gains(console, "each distinct 3x3 layer of ResNet-18", layers)
    network = measure_network(model, x, sites, options)
    show_gains(console, "the whole ResNet-18, all its 3x3 layers factored", network)
    autos = [measure_auto(name, net, inputs, latencies, options) for name, net, inputs in networks(options)]
    show_auto(console, autos)
    if options.json:
        data = {
            "environment": environment,
            "image": options.image,
            "layers": [asdict(g) | {"realised": g.realised} for g in layers],
            "network": [asdict(g) | {"realised": g.realised} for g in network],
            "auto": [asdict(a) for a in autos],
        }
        options.json.write_text(json.dumps(data, indent=2) + "\n")


def main() -> None:
    """Run as a command; an expected error is one line."""
    try:
        run(parse())
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
