"""What runs in a process of its own to time one model there, as a user would run it; it imports no torch.

The one argument is JSON: ``model`` and ``inputs``, the paths of an .onnx file and of an .npz file with its inputs in
order, and ``threads``, or null for what onnxruntime chooses. After a line ``"ready"`` on standard output the process
times one block for each line on standard input, which is the seconds of the block, and answers with a JSON list. It has
for each run its seconds, and how many of them a thread waited for a core that another program had (Linux counts that;
elsewhere 0). The process ends where its input ends, so that it never outlives the one that asked.
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

_SETTLE = 0.05  # seconds of a block that do not count: caches fill, and threads wake up and part from each other


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
    """Return the seconds of each run, and those waited; at least one run, after some that do not count."""
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
        pairs = zip(_read_waits(waits), waited, strict=False)  # none if a thread has ended meanwhile
        found.append((spent, min(spent, max((now - then for now, then in pairs), default=0) / 1e9)))
    return found


def _open_waits() -> list[int]:
    """Return what to read of the threads that this process has; nothing where the system does not count their waits."""
    try:
        return [os.open(f"/proc/self/task/{task}/schedstat", os.O_RDONLY) for task in os.listdir("/proc/self/task")]
    except OSError:
        return []


def _read_waits(waits: list[int]) -> list[int]:
    """Return the nanoseconds that each thread has been ready to run in its life without a core."""
    try:
        return [int(os.pread(file, 64, 0).split()[1]) for file in waits]
    except (OSError, IndexError):  # a thread has ended, or the kernel counts nothing
        waits.clear()
        return []


def _say(value: Any) -> None:
    print(json.dumps(value), flush=True)  # noqa: T201  # the answer to the process that asked


if __name__ == "__main__":
    main()
