"""Measure the cost of the check at the end of decompose, which runs the changed model once.

    python tools/bench_probe.py [--repeats 5]

The table has, for each network, the seconds of one forward pass and of decompose, and the number of forward passes on
real numbers inside decompose. Forward passes and decompositions take turns, so that a slow moment of the machine
affects both.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import surgery
from surgery.system.machine import cpu_name
from surgery.system.tables import table
from surgery.text import seconds
from tools.networks import NETWORKS, build

CHOSEN = ("resnet18", "resnet50", "mobilenet_v2", "small_vit")
_runs: list[str] = []


class Counted(nn.Module):
    """A network that counts its runs on real numbers."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Any:
        """Run the network."""
        if type(x) is Tensor and not isinstance(x, FakeTensor):
            _runs.append("run")
        return self.inner(x)


def measure(name: str, repeats: int) -> list[str]:
    """Return the row of a network: seconds of a run and of decompose, the share of a run, and the number of runs."""
    model, x = Counted(build(name)).eval(), NETWORKS[name].inputs()
    forward, whole, counts = [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        with torch.no_grad():
            model(x)
        forward.append(time.perf_counter() - start)
        _runs.clear()
        start = time.perf_counter()
        surgery.decompose(model, x, ranks="keep_params=0.5")
        whole.append(time.perf_counter() - start)
        counts.append(len(_runs))
    run, change = statistics.median(forward), statistics.median(whole)
    spread = f"{seconds(min(whole))} to {seconds(max(whole))}"
    return [name, seconds(run), seconds(change), spread, f"{100 * run / change:.1f} %", str(max(counts))]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, {versions}")
    head = ["network", "one run", "decompose", "from fastest to slowest", "share of a run", "runs in decompose"]
    print(table([head, *(measure(name, repeats) for name in CHOSEN)]))


if __name__ == "__main__":
    main()
