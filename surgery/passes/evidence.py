"""What fits are made from and judged by: samples, of which some are held out, or inputs that are made up.

Upper confidence limits of means over samples: what a promise says of samples that no one has seen.

The output error is that of held-out samples. Its promise is for samples that no one has seen, so what counts is an
upper confidence limit of 95 %: of the ratio of two sums over samples (squared error, squared output), by its standard
error in large samples (Cochran 1977, Sampling Techniques, section 2.11). Errors are skewed: most samples have little,
and a few that may not have been seen have much; the limit is corrected for that (Johnson 1978, Modified t Tests and
Confidence Intervals for Asymmetrical Populations). Of a metric the same holds where it is given as the score of each
sample: their differences are paired, and what counts is the limit of their mean. A metric that is one number is taken
as it is. Since the best of several trials is taken, each the best of several fits, and the luckiest look best, the
limits hold for all of them at once: each for 1 - 0.05 / their number (Dunn 1961, Multiple Comparisons Among Means).

The outputs of the original on samples that nothing was fitted to, and how far other models are from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from scipy.special import stdtrit
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.data.samples import Calibration
from surgery.data.standin import GLANCE, stand_in
from surgery.data.visible import VisibleOutputs
from surgery.errors import InputError, Refusal
from surgery.kinds.inputs import Inputs
from surgery.kinds.layers.untouched import untouched
from surgery.kinds.registry import Model, kind_of
from surgery.passes.factoring import SiteData, gather
from surgery.passes.original import Original
from surgery.passes.results import Seen
from surgery.runtime.compare import run_model
from surgery.system.memory import give_back
from surgery.system.progress import Progress

__all__ = [
    "PROMISED_SHARE",
    "TRIALS",
    "Evidence",
    "HeldOut",
    "Outputs",
    "beyond",
    "glance",
    "read_evidence",
    "split_samples",
]

TRIALS = 8  # at most, of one search
_FITS = 4  # of a trial, of which the best on held-out samples is taken
_RISK = 0.05 / (TRIALS * _FITS)  # one-sided


def beyond(differences: Tensor) -> float:
    """Return by how much the upper confidence limit of a mean of samples (n,) is above it; 0 for one sample."""
    count = len(differences)
    if count == 1:
        return 0.0
    centred = differences - differences.mean()
    variance, third = float(centred.square().sum()) / (count - 1), float(centred.pow(3).mean())
    if not variance > 0:
        return 0.0 if variance == 0 else math.nan
    quantile = float(stdtrit(count - 1, 1 - _RISK))
    # Johnson: the mean's limit moves by m3 / (6 s^2 n) + m3 (mean - mu)^2 / (3 s^4), and at the quantile t the square
    # is t^2 s^2 / n. Only a tail of large errors counts: one of small errors never lowers the limit.
    skewed = max(0.0, third) / (6 * variance * count) * (1 + 2 * quantile**2)
    return quantile * math.sqrt(variance / count) + skewed


Run = Callable[[Inputs], Any]


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
        rows = zip(self._outputs, self._visible, strict=True)
        self._energies = torch.cat([self._per_sample(list(zip(*row, strict=True))) for row in rows])

    @property
    def count(self) -> int:
        """Number of samples."""
        return self._samples.count

    def error(self, run: Run) -> tuple[float, float]:
        """Return the relative error of what another run puts out, and its upper confidence limit."""
        squares: list[Tensor] = []
        for batch, expected, visible in zip(self._samples, self._outputs, self._visible, strict=True):
            outputs = list(zip(_leaves(run(batch)), expected, visible, strict=True))
            squares.append(self._per_sample([(found - wanted, mask) for found, wanted, mask in outputs]))
        # For large samples the ratio R = sum e / sum n is off as the mean of (e - R n) / mean(n) is. Example: e = 1, 3
        # and n = 10, 10 have R = 0.2 and the residuals -0.1 and 0.1.
        e, n = torch.cat(squares), self._energies
        ratio = float(e.sum() / n.sum().clamp(min=1e-300))
        above = beyond((e - ratio * n) / n.mean().clamp(min=1e-300))
        return math.sqrt(ratio), math.sqrt(ratio + above)

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


PROMISED_SHARE = 0.25  # of the samples, to judge by where an error is promised: its confidence limit needs them
_SHARE, _ENOUGH = 0.125, 16  # share of the samples to judge by else, or as many samples, if that is more


def split_samples(samples: Calibration, share: float | None = None) -> tuple[Calibration, Calibration]:
    """Return samples to fit to, and others to judge by; both are all of them where they are too few for two parts.

    The more there are to fit to, the better is the fit. By default an eighth is to judge by, or as many more as make
    sixteen, but no more than a quarter.
    """
    # Example: of 256 samples 32 are to judge by, of 100 or of 64 sixteen, and of 20 a quarter, 5.
    few = min(PROMISED_SHARE, max(_SHARE, _ENOUGH / samples.count))
    try:
        return samples.split(few if share is None else share)
    except InputError:
        return samples, samples


@dataclass(frozen=True, eq=False)
class Evidence:
    """The model, samples to judge changed models by, and what other samples say of its sites.

    ``data`` is None where nothing is known of the sites. ``made_up`` says what the samples are if they are not the
    user's: nothing is fitted to these, since a fit would be near to the original on them alone. Where the samples were
    too few for two parts, those to judge by are ``fitted_to`` as well.
    """

    model: Model
    judging: Calibration
    data: SiteData | None
    made_up: str = ""
    fitted_to: bool = False

    @property
    def fit_to(self) -> SiteData | None:
        """What chains are fitted to, if they are."""
        return None if self.made_up else self.data

    @cached_property
    def held_out(self) -> HeldOut:
        """The original's outputs on the samples to judge by."""
        found = HeldOut(self.model, self.judging)
        give_back()  # what ran it may have held the weights once more
        return found

    @property
    def what(self) -> str:
        """What the samples to judge by are, in words."""
        if self.made_up:
            return self.made_up
        count = self.held_out.count
        samples = f"{count} calibration sample{'' if count == 1 else 's'}"
        return f"{samples} that chains were fitted to, too few to hold any out" if self.fitted_to else samples

    def see(self, changed: Any) -> Seen:
        """Return how far the outputs of a changed model are from the original's."""
        error = self.held_out.error(changed)[0]
        give_back()
        return Seen(error, self.what)


def read_evidence(
    original: Original,
    samples: Calibration,
    sites: Collection[str],
    progress: Progress,
    *,
    share: float | None = None,
    made_up: str = "",
) -> Evidence:
    """Return the evidence of samples for some sites; ``share`` of them is to judge by."""
    fit, judging = split_samples(samples, share)
    data = gather(original, fit, sites, progress)
    return Evidence(original.model, judging, data, made_up, fitted_to=judging is fit)


def glance(original: Original, progress: Progress) -> Evidence | None:
    """Return what little made-up inputs can show of a changed model; None where none can be made."""
    made = stand_in(original.model, original.inputs, original.found, effort=GLANCE, progress=progress)
    if isinstance(made, Refusal):
        return None
    evidence = Evidence(original.model, made.samples, None, made.what)
    try:
        _ = evidence.held_out
    except InputError:  # no output of numbers
        return None
    return evidence
