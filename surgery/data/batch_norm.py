"""Re-estimate batch-norm statistics: what a factored network feeds its normalisations is no longer what they expect.

Each running mean and variance is set from the activations that reach it, in passes over all calibration batches. In the
first pass every normalisation uses the statistics of the batch at hand, as in training, so that all of them see inputs
normalised already; with a single batch this gives exactly what one step in training mode at momentum 1 gives. Later
passes normalise with what the one before has found, as inference does.

With a reference, the moments of what reached the normalisations of the original network in the same batches, only the
difference to it is corrected: mean' = mean + (m - m_ref), variance' = variance * v / v_ref. What calibration data and
training data differ in, and the chance of few samples, is the same in both and cancels; a network that was not changed
stays exactly as it is. Each normalisation is corrected by the batch at hand before that goes on, so that one pass does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from surgery.data.collect import Progress
from surgery.data.samples import Calibration
from surgery.kinds.observed import Norm, Observed
from surgery.kinds.registry import Model, observe
from surgery.sites.epilogue import BatchNorm
from surgery.sites.flow import Flow, Other
from surgery.sites.placement import Placement

__all__ = ["NormDistances", "NormWatch", "Reference", "feeds_batch_norm", "reestimate_batch_norm"]

Pair = tuple[Tensor, Tensor]
Reference = Mapping[str, "_Statistics"]
_AnyNorm = TypeVar("_AnyNorm", bound="_Norm")


class NormWatch:
    """Mean and variance of what reaches each batch norm of a model, from the runs of whatever else observes it."""

    def __init__(self) -> None:
        self._norms: list[_Norm] = []

    def __call__(self, observed: Observed) -> None:
        """Watch the batch norms of the model when it is run."""
        self._norms = _watched(observed, _Norm)

    @property
    def reference(self) -> Reference:
        """The moments of all that was seen, by the name of the batch norm."""
        return {norm.name: norm.seen for norm in self._norms}


def reestimate_batch_norm(
    model: Model,
    batches: Calibration,
    *,
    reference: Reference | None = None,
    passes: int | None = None,
    progress: Progress | None = None,
    beside: Callable[[Observed], None] | None = None,
) -> tuple[str, ...]:
    """Set the running statistics of all batch norms of a model, in place, and return the names of those.

    ``reference`` is that of the original on the same inputs, as ``NormWatch`` has it. Of a program the tensors of its
    state dict are set; nothing else changes in any graph kind. There is one of the ``passes`` with a reference, and two
    without, if no number is given. ``progress`` gets ("correct", batches done, of all), in each pass. ``beside`` may
    watch more of the model, which is then run whether it has batch norms or not.

    Raises:
        InputError: as ``collect``.
    """
    observed = observe(model, next(iter(batches)))
    norms = _watched(observed, _Norm)
    if reference is not None:
        for norm in norms:
            mean, variance = norm.buffers
            norm.reference = (mean.clone(), variance.clone()), reference[norm.name]
    passes = passes or (2 if reference is None else 1)
    if beside is not None:
        beside(observed)
    for number in range(passes if norms or beside is not None else 0):
        for norm in norms:
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
    """Return the running mean and variance, moved by what has changed since the reference."""
    tiny = torch.finfo(torch.float64).tiny
    ratio = (now[1] / reference[1].clamp(min=tiny)).nan_to_num(nan=1.0, posinf=1.0)
    return before[0].double() + now[0] - reference[0], before[1].double() * torch.where(reference[1] > 0, ratio, 1.0)


def feeds_batch_norm(flow: Flow, placement: Placement) -> bool:
    """Whether batch norms, and nothing else, read what a site puts out, so that they take up its mean."""
    users = [flow.at[user] for call in placement.calls for user in flow.users[call.value]]
    return bool(users) and all(isinstance(user, Other) and isinstance(user.epilogue, BatchNorm) for user in users)


class _Statistics:
    """Mean and variance of each channel, summed in float64; ``parts`` are those of each call."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, torch.tensor(0.0, device="cpu"), torch.tensor(0.0, device="cpu")
        self.parts: list[Pair] = []

    def add(self, x: Tensor) -> Pair:
        """Add a batch, and return its own mean and variance."""
        wide = x.detach() if x.dtype == torch.float64 else x.detach().float()
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
        return (self._squares - self._sum * self.mean).clamp(min=0) / max(1, self._count - 1)


@dataclass(eq=False)
class _Norm:
    """One batch norm: its buffers, what has reached it, and what was in them and reached it in the original."""

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
        """Copy the statistics into the model, where a copy of it was run."""
        for target, value in zip(self.norm.kept or (), self.buffers, strict=False):
            target.copy_(value)

    def see(self, x: Tensor) -> None:
        """Add an input, and in a first pass normalise it by itself."""
        alone = self.seen.add(x)
        if self.own_batch:
            self.set(alone, len(self.seen.parts) - 1)

    def set(self, found: Pair, part: int | None = None) -> None:
        """Take these as running statistics; with a reference what has changed since, in all or in one of its parts."""
        if self.reference is not None:
            before, known = self.reference
            found = _corrected(before, (known.mean, known.variance) if part is None else known.parts[part], found)
        for buffer, value in zip(self.buffers, found, strict=True):
            buffer.copy_(value)


@dataclass(eq=False)
class _Distance(_Norm):
    """One batch norm, and how far each input is from what it expects, as numbers that can be differentiated."""

    distances: list[Tensor] = field(default_factory=list)

    def see(self, x: Tensor) -> None:
        """Add the squared distances of mean and deviation, in deviations."""
        axes = [axis for axis in range(x.dim()) if axis != 1]
        running, scale = self.norm.mean.float(), self.norm.variance.float() + 1e-5
        variance, mean = torch.var_mean(x.float(), axes, correction=0)
        off = (mean - running).square() + ((variance + 1e-8).sqrt() - scale.sqrt()).square()
        self.distances.append((off / scale).mean())


class NormDistances:
    """How far the batch norms of a model are from their running statistics in each run that is observed."""

    def __init__(self, observed: Observed) -> None:
        self._norms = _watched(observed, _Distance)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._norms)

    def take(self) -> Tensor | None:
        """Return the mean distance in the runs since the last call, and forget them."""
        found = [distance for norm in self._norms for distance in norm.distances]
        for norm in self._norms:
            norm.distances = []
        return torch.stack(found).mean() if found else None


def _watched(observed: Observed, make: Callable[[Norm], _AnyNorm]) -> list[_AnyNorm]:
    """Return the batch norms of a model, each watched already."""
    found = [make(norm) for norm in observed.norms()]
    for each in found:
        each.norm.watch(each.see)
    return found
