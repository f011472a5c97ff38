"""List the files of ``surgery`` in which a function runs during one journey, such as one decomposition.

    PYTHONPATH=TREE python tools/journeys.py decompose-module|decompose-program|recompose

The output is a JSON list of paths relative to the package. Code that runs while a module is imported does not count.
The package is imported from the search path, so that an older tree can be measured.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import surgery

__all__ = ["JOURNEYS"]

ROOT = Path(surgery.__file__ or "").parent


class Trace:
    """A profiler for ``sys.setprofile``; it collects the files in which functions run while it is on."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self._importing = 0
        self._known: dict[CodeType, str | None] = {}

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """Note a call."""
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code not in self._known:
            path = Path(code.co_filename)
            self._known[code] = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else None
        file = self._known[code]
        if file is None:
            return
        if code.co_name == "<module>":
            self._importing += 1 if event == "call" else -1
        elif not self._importing:
            self.files.add(file)

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Trace this thread, and threads that start in this context."""
        threading.setprofile(self)
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)
            threading.setprofile(None)


def _network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))
    return nn.Sequential(*layers).eval()


def _decompose(model: Any, trace: Trace) -> None:
    images = torch.randn(32, 3, 8, 8)
    with trace.on():
        done = surgery.decompose(model, images[:2], ranks="energy=0.9", calibration=images)
    assert done.changes


def _decompose_module(trace: Trace) -> None:
    _decompose(_network(), trace)


def _decompose_program(trace: Trace) -> None:
    _decompose(torch.export.export(_network(), (torch.randn(2, 3, 8, 8),)), trace)


def _recompose(trace: Trace) -> None:
    from surgery.cli import main

    program = torch.export.export(_network(), (torch.randn(2, 3, 8, 8),))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "factored.pt2"
        surgery.save(surgery.decompose(program, ranks="energy=0.9").model, path)
        sys.argv = ["surgery", "recompose", str(path), "-o", str(path.with_name("dense.pt2"))]
        with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()), trace.on():
            main()
        assert path.with_name("dense.pt2").exists()


JOURNEYS: dict[str, Callable[[Trace], None]] = {
    "decompose-module": _decompose_module,
    "decompose-program": _decompose_program,
    "recompose": _recompose,
}

if __name__ == "__main__":
    traced = Trace()
    JOURNEYS[sys.argv[1]](traced)
    print(json.dumps(sorted(traced.files)))
