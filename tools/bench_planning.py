"""Time to plan a ResNet-50 at 224x224 with calibration data: with no latencies known, and with all of them on disk.

    python tools/bench_planning.py [--network resnet50] [--samples 256] [--target-speedup 1.3 | --max-error 0.3]
                                   [--json planning.json]

Weights and images are random (weights of a quarter of the rank with noise, as in `networks.py`; images smooth), so the
figures are for time alone. The seconds of each step are those between its reports of progress.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, python looks in tools/ only

import surgery
from surgery.benchmark import environment
from surgery.cost.latency import Latencies
from surgery.passes.results import DecomposeResult
from tools.networks import NETWORKS, build


class Clock:
    """Seconds of each step of a run, from its reports of progress."""

    def __init__(self, *, told: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._start, self._step, self._told = time.perf_counter(), "", told

    def __call__(self, step: str, done: int, total: int) -> None:
        """Give the time since the last report to the step that it was of."""
        now = time.perf_counter()
        self.seconds[self._step or step] += now - self._start
        if self._told and step != self._step:
            print(f"{step} {done}/{total}", file=sys.stderr)
        self._start, self._step = now, "" if done == total else step


def images(count: int, side: int) -> Tensor:
    """Return smooth random images (count, 3, side, side)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, max(1, side // 8), max(1, side // 8), generator=generator)
    return functional.interpolate(coarse, size=(side, side), mode="bilinear")


def plan(name: str, samples: Tensor, asked: dict[str, float], *, told: bool) -> tuple[DecomposeResult, float, Clock]:
    """Decompose a network for a promise, and return the result, its seconds and where they went."""
    model = build(name)
    clock, start = Clock(told=told), time.perf_counter()
    result = surgery.decompose(model, samples[:1], calibration=samples, progress=clock, **asked)
    return result, time.perf_counter() - start, clock


def main() -> None:
    """Plan twice with a fresh cache, and print where the time went."""
    warnings.simplefilter("ignore")  # of torch about itself
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=NETWORKS, default="resnet50")
    parser.add_argument("--samples", type=int, default=256)
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--target-speedup", type=float)
    goal.add_argument("--max-error", type=float)
    parser.add_argument("--progress", action="store_true", help="say each step on standard error")
    parser.add_argument("--json", type=Path, help="also write the seconds here")
    options = parser.parse_args()
    asked = {k: v for k in ("target_speedup", "max_error") if (v := getattr(options, k)) is not None}
    asked = asked or {"target_speedup": 1.3}
    samples = images(options.samples, NETWORKS[options.network].image)
    console, runs = Console(), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SURGERY_CACHE"] = folder
        for name in ("cold", "warm"):
            runs[name] = plan(options.network, samples, asked, told=options.progress)
            console.print(f"{name}: {runs[name][1]:.1f} s; {runs[name][0].promise}")
    table = Table("step", *runs)
    for step in dict.fromkeys(step for _, _, clock in runs.values() for step in clock.seconds):
        table.add_row(step, *(f"{clock.seconds[step]:.1f} s" for _, _, clock in runs.values()))
    table.add_row("all", *(f"{seconds:.1f} s" for _, seconds, _ in runs.values()))
    console.print(table)
    where = environment(Latencies().threads)
    console.print(f"{where.cpu}, {where.threads} threads, onnxruntime {where.onnxruntime}, torch {where.torch}")
    if options.json:
        times = {
            name: {"all": seconds, **clock.seconds, "promise": str(result.promise)}
            for name, (result, seconds, clock) in runs.items()
        }
        values = {"network": options.network, "samples": options.samples, "asked": asked, "seconds": times}
        options.json.write_text(json.dumps(values | {"environment": asdict(where)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
