"""What a user wants to be kept, and how it is measured on a model: output error, a metric's drop, a speed-up.

The output error is that of held-out samples. Its promise is for samples that no one has seen, so what counts is an
upper confidence limit of 95 %: of the ratio of two sums over samples (squared error, squared output), by its standard
error in large samples (Cochran 1977, Sampling Techniques, section 2.11). Errors are skewed: most samples have little,
and a few that may not have been seen have much; the limit is corrected for that (Johnson 1978, Modified t Tests and
Confidence Intervals for Asymmetrical Populations). Of a metric the same holds where it is given as the score of each
sample: their differences are paired, and what counts is the limit of their mean. A metric that is one number is taken
as it is. Since the best of several trials is taken, each the best of several fits, and the luckiest look best, the
limits hold for all of them at once: each for 1 - 0.05 / their number (Dunn 1961, Multiple Comparisons Among Means).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from scipy import stats
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.data.samples import Calibration
from surgery.data.visible import VisibleOutputs
from surgery.errors import InputError
from surgery.kinds.inputs import Inputs
from surgery.kinds.layers.untouched import untouched
from surgery.kinds.registry import Model, kind_of
from surgery.runtime.compare import evaluating, run_model
from surgery.text import FAR, first_line, shown

__all__ = ["TRIALS", "Evaluate", "Goal", "HeldOut", "Outputs", "Promise", "Seen", "drop_of", "metric_of", "scores_of"]

Evaluate = Callable[[Any], float | Tensor]
Run = Callable[[Inputs], Any]
TRIALS = 8  # at most, of one search
_FITS = 4  # of a trial, of which the best on held-out samples is taken
_RISK = 0.05 / (TRIALS * _FITS)  # one-sided
_DEFAULT_ERROR = 0.05


@dataclass(frozen=True)
class Goal:
    """One of ``max_error`` (of the output, relative), ``max_drop`` (of a metric), ``target_speedup`` (at least 1)."""

    kind: str
    limit: float

    @classmethod
    def of(cls, max_error: float | None, target_speedup: float | None, max_drop: float | None, *, metric: bool) -> Goal:
        """Return the goal that is given; without any, an output error of at most 0.05. ``metric``: there is one.

        Raises:
            InputError: more than one, or a value out of range.
        """
        given = {"max_error": max_error, "target_speedup": target_speedup, "max_drop": max_drop}
        said = [(kind, limit) for kind, limit in given.items() if limit is not None]
        if len(said) > 1:
            raise InputError(f"{' and '.join(kind for kind, _ in said)} at once", allowed="one of them")
        kind, limit = said[0] if said else ("max_error", _DEFAULT_ERROR)
        if kind == "max_drop" and not metric:
            raise InputError("max_drop without a metric", next_step="give eval_fn= (--eval module:function)")
        least = 1.0 if kind == "target_speedup" else 0.0
        if not (math.isfinite(limit) and limit >= least and (limit > 0 or kind == "max_drop")):
            allowed = {"max_error": "above 0", "target_speedup": "1 or more", "max_drop": "0 or more"}[kind]
            raise InputError(f"{kind}={limit:g}", allowed=f"numbers, {allowed}")
        return cls(kind, float(limit))


@dataclass(frozen=True)
class Promise:
    """A goal, what was measured for the result, and whether it is kept; ``note`` says what stood in the way."""

    kind: str
    limit: float
    measured: float
    kept: bool
    note: str = ""

    def __str__(self) -> str:
        what = {"max_error": "output error", "max_drop": "drop of the metric", "target_speedup": "speed-up"}[self.kind]
        bound = "at least" if self.kind == "target_speedup" else "at most"
        state = "kept" if self.kept else "NOT KEPT"
        note = shown(f"; {self.note}") if self.note else ""
        return f"{what} {bound} {self.limit:g}: measured {self.measured:.3g}, {state}{note}"


@dataclass(frozen=True)
class Seen:
    """The relative error of a changed model's outputs, and on what inputs it was measured."""

    error: float
    what: str

    def __str__(self) -> str:
        warning = ": the outputs are no longer those of the original" if self.error > FAR else ""
        return f"output error {self.error:.3g} on {shown(self.what)}{warning}"


class HeldOut:
    """The outputs of a model on held-out samples, to measure others against; what masks hide of them does not count."""

    def __init__(self, model: Model, samples: Calibration) -> None:
        with _running(model) as run:
            self._outputs = Outputs(run, samples)

    @property
    def count(self) -> int:
        """Number of samples."""
        return self._outputs.count

    def error(self, model: Model) -> tuple[float, float]:
        """Return the relative error of the outputs, and its upper confidence limit."""
        with _running(model) as run:
            return self._outputs.error(run)


@contextmanager
def _running(model: Model) -> Iterator[Run]:
    """Yield what runs a model as ``run_model`` does; it keeps nothing of that."""
    module = kind_of(model).runnable(model)
    with untouched(module):
        yield partial(run_model, module)


class Outputs:
    """What a run puts out for samples, to measure other runs against; what masks hide does not count.

    Raises:
        InputError: there is nothing to compare.
    """

    def __init__(self, run: Run, samples: Calibration) -> None:
        self._samples = samples
        self._outputs = [_leaves(run(batch)) for batch in samples]
        if not any(leaves for leaves in self._outputs):
            raise InputError("the model has no floating-point output to compare")
        visible = VisibleOutputs(lambda batch: _leaves(run(batch)), samples)
        pairs = zip(samples, self._outputs, strict=True)
        self._visible = [list(visible.of(batch, leaves)) for batch, leaves in pairs]
        if not any(mask is None or bool(mask.any()) for masks in self._visible for mask in masks):
            what = "the masks of the held-out samples hide all that the model puts out"
            raise InputError(what, next_step="give samples with visible positions")

    @property
    def count(self) -> int:
        """Number of samples."""
        return self._samples.count

    def error(self, run: Run) -> tuple[float, float]:
        """Return the relative error of what another run puts out, and its upper confidence limit."""
        squares: list[Tensor] = []
        energies: list[Tensor] = []
        for batch, expected, visible in zip(self._samples, self._outputs, self._visible, strict=True):
            outputs = list(zip(_leaves(run(batch)), expected, visible, strict=True))
            squares.append(self._per_sample([(found - wanted, mask) for found, wanted, mask in outputs]))
            energies.append(self._per_sample([(wanted, mask) for _, wanted, mask in outputs]))
        e, n = torch.cat(squares), torch.cat(energies)
        ratio = float(e.sum() / n.sum().clamp(min=1e-300))
        beyond = _beyond((e - ratio * n) / n.mean().clamp(min=1e-300))
        return math.sqrt(ratio), math.sqrt(ratio + beyond)

    def _per_sample(self, outputs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Return the sum of squares of each sample of a batch, or of all where no axis 0 holds samples.

        What several outputs say of one sample is not several samples.
        """
        sums: list[Tensor] = []
        for output, visible in outputs:
            squares = output.square() if visible is None else output.square().masked_fill(~visible, 0.0)
            by_sample = output.dim() > 1 and len(output) <= self._samples.batch_size
            sums.append(squares.flatten(1).sum(1) if by_sample else squares.sum().view(1))
        size = max(map(len, sums))
        return torch.stack([s if len(s) == size else (s.sum() / size).expand(size) for s in sums]).sum(0)


def _leaves(output: Any) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.detach().double() for leaf in leaves]


def _beyond(differences: Tensor) -> float:
    """Return by how much the upper confidence limit of a mean of samples (n,) is above it; 0 for one sample."""
    count = len(differences)
    if count == 1:
        return 0.0
    centred = differences - differences.mean()
    variance, third = float(centred.square().sum()) / (count - 1), float(centred.pow(3).mean())
    if not variance > 0:
        return 0.0 if variance == 0 else math.nan
    quantile = float(stats.t.ppf(1 - _RISK, count - 1))
    skewed = max(0.0, third) / (6 * variance * count) * (1 + 2 * quantile**2)
    return quantile * math.sqrt(variance / count) + skewed


def scores_of(model: Model, evaluate: Evaluate) -> Tensor:
    """Return the user's metric of a model in float64: the score of each sample, or one number (1,).

    Of a program, of its module; in evaluation mode, without gradients.

    Raises:
        InputError: the function fails, or returns neither a finite number nor a tensor (samples,) of them.
    """
    module = kind_of(model).runnable(model)
    try:
        with torch.no_grad(), evaluating(module):
            found = torch.as_tensor(evaluate(module)).detach().double().cpu()
    except Exception as error:  # the user's own code
        raise InputError(f"eval_fn failed: {type(error).__name__}: {first_line(error)}") from error
    if found.dim() > 1 or not found.numel() or not bool(torch.isfinite(found).all()):
        said = f"{float(found):g}" if found.numel() == 1 else f"a tensor of shape {tuple(found.shape)}"
        allowed = "a finite number, or a tensor (samples,) of the score of each; higher is better"
        raise InputError(f"eval_fn returned {said}", allowed=allowed)
    return found.view(-1)


def metric_of(model: Model, evaluate: Evaluate) -> float:
    """Return the user's metric of a model as one number, the mean of its scores.

    Raises:
        InputError: as ``scores_of`` says.
    """
    return float(scores_of(model, evaluate).mean())


def drop_of(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return how much the mean of paired scores (samples,) falls, and its upper confidence limit.

    The limit is the drop itself where there is one score only.

    Raises:
        InputError: the two are not of the same samples.
    """
    if before.shape != after.shape:
        raise InputError(
            f"eval_fn returned {len(before)} scores, then {len(after)}", allowed="the same samples each time"
        )
    differences = before - after
    drop = float(differences.mean())
    return drop, drop + _beyond(differences)
