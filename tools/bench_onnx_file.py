"""Measure how fast a large ONNX file is opened, and how much memory it takes to decompose it, in fresh processes.

    python tools/bench_onnx_file.py [--megabytes 100] [--repeats 3] [--auto] [--json FILE]

The files are made here, of random weights of a quarter of the rank, with noise: convolutions and matrix products in one
file; the same with its weights in a second file; and matrix products alone. A file of a single weight would measure its
solver (``bench_memory.py``). ``--auto`` also measures searches, without data and with 96 samples, for some minutes. The
seconds are those of ``surgery.load`` and of ``surgery.find_sites`` on what it returns, with its shapes, as ``surgery
inspect`` finds them. Memory is the peak of ``surgery decompose FILE -o OUT`` (Linux, VmHWM) minus the peak of the same
command line on a file of 1 MB, as a multiple of the size of the files: imports do not count.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # a script finds modules in tools/ only

SECONDS, TIMES = 1.0, 3.0  # the targets: of finding sites, and of memory
SMALL = 1  # megabytes
PLAIN = {  # options of the command; the first two also time both models
    "energy=0.9": ("--ranks", "energy=0.9"),
    "keep_params=0.9": ("--ranks", "keep_params=0.9"),
    "not timed": ("--ranks", "energy=0.9", "--no-timing"),
}
AUTO = {"auto": ("--ranks", "auto"), "with data": ("--ranks", "auto", "--calibration", "DATA")}
PACKAGES = ("torch", "onnx", "onnx-ir", "onnxruntime", "numpy")

FIND = """
import json, sys, time
import surgery, surgery.files.load, surgery.passes.preview
from surgery.kinds.onnx.kind import random_inputs
start = time.perf_counter()
model = surgery.load(sys.argv[1])
loaded = time.perf_counter()
sites = surgery.find_sites(model, random_inputs(model)[0])
print(json.dumps({"load": loaded - start, "find": time.perf_counter() - loaded, "sites": len(sites[0])}))
"""
DECOMPOSE = """
import sys
from pathlib import Path
from surgery.cli import main
try:
    main()
except SystemExit as stop:
    status = stop.code
line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print("peak", int(line.split()[1]) * 1024, status or 0)
"""


def make(path: Path, megabytes: float, *, matrices: bool = False, beside: bool = False) -> Path:
    """Write a model of about so many megabytes of random weights, and samples beside it; return its path."""
    import numpy as np
    import onnx
    from onnx import helper

    rng, numbers = np.random.default_rng(0), megabytes * 1e6 / 4
    channels = 128
    convolutions = 0 if matrices else max(1, round(numbers / 2 / (channels**2 * 9)))
    layers = 8 if matrices else 4
    width = round((numbers / (1 if matrices else 2) / layers) ** 0.5)
    weights: dict[str, Any] = {}

    def weight(rows: int, columns: int) -> Any:
        rank = max(1, min(rows, columns) // 4)
        left, right = (rng.standard_normal(size, np.float32) for size in ((rows, rank), (rank, columns)))
        noise = rng.standard_normal((rows, columns), np.float32) / 50
        return (left @ right / rank**0.5 + noise) / columns**0.5

    nodes, last = [], "x"
    for number in range(convolutions):
        weights[f"conv{number}.weight"] = weight(channels, channels * 9).reshape(channels, channels, 3, 3)
        nodes.append(helper.make_node("Conv", [last, f"conv{number}.weight"], [f"c{number}"], pads=[1, 1, 1, 1]))
        last = f"c{number}"
    if convolutions:
        nodes += [helper.make_node("GlobalAveragePool", [last], ["p"]), helper.make_node("Flatten", ["p"], ["f"])]
        last = "f"
    sizes = [64 if matrices else channels, *[width] * (layers + 1), 64]
    for number, shape in enumerate(pairwise(sizes)):
        weights[f"linear{number}.weight"] = weight(*shape)
        nodes.append(helper.make_node("MatMul", [last, f"linear{number}.weight"], [f"m{number}"]))
        last = f"m{number}"
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("x", last))
    one = [64] if matrices else [channels, 8, 8]
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", *one])
    np.savez(path.with_suffix(".npz"), x=rng.standard_normal((96, *one), np.float32))
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "random", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=beside, location=f"{path.name}.data", size_threshold=1024)
    return path


def size_of(path: Path) -> int:
    """Return the bytes of a model's files."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())


def in_fresh_process(code: str, *words: str) -> str:
    """Run Python code in a new process, and return the last line that it prints."""
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.splitlines()[-1]


def peak_of(path: Path, rule: tuple[str, ...]) -> int:
    """Return the largest resident memory of a command that decomposes a file."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        given = [str(path.with_suffix(".npz")) if word == "DATA" else word for word in rule]
        words = ("decompose", str(path), "-o", f"{folder}/small.onnx", *given, "--factorization", "svd")
        _, peak, status = in_fresh_process(DECOMPOSE, *words).split()
    if status != "0":
        raise SystemExit(f"surgery {' '.join(words)}: status {status}")
    return int(peak)


def measure(path: Path, small: Path, rules: Mapping[str, tuple[str, ...]], repeats: int) -> dict[str, Any]:
    """Return the seconds and the memory of one file."""
    found = [json.loads(in_fresh_process(FIND, str(path))) for _ in range(repeats)]
    row: dict[str, Any] = {name: statistics.median(each[name] for each in found) for name in ("load", "find", "sites")}
    row["bytes"] = size_of(path)
    row["memory"] = {name: peak_of(path, rule) - peak_of(small, rule) for name, rule in rules.items()}
    return row


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--auto", action="store_true", help="also measure --ranks auto, which takes minutes")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    options = parser.parse_args()
    rules = PLAIN | (AUTO if options.auto else {})
    from surgery.system.machine import cpu_name

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    print(f"{cpu_name()}, python {platform.python_version()}, {versions}")
    print(f"{'file':24}{'MB':>7}{'load':>9}{'find':>9}{'sites':>7}" + "".join(f"{name:>18}" for name in rules))
    report = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = make(folder / "tiny.onnx", SMALL)
        for what, made in (("one file", {}), ("weights beside it", {"beside": True}), ("matrices", {"matrices": True})):
            path = make(folder / "big.onnx", options.megabytes, **made)
            row = report[what] = measure(path, small, rules, options.repeats)
            over = "  over the target" if row["find"] > SECONDS else ""
            memory = ""
            for peak in row["memory"].values():
                memory += f"{peak / 1e6:9.0f} MB {peak / row['bytes']:4.1f}x"
                over = over or "  over the target" * (peak / row["bytes"] > TIMES)
            seconds = f"{row['load']:7.2f} s{row['find']:7.2f} s"
            print(f"{what:24}{row['bytes'] / 1e6:7.0f}{seconds}{row['sites']:7}{memory}{over}", flush=True)
            for file in folder.glob("big.onnx*"):
                file.unlink()
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
