"""Whether a switch pays: a pure function of step times, of the steps left and of the cost of the switch, in seconds.

saved = steps left x (dense step - factored step) - cost of the switch        epochs to break even = cost / gain
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from surgery.text import seconds

__all__ = ["LEAST_GAIN", "Forecast", "make_forecast"]

LEAST_GAIN = 0.03  # ours: share of the step; a smaller gain is lost in the noise of the measurement


@dataclass(frozen=True)
class Forecast:
    """Seconds of a dense and of a factored step, seconds that the switch costs, and what follows for the epochs left.

    ``break_even`` is in epochs, and infinite if a factored step is not shorter. It and ``saved`` assume that each epoch
    keeps its number of steps. ``saved`` is None if the number of epochs left is not known.
    """

    dense_step: float
    factored_step: float
    steps: int
    epochs_left: int | None
    cost: float

    @property
    def gain(self) -> float:
        """Seconds by which an epoch gets shorter."""
        return self.steps * (self.dense_step - self.factored_step)

    @property
    def break_even(self) -> float:
        """Epochs until the switch has earned what it costs."""
        return self.cost / self.gain if self.gain > 0 else math.inf

    @property
    def saved(self) -> float | None:
        """Seconds saved in all epochs left, less the cost of the switch."""
        return None if self.epochs_left is None else self.epochs_left * self.gain - self.cost

    @property
    def pays(self) -> bool:
        """Whether a step gets clearly shorter, and the epochs left save more than the switch costs."""
        shorter = self.factored_step < (1 - LEAST_GAIN) * self.dense_step
        return shorter and (self.saved is None or self.saved > 0)

    @property
    def reason(self) -> str:
        """The reason for or against the switch, in words."""
        steps = f"a step of {seconds(self.dense_step)} becomes {seconds(self.factored_step)}"
        if self.factored_step >= (1 - LEAST_GAIN) * self.dense_step:
            return f"it would not train faster: {steps}"
        ratio = f"{steps} ({self.dense_step / self.factored_step:.2f}x)"
        even = f"the switch costs {seconds(self.cost)} and breaks even after {self.break_even:.2g} epochs"
        if self.saved is None:
            return f"{ratio}; {even}"
        if self.saved <= 0:
            return f"it would not pay: {ratio}, but {even}, and {self.epochs_left} are left"
        return f"{ratio}; {even}; {seconds(self.saved)} saved over {self.epochs_left} epochs"


def make_forecast(
    *,
    dense_step: float,
    measured_dense: float,
    measured_factored: float,
    steps: int,
    epochs_left: int | None,
    cost: float,
) -> Forecast:
    """Return the forecast from the seconds of a training step and of measured passes of both models.

    Only the forward and backward passes are assumed to change; data loading, optimizer and evaluation take as long as
    before. So the step gets shorter by as many seconds as the passes do. It gets shorter at most by the same factor.

    >>> forecast = make_forecast(
    ...     dense_step=1.0, measured_dense=0.8, measured_factored=0.2, steps=10, epochs_left=5, cost=3.0
    ... )
    >>> round(forecast.factored_step, 6), round(forecast.break_even, 6), round(forecast.saved, 6)
    (0.4, 0.5, 27.0)
    """
    ratio = measured_factored / measured_dense
    factored = max(dense_step - (measured_dense - measured_factored), min(1.0, ratio) * dense_step)
    return Forecast(dense_step, factored, steps, epochs_left, cost)
