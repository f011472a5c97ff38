"""What a promise is measured with: latencies of sites, whole models in new processes, and what kernels like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from surgery.cost.onnxruntime.latency import Latencies, channel_multiple
from surgery.cost.onnxruntime.timing import MARGIN
from surgery.errors import InputError
from surgery.plans.goal import Goal
from surgery.runtime.bench import ModelTiming, Timing
from surgery.runtime.fresh import Apart

__all__ = ["Instruments", "ModelTimer", "OpenTimer", "instruments_of", "latencies_of"]

_SECONDS = 3.0


class ModelTimer(Protocol):
    """Times other models against one; ``surgery.runtime.fresh.Apart`` does so in new processes."""

    def alone(self, *, threads: int | None, seconds: float, progress: Callable[[float], None] | None) -> ModelTiming:
        """Return the timing of the model itself."""

    def against(
        self,
        model: Any,
        *,
        goal: float | None,
        patience: int,
        threads: int | None,
        seconds: float,
        progress: Callable[[float], None] | None,
    ) -> Timing:
        """Return the timing of both; longer where it is open whether the ``goal``, a speed-up, is reached."""


OpenTimer: TypeAlias = Callable[[Any, Any], ModelTimer]


@dataclass(frozen=True)
class Instruments:
    """``open_timer(model, inputs)`` opens what times whole models, for ``seconds`` each time.

    ``multiple`` is the number of channels that kernels like. A speed-up that differs by less than ``margin`` is the
    same.
    """

    latencies: Latencies = field(default_factory=Latencies)
    open_timer: OpenTimer = Apart
    multiple: int = field(default_factory=channel_multiple)
    seconds: float = _SECONDS
    margin: float = MARGIN


def instruments_of(goal: Goal) -> Instruments:
    """Return the instruments that a goal names, or the usual ones.

    Raises:
        InputError: its latencies are not ``Latencies``.
    """
    return Instruments() if goal.latencies is None else Instruments(latencies_of(goal.latencies))


def latencies_of(given: Any) -> Latencies:
    """Return the latencies that were given.

    Raises:
        InputError: they are something else.
    """
    if isinstance(given, Latencies):
        return given
    what = f"latencies is a {type(given).__name__}"
    raise InputError(what, allowed="surgery.Latencies", next_step="give surgery.Latencies(), or leave it out")
