"""The clock: whole models timed against the original, beside it in this process or each in processes of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import sleep
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from surgery.benchmark import Ready, Timing, make_ready, time_ready
from surgery.cost.latency import Latencies, Seconds
from surgery.export import capture
from surgery.fresh import Apart
from surgery.graphs import Model
from surgery.inputs import Inputs
from surgery.ranks.planning import Progress

__all__ = ["Clock"]

_APART = 2  # times the seconds where speed is promised
_DISTURBED = 1.05  # times the usual seconds of the original
_PAUSES = 2.0, 5.0, 10.0  # seconds before repetitions of disturbed timings, of all in one run


@dataclass(eq=False)
class Clock:
    """Times changed models against a model, for ``run_s`` seconds each time; what was known before is looked up."""

    model: Model
    inputs: Inputs
    latencies: Latencies
    run_s: float
    progress: Progress
    _pauses: list[float] = field(init=False, default_factory=lambda: list(_PAUSES))

    @cached_property
    def seconds(self) -> float:
        """The median seconds of a run of the original; known from another time, perhaps."""

        def measure() -> Seconds:
            return Seconds(self._time([self._original]).models[0].median_s)

        return self.latencies.recall(Seconds, self.structure, measure).seconds

    @cached_property
    def _program(self) -> tuple[ExportedProgram, Inputs]:
        return capture(self.model, self.inputs if any(self.inputs) else None)

    @cached_property
    def _original(self) -> Ready:
        return self._ready(self._program[0])

    @cached_property
    def structure(self) -> dict[str, Any]:
        """All that the latency of the original depends on: its graph, and the shapes of its tensors and inputs."""
        program, inputs = self._program
        tensors = [*program.state_dict.items(), *enumerate(pytree.tree_leaves(inputs))]
        shapes = [(n, list(t.shape), str(t.dtype)) if isinstance(t, Tensor) else (n, repr(t)) for n, t in tensors]
        text = json.dumps([program.graph_module.code, shapes])
        return {"model": hashlib.sha256(text.encode()).hexdigest()}

    def beside(self, changed: Any) -> Timing:
        """Time a changed model against the original, at the inputs at which the result is to be fast.

        Where the original runs slower beside it than it does, the machine was disturbed: it is done again after a
        pause, and the fastest counts; only so often, since the machine may stay as it is.
        """
        ready = [self._original, self._ready(changed)]
        timing = self._time(ready)
        while self._pauses and self.disturbed(timing.models[0].median_s):
            sleep(self._pauses.pop(0))
            timing = min(timing, self._time(ready), key=lambda timing: timing.models[0].median_s)
        return timing

    def apart(self, changed: Any, *, promised: bool) -> Timing:
        """Time a changed model as its user has it: both as files, in new processes; for longer if speed is promised."""
        return self._alone.against(
            changed,
            threads=self.latencies.threads,
            seconds=(_APART if promised else 1) * self.run_s,
            progress=lambda share: self.progress("time", round(100 * share), 100),
        )

    @cached_property
    def _alone(self) -> Apart:
        return Apart(self.model, self.inputs if any(self.inputs) else None)

    def disturbed(self, dense_s: float) -> bool:
        """Whether the original ran slower than it does when the machine is quiet."""
        return dense_s > _DISTURBED * self.seconds

    def _ready(self, model: Any) -> Ready:
        given = self.inputs if any(self.inputs) else None
        return make_ready([model], given, threads=self.latencies.threads)[0]

    def _time(self, ready: Sequence[Ready]) -> Timing:
        return time_ready(
            ready,
            threads=self.latencies.threads,
            seconds=self.run_s,
            progress=lambda share: self.progress("time", round(100 * share), 100),
        )
