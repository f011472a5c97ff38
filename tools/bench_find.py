"""Time the search for the sites of a ResNet-50 at 224x224, with tracing, as a module and as a program.

    python tools/bench_find.py [--repeats 5]

The modules that torch needs for its fake tensors are imported first. The first call in the process and the median are
printed.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # torch imports it with the first fake tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from surgery.kinds.registry import Model, open_model
from surgery.sites.find import find
from surgery.system.machine import cpu_name
from tools.networks import build


def time_find(model: Model, inputs: tuple[torch.Tensor, ...]) -> tuple[float, int]:
    """Return the seconds to open a model and find its sites, and their number."""
    start = time.perf_counter()
    found = find(open_model(model, (inputs, {}), copies=False).flow)
    return time.perf_counter() - start, len(found.placements)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    versions = f"python {platform.python_version()}, torch {torch.__version__}"
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, {versions}")
    module, inputs = build("resnet50"), (torch.randn(1, 3, 224, 224),)
    first, sites = time_find(module, inputs)
    program = torch.export.export(module, inputs)
    for name, model in (("module", module), ("program", program)):
        later = [time_find(model, inputs)[0] for _ in range(repeats)]
        start = f", first call in the process {first:.2f} s" if name == "module" else ""
        print(f"{name}: {sites} sites in {statistics.median(later):.3f} s (median of {repeats}{start})")


if __name__ == "__main__":
    main()
