"""Stages in a pipeline, one core each, against the whole network on one core: throughput and latency, in one run.

    python tools/bench_pipeline.py                             # ResNet-50 in two stages
    python tools/bench_pipeline.py resnet50 mobilenet_v2 --stages 2 --seconds 30 --json pipeline.json

For each network: the predicted seconds of each stage (from the measured times of its operations), the measured ones of
each stage by itself, then those in the pipeline, while all stages work. The throughput that the slowest stage alone
would allow is the whole's seconds over that stage's.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from surgery.stages.bench import PipelineTiming
from surgery.stages.split import Split, split
from tools.networks import NETWORKS, build


def main() -> None:
    """Split, time and print each network."""
    parser = argparse.ArgumentParser(description="Stages in a pipeline against the whole network on one core")
    parser.add_argument("networks", nargs="*", default=["resnet50"], help=f"some of {', '.join(NETWORKS)}")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--link", default="10GB/s", help="between two threads, that is through memory")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each pipeline")
    parser.add_argument("--cores", type=lambda text: [int(core) for core in text.split(",")], help="as 0,1")
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    console, found = Console(width=110), {}
    for name in chosen.networks:
        inputs = NETWORKS[name].inputs()
        cut = split(build(name).eval(), inputs, stages=chosen.stages, link=chosen.link)
        timing = cut.bench(inputs, seconds=chosen.seconds, cores=chosen.cores)
        show(console, name, cut, timing)
        found[name] = {"split": cut.report.to_json(), "pipeline": timing.to_json()}
        if chosen.json:
            chosen.json.write_text(json.dumps(found, indent=1))


def show(console: Console, name: str, cut: Split, timing: PipelineTiming) -> None:
    """Print the times of a network's stages, and what the pipeline gains."""
    table = Table(title=f"{name} in {len(cut.stages)} stages on cores {', '.join(map(str, timing.cores))}")
    for heading in ("stage", "predicted", "measured alone", "off by", "in the pipeline", "sends on"):
        table.add_column(heading, justify="right")
    for number, (row, samples) in enumerate(zip(cut.report.stages, timing.stages, strict=True)):
        alone = row.measured_s
        off = "-" if alone is None else f"{100 * (alone / row.predicted_s - 1):+.1f} %"
        cells = (_ms(row.predicted_s), _ms(alone), off, _ms(samples.median), f"{row.bytes_out / 1e6:.2f} MB")
        table.add_row(str(number), *cells)
    console.print(table)
    for line in timing.rows():
        console.print("  ".join(f"{cell:>18}" for cell in line))
    s, allowed = timing.speedup, timing.whole.median / max(stage.median for stage in timing.stages)
    console.print(
        f"throughput {s.value:.2f}x of the whole on one core, 95 % interval {s.low:.2f} to {s.high:.2f}; "
        f"the slowest stage allows {allowed:.2f}x; load {timing.environment.load}\n"
    )


def _ms(seconds: Any) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f} ms"


if __name__ == "__main__":
    main()
