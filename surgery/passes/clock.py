"""The clock: whole models timed against the original as their user has them, each in processes of its own."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.cost.base import Backend, Seconds
from surgery.kinds.inputs import Inputs
from surgery.kinds.registry import Model
from surgery.passes.instruments import ModelTimer, OpenTimer
from surgery.plans.planner import Progress
from surgery.runtime.bench import Timing
from surgery.runtime.export import capture

__all__ = ["Clock"]

_FINAL = 2  # times the seconds for the model that is returned
_PATIENCE = 2  # times that, where it is open whether a target is reached, and twice as much for that model


class Clock:
    """Times changed models against a model, for ``run_s`` seconds each time; the original alone once in its life.

    ``open_timer`` opens what does it, when the first is to be timed.
    """

    def __init__(
        self,
        model: Model,
        inputs: Inputs,
        backend: Backend,
        open_timer: OpenTimer,
        *,
        run_s: float,
        progress: Progress,
    ) -> None:
        self._model, self._inputs, self.backend = model, inputs, backend
        self._open, self._run_s, self._progress = open_timer, run_s, progress

    @cached_property
    def seconds(self) -> float:
        """The median seconds of a run of the original; known from another time, perhaps."""

        def measure() -> Seconds:
            timing = self._original.alone(seconds=self._run_s, progress=self._show)
            return Seconds(timing.median_s)

        return self.backend.recall(Seconds, self.structure, measure).seconds

    @cached_property
    def structure(self) -> dict[str, Any]:
        """All that the latency of the original depends on: its graph, and the shapes of its tensors and inputs."""
        program, inputs = capture(self._model, self._given)
        tensors = [*program.state_dict.items(), *enumerate(pytree.tree_leaves(inputs))]
        shapes = [(n, list(t.shape), str(t.dtype)) if isinstance(t, Tensor) else (n, repr(t)) for n, t in tensors]
        text = json.dumps([program.graph_module.code, shapes])
        return {"processes": hashlib.sha256(text.encode()).hexdigest()}

    def time(self, changed: Any, *, goal: float | None = None, final: bool = False) -> Timing:
        """Time a changed model against the original, at the inputs at which the result is to be fast.

        It takes longer for a ``final`` model, and where it is open whether a ``goal``, a speed-up, is reached.
        """
        return self._original.against(
            changed,
            goal=goal,
            patience=_PATIENCE * (_FINAL if final else 1),
            seconds=(_FINAL if final else 1) * self._run_s,
            progress=self._show,
        )

    @cached_property
    def _original(self) -> ModelTimer:
        return self._open(self._model, self._given, self.backend)

    @property
    def _given(self) -> Inputs | None:
        return self._inputs if any(self._inputs) else None

    def _show(self, share: float) -> None:
        self._progress("time", round(100 * share), 100)
