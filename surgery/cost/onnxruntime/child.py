"""The program of a process that times one model by itself, as a user would run it. It does not import torch.

Its one argument is JSON: ``model`` and ``inputs`` are the paths of an .onnx file and of an .npz file with its inputs in
order; ``threads`` may be null for what onnxruntime chooses. The process writes a line ``"ready"`` to standard output.
Then each line on standard input is the seconds of one block; the process times the block and answers with a JSON list.
The list has two numbers for each run: its seconds, and how many of them a thread waited for a core that another program
had (Linux counts that; elsewhere it is 0). The process ends when its input ends, so that it never outlives its parent.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort

__all__ = ["main"]

_SETTLE = 0.05  # seconds of a block that do not count: caches fill, threads wake up and spread over the cores


def main() -> None:
    """Open the model, run it once, and time blocks until the input ends."""
    run = _open(**json.loads(sys.argv[1]))
    run()
    waits = _open_waits()
    gc.disable()
    _say("ready")
    for line in sys.stdin:
        _say(_time_block(run, float(line), waits))


def _open(model: str, inputs: str, threads: int | None) -> Callable[[], object]:
    options = ort.SessionOptions()
    options.log_severity_level = 4  # fatal only: what goes wrong is raised
    if threads is not None:
        options.intra_op_num_threads = threads
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    with np.load(inputs, allow_pickle=False) as arrays:
        values = [arrays[name] for name in arrays.files]
    feeds = {declared.name: value for declared, value in zip(session.get_inputs(), values, strict=True)}
    return lambda: session.run(None, feeds)


def _time_block(run: Callable[[], object], seconds: float, waits: list[int]) -> list[tuple[float, float]]:
    """Return the seconds of each run, and those waited. Some runs come first that do not count; one run always does."""
    clock = time.perf_counter
    start = clock()
    run()
    while clock() - start < min(_SETTLE, seconds / 5):
        run()
    found: list[tuple[float, float]] = []
    while not found or clock() - start < seconds:
        waited = _read_waits(waits)
        before = clock()
        run()
        spent = clock() - before
        # The threads wait for each other at barriers: the run is late by the longest wait of one of them.
        pairs = zip(_read_waits(waits), waited, strict=False)  # none if a thread has ended meanwhile
        found.append((spent, min(spent, max((now - then for now, then in pairs), default=0) / 1e9)))
    return found


def _open_waits() -> list[int]:
    """Return open files that count the waits of this process's threads; none if the system does not count them."""
    try:
        return [os.open(f"/proc/self/task/{task}/schedstat", os.O_RDONLY) for task in os.listdir("/proc/self/task")]
    except OSError:
        return []


def _read_waits(waits: list[int]) -> list[int]:
    """Return for each thread the nanoseconds of its life in which it was ready to run but had no core."""
    try:
        return [int(os.pread(file, 64, 0).split()[1]) for file in waits]
    except (OSError, IndexError):  # a thread has ended, or the kernel counts nothing
        waits.clear()
        return []


def _say(value: Any) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201  # the answer to the process that asked


if __name__ == "__main__":
    main()
