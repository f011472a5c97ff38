"""Re-estimate batch-norm statistics: the activations of a factored network differ from those the statistics describe.

Each running mean and variance is set from the activations that reach the batch norm, in passes over all calibration
batches. In the first pass every batch norm uses the statistics of the current batch, as in training, so that the batch
norms after it see normalised inputs. With a single batch this equals one step in training mode at momentum 1. Later
passes normalise with the statistics of the pass before, as inference does.

A reference holds the moments m_ref, v_ref that reached the batch norms of the original network in the same batches.
With it, only the change since then is corrected: mean' = mean + (m - m_ref), variance' = variance * v / v_ref. The
difference between calibration and training data, and the noise of few samples, is in both moments and cancels; a
network that was not changed keeps its statistics exactly. Each batch norm is corrected before it normalises the current
batch, so that one pass is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from surgery.data.samples import Calibration
from surgery.kinds.observed import Norm, Observed
from surgery.kinds.registry import Model, observe
from surgery.sites import BatchNorm, Flow, Other, Placement
from surgery.system.progress import Progress

__all__ = ["NormDistances", "NormWatch", "Reference", "feeds_batch_norm", "reestimate_batch_norm"]

Pair = tuple[Tensor, Tensor]
Reference = Mapping[str, "_Statistics"]
_AnyNorm = TypeVar("_AnyNorm", bound="_WatchedNorm")


class NormWatch:
    """Measures the mean and variance of each batch norm's inputs while something else runs the model."""

    def __init__(self) -> None:
        self._norms: list[_WatchedNorm] = []

    def __call__(self, observed: Observed) -> None:
        """Watch the batch norms of the model in its next runs."""
        self._norms = _watched(observed, _WatchedNorm)

    @property
    def reference(self) -> Reference:
        """The mean and variance of all inputs seen so far, by the name of the batch norm."""
        return {norm.name: norm.seen for norm in self._norms}


def reestimate_batch_norm(
    model: Model,
    batches: Calibration,
    *,
    reference: Reference | None = None,
    passes: int | None = None,
    progress: Progress | None = None,
    also_watch: Callable[[Observed], None] | None = None,
) -> tuple[str, ...]:
    """Set the running statistics of all batch norms of a model in place, and return the names of the batch norms.

    ``reference`` holds the moments of the original on the same inputs, from ``NormWatch.reference``. By default there
    is one pass with a reference, and two without. Nothing but the running statistics changes; those of a program are
    tensors of its state dict. In each pass, ``progress`` is called with ("correct", batches done, all batches).
    ``also_watch`` may watch more of the model, which then runs even if it has no batch norms.

    Raises:
        InputError: as ``collect``.
    """
    observed = observe(model, next(iter(batches)))
    norms = _watched(observed, _WatchedNorm)
    if reference is not None:
        for norm in norms:
            mean, variance = norm.buffers
            norm.reference = (mean.clone(), variance.clone()), reference[norm.name]
    passes = passes or (2 if reference is None else 1)
    if also_watch is not None:
        also_watch(observed)
    # The first pass normalises with the statistics of each batch; each pass ends by setting the ones of all batches.
    for number in range(passes if norms or also_watch is not None else 0):
        for norm in norms:
            # With their own batch's statistics in the first pass, batch norms pass on what training saw: otherwise each
            # would measure what the wrong statistics of those before it have made.
            norm.own_batch, norm.seen = number == 0, _Statistics()
        for done, batch in enumerate(batches):
            if progress is not None:
                progress("correct", done, len(batches))
            observed.run(batch)
        for norm in norms:
            norm.set((norm.seen.mean, norm.seen.variance))
    for norm in norms:
        norm.keep()
    return tuple(norm.name for norm in norms)


def _corrected(before: Pair, reference: Pair, now: Pair) -> Pair:
    """Return the running mean and variance, corrected by the change from the reference to now."""
    # A channel that was constant in the original has no ratio: its variance stays as it was.
    tiny = torch.finfo(torch.float64).tiny
    ratio = (now[1] / reference[1].clamp(min=tiny)).nan_to_num(nan=1.0, posinf=1.0)
    return before[0].double() + now[0] - reference[0], before[1].double() * torch.where(reference[1] > 0, ratio, 1.0)


def feeds_batch_norm(flow: Flow, placement: Placement) -> bool:
    """Return whether only batch norms read the outputs of a site, so that they absorb a change of its mean."""
    users = [flow.at.get(user) for call in placement.calls for user in flow.users[call.value]]
    return bool(users) and all(isinstance(user, Other) and isinstance(user.epilogue, BatchNorm) for user in users)


class _Statistics:
    """Mean and variance of each channel, summed in float64; ``parts`` has one such pair for each input."""

    def __init__(self) -> None:
        # Zeros without axes take the shape of the channels with the first batch.
        self._count, self._sum, self._squares = 0, torch.tensor(0.0, device="cpu"), torch.tensor(0.0, device="cpu")
        self.parts: list[Pair] = []

    def add(self, x: Tensor) -> Pair:
        """Add a batch, and return its own mean and variance."""
        wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
        # This variance is the biased one: count * (variance + mean^2) is the sum of squares.
        mean, variance = (part.double() for part in torch.batch_norm_update_stats(wide, None, None, 0.0))
        count = x.numel() // x.shape[1]
        self._count += count
        self._sum = self._sum + count * mean
        self._squares = self._squares + count * (variance + mean.square())
        self.parts.append((mean, variance))
        return mean, variance

    @property
    def mean(self) -> Tensor:
        return self._sum / self._count

    @property
    def variance(self) -> Tensor:
        """The unbiased variance."""
        # sum (x - mean)^2 = sum x^2 - mean * sum x. It may cancel down to rounding, hence float64 and the clamp.
        return (self._squares - self._sum * self.mean).clamp(min=0) / max(1, self._count - 1)


@dataclass(eq=False)
class _WatchedNorm:
    """One batch norm: its running statistics, its inputs' statistics, and both of the original as reference."""

    norm: Norm
    own_batch: bool = False
    reference: tuple[Pair, _Statistics] | None = None
    seen: _Statistics = field(default_factory=_Statistics)

    @property
    def name(self) -> str:
        """The name of the batch norm."""
        return self.norm.name

    @property
    def buffers(self) -> Pair:
        """The running mean and variance."""
        return self.norm.mean, self.norm.variance

    def keep(self) -> None:
        """Copy the statistics into the model, if a copy of the model was run."""
        if self.norm.keep is not None:
            self.norm.keep()

    def see(self, x: Tensor) -> None:
        """Add an input; in the first pass, set the statistics so that this input is normalised by its own."""
        # This runs before the batch norm normalises x, so that the layers after it see the statistics set here.
        alone = self.seen.add(x)
        if self.own_batch:
            self.set(alone, len(self.seen.parts) - 1)

    def set(self, found: Pair, part: int | None = None) -> None:
        """Set the running statistics to ``found``, or correct them by the change since the reference or its part."""
        if self.reference is not None:
            before, known = self.reference
            found = _corrected(before, (known.mean, known.variance) if part is None else known.parts[part], found)
        for buffer, value in zip(self.buffers, found, strict=True):
            buffer.copy_(value)


@dataclass(eq=False)
class _Distance(_WatchedNorm):
    """One batch norm, and the differentiable distance of each input from its running statistics."""

    distances: list[Tensor] = field(default_factory=list)

    def see(self, x: Tensor) -> None:
        """Add the squared distances of mean and deviation, relative to the running variance."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        running, scale = self.norm.mean.float(), self.norm.variance.float() + 1e-5
        # ((m - m0)^2 + (s - s0)^2) / s0^2 for each channel, averaged: 0 if mean m and deviation s are as expected.
        variance, mean = torch.var_mean(x.float(), axes, correction=0)
        off = (mean - running).square() + ((variance + 1e-8).sqrt() - scale.sqrt()).square()
        self.distances.append((off / scale).mean())


class NormDistances:
    """How far the inputs of a model's batch norms are from the running statistics, in runs of ``observed``."""

    def __init__(self, observed: Observed) -> None:
        self._norms = _watched(observed, _Distance)

    def __bool__(self) -> bool:
        """Return whether the model has any batch norm."""
        return bool(self._norms)

    def take(self) -> Tensor | None:
        """Return the mean distance over the runs since the last call, or None without any, and start again."""
        found = [distance for norm in self._norms for distance in norm.distances]
        for norm in self._norms:
            norm.distances = []
        return torch.stack(found).mean() if found else None


def _watched(observed: Observed, make: Callable[[Norm], _AnyNorm]) -> list[_AnyNorm]:
    """Return the batch norms of a model, each of them watched from now on."""
    found = [make(norm) for norm in observed.norms()]
    for each in found:
        each.norm.watch(each.see)
    return found
