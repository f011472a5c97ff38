"""Compare the planning of stages with its lower bounds, with simple rules and with Mt-KaHyPar, over many networks.

    pip install mtkahypar
    python tools/bench_split.py [--quick] [--only NAME ...] [--measure] [--json FILE]

Each network is exported and cut into 2, 4 and 8 stages, with links of 1 GB/s and 125 MB/s. All cuts are priced alike:
the slowest stage's seconds, with the bytes that it receives and sends. "certified" is the bound that comes with the
plan, "simple" the larger of the whole's k-th part and the longest operation. The rules cut the graph's own order so
that the largest stage is as small as can be, in parameters, operations or seconds; bytes they do not see. Mt-KaHyPar
(one thread, default preset, connectivity, 10 % imbalance, bytes and seconds as weights) does not know that stages have
an order: a partition whose stages form a cycle cannot be used; its mean is that of the usable ones. Seconds of
operations are a roofline's, or with ``--measure`` measured, and then two stages are predicted and measured as well.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from surgery.cost.base import make_backend
from surgery.errors import SurgeryError
from surgery.kinds.base import Cuttable, Kind
from surgery.kinds.registry import kind_of
from surgery.stages.blocks import Blocks, blocks_of
from surgery.stages.costs import measure_operations, roofline
from surgery.stages.exported import measure_stages
from surgery.stages.loads import Loads
from surgery.stages.problem import Problem
from surgery.stages.solve import solve
from surgery.system.machine import cpu_name
from tools.split_networks import SPLIT_NETWORKS

STAGES = (2, 4, 8)
LINKS = {"1 GB/s": 1e9, "125 MB/s": 125e6}
TARGETS = {2: 1.05, 4: 1.10, 8: 1.20}  # of the bottleneck over the certified bound, in the mean
RULES = ("params", "operations", "time")
IMBALANCE, SEEDS = 0.10, 5
_LARGEST = 2**30  # the peer's weights are 32-bit integers, and so is their sum


def opened(name: str) -> tuple[Kind, Cuttable, Any]:
    """Return a network's kind, its graph to be cut, and the example inputs."""
    torch.manual_seed(0)
    model, args = SPLIT_NETWORKS[name]()
    program = torch.export.export(model.eval(), args)
    kind = kind_of(program)
    return kind, kind.cuttable(program, (args, {})), (args, {})


def in_a_row(weights: Sequence[float], stages: int) -> list[int]:
    """Return the stages of blocks in their order, so that the largest sum of weights is as small as can be."""
    low, high = max(weights), sum(weights)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if max(_packed(weights, middle)) < stages else (middle, high)
    return _packed(weights, high * (1 + 1e-12))


def _packed(weights: Sequence[float], most: float) -> list[int]:
    found, stage, filled = [], 0, 0.0
    for weight in weights:
        if filled + weight > most and filled:
            stage, filled = stage + 1, 0.0
        filled += weight
        found.append(stage)
    return found


def weights_of(blocks: Blocks, rule: str) -> list[float]:
    """Return what a rule balances, for each block: bytes of parameters, operations, or seconds."""
    found = [0.0] * len(blocks)
    if rule == "time":
        return list(blocks.seconds)
    for block in blocks.block_of if rule == "operations" else ():
        found[block] += 1
    for tensor in blocks.tensors if rule == "params" else ():
        found[tensor.blocks[0]] += tensor.bytes
    return found


def in_order(blocks: Blocks, parts: Sequence[int]) -> list[int] | None:
    """Return parts renumbered so that no value goes backwards, or None if they form a cycle."""
    edges = {(parts[a], parts[b]) for b, before in enumerate(blocks.before) for a in before if parts[a] != parts[b]}
    waiting, order = set(parts), dict[int, int]()
    while waiting:
        ready = [one for one in waiting if not any(b == one and a in waiting for a, b in edges)]
        if not ready:
            return None
        order |= {one: len(order) + number for number, one in enumerate(sorted(ready))}
        waiting -= set(ready)
    return [order[part] for part in parts]


@cache
def _kahypar() -> tuple[Any, Any] | None:
    try:
        module = importlib.import_module("mtkahypar")
    except ImportError:
        return None
    return module, module.initialize(1)


def _whole(weights: Sequence[float]) -> list[int]:
    scale = _LARGEST / 4 / (sum(weights) or 1.0)
    return [max(1, round(weight * scale)) for weight in weights]


def peer_parts(blocks: Blocks, stages: int, seed: int) -> list[int]:
    """Return Mt-KaHyPar's parts of the blocks, for the connectivity of the values' bytes."""
    module, library = _kahypar() or (None, None)
    module.set_seed(seed)
    context = library.context_from_preset(module.PresetType.DEFAULT)
    context.set_partitioning_parameters(stages, IMBALANCE, module.Objective.KM1)
    new = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(seed)).tolist()  # its seed changes little
    rows, sizes = [[new[b] for b in value.blocks] for value in blocks.values], [value.bytes for value in blocks.values]
    times = [0.0] * len(blocks)
    for block, number in enumerate(new):
        times[number] = blocks.seconds[block]
    made = library.create_hypergraph(context, len(blocks), len(rows), rows, _whole(times), _whole(sizes))
    found = made.partition(context).get_partition()
    return [found[number] for number in new]


def peer(problem: Problem, blocks: Blocks) -> dict[str, Any]:
    """Return the bottlenecks of the peer's usable partitions, and the share of the cyclic ones."""
    if _kahypar() is None:
        return {}
    found = [in_order(blocks, peer_parts(blocks, problem.stages, seed)) for seed in range(SEEDS)]
    usable = [Loads(problem, blocks, parts).score()[1] for parts in found if parts is not None]
    return {"usable": usable, "cyclic": 1 - len(usable) / len(found)}


def planned(problem: Problem, prove: float) -> dict[str, Any]:
    """Return all that is measured of one problem, in seconds; ``prove`` are those for a better bound."""
    start = time.perf_counter()
    found = solve(problem, prove_seconds=prove)
    spent, blocks = time.perf_counter() - start, blocks_of(problem)
    rules = {
        rule: Loads(problem, blocks, in_a_row(weights_of(blocks, rule), problem.stages)).score()[1] for rule in RULES
    }
    row: dict[str, Any] = {
        "blocks": len(blocks),
        "bottleneck": found.bottleneck,
        "certified": found.bound,
        "proven": found.proven,
    }
    row |= {"simple": max(sum(blocks.seconds) / problem.stages, max(blocks.seconds)), "order": found.order}
    return row | {"seconds_to_split": spent, "rules": rules, "peer": peer(problem, blocks)}


def two_stages(kind: Kind, cuttable: Cuttable, inputs: Any, problem: Problem) -> dict[str, Any]:
    """Return the predicted and the measured seconds of each of two stages."""
    found = solve(problem)
    samples = measure_stages(cuttable.cut(list(found.stage_of)), kind, inputs, make_backend())
    return {"predicted": list(found.seconds), "measured": [each.median for each in samples]}


def bench(name: str, options: argparse.Namespace, note: Callable[[str], None]) -> dict[str, Any]:
    """Return the rows of one network, by stages and link, and its predicted and measured stages."""
    kind, cuttable, inputs = opened(name)
    times, measured = roofline(cuttable.network), 0.0
    if options.measure:
        costs = measure_operations(cuttable, kind, inputs, make_backend())
        times, measured = costs.seconds, costs.measured
    base = Problem(cuttable.network, times, 2, link=LINKS["1 GB/s"])
    found: dict[str, Any] = {"operations": len(times), "whole": sum(times), "share_measured": measured, "rows": {}}
    for stages in options.stages:
        for link, speed in LINKS.items():
            try:
                found["rows"][f"{stages}, {link}"] = planned(replace(base, stages=stages, link=speed), options.prove)
            except SurgeryError as error:
                note(f"{name}, {stages} stages, {link}: {error}")
    if options.measure:
        found["two_stages"] = two_stages(kind, cuttable, inputs, base)
    return found


def ratios(row: dict[str, Any]) -> dict[str, float | None]:
    """Return each bottleneck of a problem over its certified bound, and ours over the simple one as well."""
    bound, usable = row["certified"], row["peer"].get("usable")
    found = {"certified": row["bottleneck"] / bound, "simple": row["bottleneck"] / row["simple"]}
    found |= {rule: value / bound for rule, value in row["rules"].items()}
    return found | {"peer": statistics.geometric_mean(usable) / bound if usable else None}


def table(title: str, first: str) -> Table:
    """Return an empty table."""
    made = Table(title=title, title_justify="left", box=None)
    names = ("certified", "simple", "=params", "=operations", "=time", "Mt-KaHyPar", "cyclic", "seconds")
    for name in (first, *names):
        made.add_column(name, justify="left" if name == first else "right")
    return made


def cells(row: dict[str, float | None], cyclic: float | None, seconds: float) -> list[str]:
    """Return a row's cells."""
    shown = ["-" if value is None else f"{value:.3f}" for value in row.values()]
    return [*shown, "-" if cyclic is None else f"{cyclic:.0%}", f"{seconds:.2f}"]


def show(console: Console, found: dict[str, dict[str, Any]], stages: Sequence[int]) -> dict[str, Any]:
    """Print a table for each number of stages and link, and one of geometric means; return these means."""
    summary, means = table("geometric means; the last column is the longest", "stages, link"), dict[str, Any]()
    for key in (f"{number}, {link}" for number in stages for link in LINKS):
        made = table(f"{key.replace(', ', ' stages, ')}: bottleneck over bound", "network")
        rows = {name: network["rows"][key] for name, network in found.items() if key in network["rows"]}
        if not rows:
            continue
        for name, row in rows.items():
            star = " *" if row["proven"] else ""
            made.add_row(name + star, *cells(ratios(row), row["peer"].get("cyclic"), row["seconds_to_split"]))
        console.print(made)
        columns = {one: [ratios(row)[one] for row in rows.values()] for one in ratios(next(iter(rows.values())))}
        known = {one: [value for value in column if value is not None] for one, column in columns.items()}
        mean = {one: statistics.geometric_mean(column) if column else None for one, column in known.items()}
        shares = [row["peer"]["cyclic"] for row in rows.values() if row["peer"]]
        cyclic = statistics.mean(shares) if shares else None
        longest = max(row["seconds_to_split"] for row in rows.values())
        means[key] = {**mean, "cyclic": cyclic, "longest_seconds": longest}
        summary.add_row(key, *cells(mean, cyclic, longest))
    console.print(summary)
    console.print("* proven to be the best cut there is")
    return means


def verdict(console: Console, means: dict[str, Any]) -> None:
    """Print which means miss their targets."""
    for key, mean in means.items():
        target = TARGETS[int(key.partition(",")[0])]
        said = "reached" if mean["certified"] <= target else "MISSED"
        console.print(f"{key}: {mean['certified']:.3f} of the certified bound, target {target:.2f}: {said}")


def show_measured(console: Console, found: dict[str, dict[str, Any]]) -> None:
    """Print the predicted and the measured stages."""
    for name, network in found.items():
        pairs = network.get("two_stages")
        for number, (a, b) in enumerate(zip(*pairs.values(), strict=True) if pairs else ()):
            off = f"{100 * (b / a - 1):+.1f} %"
            console.print(f"{name}, stage {number}: predicted {1e3 * a:.2f} ms, measured {1e3 * b:.2f} ms, {off}")


def environment() -> dict[str, Any]:
    """Return the machine and the versions."""
    names = ["torch", "numpy", "scipy", *(["mtkahypar"] if _kahypar() else [])]
    versions = {name: importlib.metadata.version(name) for name in names}
    return {"cpu": cpu_name(), "python": platform.python_version(), **versions}


def main() -> None:
    """Run the bench."""
    parser = argparse.ArgumentParser(description="Plans of stages against their bounds, rules and Mt-KaHyPar")
    parser.add_argument("--only", nargs="+", choices=list(SPLIT_NETWORKS), default=list(SPLIT_NETWORKS))
    parser.add_argument("--quick", action="store_true", help="three networks, and no 8 stages")
    parser.add_argument("--measure", action="store_true", help="seconds of operations and of two stages, measured")
    parser.add_argument("--prove", type=float, default=0.0, help="seconds for each plan, to tighten its bound")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.stages = STAGES[:2] if options.quick else STAGES
    console, found = Console(width=120), dict[str, dict[str, Any]]()
    where = environment()
    console.print(", ".join(f"{name} {value}" for name, value in where.items()))
    if _kahypar() is None:
        console.print("Mt-KaHyPar is absent: pip install mtkahypar")
    for name in options.only[:3] if options.quick else options.only:
        found[name] = bench(name, options, console.print)
        console.print(f"{name}: {found[name]['operations']} operations, {1e3 * found[name]['whole']:.2f} ms")
    means = show(console, found, options.stages)
    verdict(console, means)
    show_measured(console, found)
    if options.json:
        content = {"environment": where, "measured": options.measure, "means": means, "networks": found}
        options.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
