"""What ``auto`` is to keep: an output error, a speed-up, or the drop of a metric; a value that says so once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from surgery.errors import InputError
from surgery.plans.faster import Latencies
from surgery.plans.options import COSTS, CostKind

__all__ = ["DEFAULT_ERROR", "Goal", "GoalKind", "Metric"]

GoalKind: TypeAlias = Literal["max_error", "max_drop", "target_speedup"]
Metric: TypeAlias = Callable[[Any], float | Tensor]

DEFAULT_ERROR = 0.05
_CALLS: dict[str, str] = {"max_error": "Goal.error", "max_drop": "Goal.drop", "target_speedup": "Goal.speedup"}
_ALLOWED: dict[str, str] = {
    "max_error": "numbers above 0",
    "max_drop": "numbers from 0",
    "target_speedup": "numbers from 1",
}


@dataclass(frozen=True)
class Goal:
    """One promise. Make it with ``Goal.error``, ``Goal.speedup`` or ``Goal.drop``, and give it as ``ranks``.

    ``limit`` is the largest error or drop, or the least speed-up. ``metric(module)`` returns a number or the score of
    each sample; higher is better. ``cost`` says what is to be low. ``backend`` measures layers and whole models: a
    ``Backend``, or the name of one; None is ``make_backend()``, onnxruntime with its cache on disk.

    >>> Goal.error(0.1), str(Goal.speedup(1.5))
    (Goal(kind='max_error', limit=0.1), 'target_speedup=1.5')
    """

    kind: GoalKind
    limit: float
    metric: Metric | None = None
    cost: CostKind = "latency"
    best_effort: bool = False
    backend: Latencies | str | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(GoalKind):
            raise InputError(f"the goal {self.kind!r} is not known", allowed=", ".join(get_args(GoalKind)))
        self._check_limit()
        if self.cost not in COSTS:
            raise InputError(f"cost={self.cost!r} is not known", allowed=", ".join(COSTS), next_step="say one of these")
        if self.metric is not None and not callable(self.metric):
            what = f"the metric is a {type(self.metric).__name__}"
            raise InputError(what, allowed="a function of a module", next_step="give the function itself")
        if self.kind == "max_drop" and self.metric is None:
            raise InputError("Goal.drop has no metric", allowed="a function of a module", next_step="give one")
        if self.kind == "target_speedup" and self.cost != "latency":
            what = f"Goal.speedup with cost={self.cost!r}"
            raise InputError(what, allowed="cost='latency', since a speed-up is measured", next_step="leave cost out")
        if self.backend is not None and self.cost != "latency":
            what = f"a backend with cost={self.cost!r}, for which nothing is timed"
            raise InputError(what, allowed="a backend with cost='latency'", next_step="leave one of them out")
        if not isinstance(self.best_effort, bool):
            raise InputError(f"best_effort={self.best_effort!r}", allowed="True, False", next_step="say one of these")
        if self.best_effort and self.kind != "target_speedup":
            what = f"{_CALLS[self.kind]} with best_effort"
            raise InputError(what, allowed="best_effort with Goal.speedup alone", next_step="leave it out")

    def _check_limit(self) -> None:
        least = 1.0 if self.kind == "target_speedup" else 0.0
        number = isinstance(self.limit, int | float) and not isinstance(self.limit, bool)
        if number and math.isfinite(self.limit) and self.limit >= least and (self.limit > 0 or self.kind == "max_drop"):
            return
        said = f"{self.limit:g}" if number else repr(self.limit)
        raise InputError(f"{self.kind}={said}", allowed=_ALLOWED[self.kind], next_step="give another limit")

    @classmethod
    def error(
        cls,
        limit: float = DEFAULT_ERROR,
        *,
        metric: Metric | None = None,
        cost: CostKind = "latency",
        backend: Latencies | str | None = None,
    ) -> Goal:
        """Return the goal of a relative output error of at most ``limit``; a ``metric`` is only measured.

        Raises:
            InputError: a limit that is not above 0, or an unknown cost.
        """
        return cls("max_error", limit, metric, cost, backend=backend)

    @classmethod
    def speedup(
        cls,
        target: float,
        *,
        best_effort: bool = False,
        metric: Metric | None = None,
        backend: Latencies | str | None = None,
    ) -> Goal:
        """Return the goal of a whole model at least ``target`` times as fast, with the least output error.

        Where that is out of reach the result is the original, or with ``best_effort`` the nearest model. A target that
        takes an output error above 0.5 counts as out of reach: such a model has little left of the original.

        Raises:
            InputError: a target below 1.
        """
        return cls("target_speedup", target, metric, best_effort=best_effort, backend=backend)

    @classmethod
    def drop(
        cls,
        limit: float,
        metric: Metric,
        *,
        cost: CostKind = "latency",
        backend: Latencies | str | None = None,
    ) -> Goal:
        """Return the goal of a metric, ``metric(module)``, higher is better, that falls by at most ``limit``.

        A number is taken as it is. Of a tensor with the score of each sample, the mean falls so with 95 % confidence.

        Of an ONNX model the module is one that onnxruntime runs. It is called with tensors or NumPy arrays, in the
        order of the graph's inputs or by their names, and returns a tuple of tensors, also of one output. Its
        ``session`` is the ``onnxruntime.InferenceSession``, for metrics that feed it themselves:

            def accuracy(run):
                (logits,) = run(images)  # or run(input=images)
                return (logits.argmax(1) == labels).double()

        Raises:
            InputError: a limit below 0, or a metric that cannot be called.
        """
        return cls("max_drop", limit, metric, cost, backend=backend)

    def __repr__(self) -> str:
        """Return the kind and the limit, with what else is not as usual."""
        said = [f"kind={self.kind!r}", f"limit={self.limit!r}"]
        said += [f"metric={self.metric!r}"] if self.metric is not None else []
        said += [f"cost={self.cost!r}"] if self.cost != "latency" else []
        said += ["best_effort=True"] if self.best_effort else []
        return f"Goal({', '.join(said)})"

    def __str__(self) -> str:
        return f"{self.kind}={self.limit:g}"
