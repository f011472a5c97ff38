"""What a promise is measured with: a backend for sites, and what times whole models in new processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from surgery.cost.base import Backend
from surgery.cost.registry import BACKENDS, make_backend
from surgery.cost.timing import MARGIN
from surgery.errors import InputError
from surgery.plans.goal import Goal
from surgery.runtime.bench import ModelTiming, Timing
from surgery.runtime.fresh import Apart

__all__ = ["Instruments", "ModelTimer", "OpenTimer", "backend_of", "instruments_of"]

_SECONDS = 3.0


class ModelTimer(Protocol):
    """Times other models against one; ``surgery.runtime.fresh.Apart`` does so in new processes."""

    def alone(self, *, seconds: float, progress: Callable[[float], None] | None) -> ModelTiming:
        """Return the timing of the model itself."""

    def against(
        self,
        model: Any,
        *,
        goal: float | None,
        patience: int,
        seconds: float,
        progress: Callable[[float], None] | None,
    ) -> Timing:
        """Return the timing of both; longer where it is open whether the ``goal``, a speed-up, is reached."""


OpenTimer: TypeAlias = Callable[[Any, Any, Backend], ModelTimer]


@dataclass(frozen=True)
class Instruments:
    """What measures sites, and ``open_timer(model, inputs, backend)``, which opens what times whole models with it.

    Whole models are timed for ``seconds`` each time. A speed-up that differs by less than ``margin`` is the same.
    """

    backend: Backend = field(default_factory=make_backend)
    open_timer: OpenTimer = Apart
    seconds: float = _SECONDS
    margin: float = MARGIN


def instruments_of(goal: Goal) -> Instruments:
    """Return the instruments that a goal names, or the usual ones.

    Raises:
        InputError: its backend is neither a ``Backend`` nor the name of one.
    """
    return Instruments() if goal.backend is None else Instruments(backend_of(goal.backend))


def backend_of(given: Any) -> Backend:
    """Return the backend that was given, or a new one of this name.

    Raises:
        InputError: an unknown name, or something else.
    """
    if isinstance(given, Backend):
        return given
    if isinstance(given, str):
        return make_backend(given)
    what = f"backend is a {type(given).__name__}"
    raise InputError(
        what, allowed=f"surgery.Backend, {', '.join(BACKENDS)}", next_step="say one of these, or leave it out"
    )
