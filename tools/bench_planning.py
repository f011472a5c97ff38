"""Time to plan a ResNet-50 at 224x224, or MiniLM: with calibration data and without, and with latencies on disk.

    python tools/bench_planning.py [--network resnet50] [--samples 256] [--target-speedup 1.3 | --max-error 0.3]
                                   [--no-promise] [--json planning.json]

    cold                  a promise with calibration data, without known latencies
    warm                  the same, with all latencies on disk
    no data               `auto` without calibration data, without known latencies
    no data, no promise   the same with ``ranks="measured"``, if --no-promise is given

Weights and images are random (weights of a quarter of the rank with noise, as in `networks.py`; smooth images), so only
the times mean something. `minilm` is the trained network of `trained.py` with its sentences, as a program. The seconds
of each step are the times between reports of progress.
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import surgery
from surgery.cost.base import make_backend
from surgery.passes.results import DecomposeResult
from surgery.plans.goal import Goal
from surgery.runtime.bench import environment
from tools.networks import NETWORKS, build
from tools.trained import Model, minilm


class Clock:
    """Seconds of each step of a run, from its reports of progress."""

    def __init__(self, *, told: bool) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._start, self._step, self._told = time.perf_counter(), "", told

    def __call__(self, step: str, done: int, total: int) -> None:
        """Add the time since the last report to the step that reported then."""
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


@dataclass(frozen=True)
class Case:
    """A model, its example inputs unless it holds them itself, and calibration data."""

    model: Model
    example: Any
    samples: Any


def case(name: str, samples: int) -> Case:
    """Return a network by its name, with ``samples`` samples; raises Unavailable if it is not installed."""
    if name == "minilm":
        network = minilm(None, samples)
        return Case(network.program, None, network.inputs)
    data = images(samples, NETWORKS[name].image)
    return Case(build(name), data[:1], data)


Run = tuple[DecomposeResult[Any], float, Clock]


def plan(network: Case, asked: dict[str, Any], *, told: bool) -> Run:
    """Decompose a network with the given options; return the result, its seconds, and the seconds of each step."""
    clock, start = Clock(told=told), time.perf_counter()
    result = surgery.decompose(network.model, network.example, progress=clock, **asked)
    return result, time.perf_counter() - start, clock


def read_options() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=[*NETWORKS, "minilm"], default="resnet50")
    parser.add_argument("--samples", type=int, default=256)
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--target-speedup", type=float)
    goal.add_argument("--max-error", type=float)
    parser.add_argument("--no-promise", action="store_true", help="without data, also time ranks=measured")
    parser.add_argument("--progress", action="store_true", help="print each step to standard error")
    parser.add_argument("--json", type=Path, help="also write the seconds to this file")
    return parser.parse_args()


def main() -> None:
    """Plan with fresh caches and with a warm one, and print where the time went."""
    warnings.simplefilter("ignore")  # torch warns about itself
    options = read_options()
    goal = Goal.error(options.max_error) if options.max_error else Goal.speedup(options.target_speedup or 1.3)
    network = case(options.network, options.samples)
    data = {"calibration": network.samples, "ranks": goal}
    cold: dict[str, dict[str, Any]] = {"cold": data, "no data": {}}
    if options.no_promise:
        cold["no data, no promise"] = {"ranks": "measured"}
    console, runs = Console(), {}
    for name, arguments in cold.items():
        with tempfile.TemporaryDirectory() as folder:
            os.environ["SURGERY_CACHE"] = folder
            runs[name] = plan(network, arguments, told=options.progress)
            if name == "cold":
                runs["warm"] = plan(network, arguments, told=options.progress)
    for name, (result, seconds, _) in runs.items():
        said = f"{len(result.changes)} factored, no promise" if result.promise is None else str(result.promise)
        console.print(f"{name}: {seconds:.1f} s; {said}")
    table = Table("step", *runs)
    for step in dict.fromkeys(step for _, _, clock in runs.values() for step in clock.seconds):
        table.add_row(step, *(f"{clock.seconds[step]:.1f} s" for _, _, clock in runs.values()))
    table.add_row("all", *(f"{seconds:.1f} s" for _, seconds, _ in runs.values()))
    console.print(table)
    where = environment(make_backend().threads)
    console.print(f"{where.cpu}, {where.threads} threads, onnxruntime {where.onnxruntime}, torch {where.torch}")
    if options.json:
        times = {
            name: {"all": seconds, **clock.seconds, "promise": str(result.promise), "factored": len(result.changes)}
            for name, (result, seconds, clock) in runs.items()
        }
        values = {
            "network": options.network,
            "samples": options.samples,
            "asked": {goal.kind: goal.limit},
            "seconds": times,
        }
        options.json.write_text(json.dumps(values | {"environment": asdict(where)}, indent=2) + "\n")


if __name__ == "__main__":
    main()
