"""Fit sites one after another: each to give what it gave in the original from what the factored network feeds it.

Where the sites before it have been factored, a site reads x' in the place of x, and what is added to its output, as the
other branch of a residual connection is, is r' in the place of r. Of all operators on x' the one that comes nearest to
the original's sum is the regression (Zhang et al. 2015, arXiv 1505.06798, fit their layers so, without the branch)

    W* = W + E[l x'^T] E[x' x'^T]^-1,        l = (W x + r) - (W x' + r')

    E |W x + r - (W' x' + r')|^2  =  tr((W* - W') E[x' x'^T] (W* - W')^T) + what no W' can

so that a chain is fitted to W* under the moments of x', and takes back what of the errors before it can be told from
x'. Where the mean is taken up behind the operator, by a bias or a normalisation, moments are central ones, and the bias
is b* = b + E[l] - (W* - W) m'. A ridge pulls W* towards W. So does a share that is found by cross-validation: few
columns make a regression that holds for them alone, and how much of it holds in one half of the batches when it is
found in the other is measured.

There is an r where nothing reads the output but its addition to a tensor of the same shape. Of sites that are fitted at
once the first such site alone has one, and only if r is not the output of another: what two sites make up for is made
up for twice. The outputs of the original are read once; those of the changed network at the same positions. A site that
is called on other numbers of rows there has no target.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.algebra.operators import Operator
from surgery.data.batch_norm import Reference, reestimate_batch_norm
from surgery.data.collect import rows_of
from surgery.data.columns import output_reader, read_columns
from surgery.data.factor import RIDGE
from surgery.data.moments import Moments
from surgery.data.samples import Calibration
from surgery.data.visible import Masks, VisibleRows
from surgery.kinds.added import Added
from surgery.kinds.observed import Observed
from surgery.kinds.registry import Model, observe
from surgery.sites.placement import Placement
from surgery.solvers.weighted import Metric, triangles

__all__ = ["Originals", "Target"]


@dataclass(frozen=True, eq=False)
class Target:
    """What to fit a chain to: an operator, for inputs of these moments."""

    operator: Operator
    moments: Moments


class Originals:
    """What some sites of a model put out in a run over all samples, at as many positions as moments take; in memory."""

    def __init__(self, model: Model, samples: Calibration, sites: Mapping[str, Moments]) -> None:
        self._samples, self._moments = samples, sites
        observed = observe(model, next(iter(samples)))
        spots = _spots(observed, sites)
        self._visible = VisibleRows(observed, samples, spots)
        self._records = {spot.site.name: _Record(spot, len(samples)) for spot in spots}
        for spot in spots:
            self._records[spot.site.name].follow(observed, spot, self._visible)
        for batch in samples:
            observed.run(batch)

    def targets(
        self, changed: Model, sites: Collection[str], norms: Reference, centred: Collection[str]
    ) -> dict[str, Target]:
        """Return the targets of some sites in a changed model, whose batch norms are corrected on the way, in place.

        ``norms`` is what reached the batch norms of the original. ``centred`` are the sites whose mean is taken up.
        """
        records: dict[str, _Record] = {}

        def watch(observed: Observed) -> None:
            for spot in _spots(observed, sites):
                if spot.site.name in self._records:
                    records[spot.site.name] = record = _Record(spot, len(self._samples))
                    self._visible.watch(observed, spot, record.read)
                    record.follow(observed, spot, self._visible)

        reestimate_batch_norm(changed, self._samples, reference=norms, beside=watch)
        alike = {name: record for name, record in records.items() if record.is_like(self._records[name])}
        summed = (name for name, r in alike.items() if r.summed and self._records[name].summed and not r.beside)
        first = next(summed, None)
        found: dict[str, Target] = {}
        for name, record in alike.items():
            pairs = _Pairs(self._records[name], record, summed=name == first)
            found[name] = pairs.target(self._moments[name].sensitivity, centred=name in centred)
        return found


def _spots(observed: Observed, sites: Collection[str]) -> list[Placement]:
    return [spot for spot in observed.find().placements if spot.site.name in sites]


class _Record:
    """What one site reads and puts out in a run, at random positions that are the same in each run."""

    def __init__(self, spot: Placement, batches: int) -> None:
        self.operator, self.calls = spot.site.operator, len(spot.calls)
        self.columns: list[Tensor] = []  # of each call (groups, rows, n)
        self._rows, seed = rows_of(spot, batches), zlib.crc32(spot.site.name.encode())
        self._reads, self._sees = (torch.Generator().manual_seed(seed) for _ in range(2))
        self._outputs: list[Tensor] = []  # likewise (groups, rows, outputs)
        self._added: dict[int, Tensor] = {}  # likewise, by the number of the call
        self._spoiled = False
        self.beside = False  # whether what was added is the output of another site

    def read(self, x: Tensor, masks: Masks) -> None:
        """Keep what the site reads."""
        blocks = read_columns(self.operator, x, rows=self._rows, generator=self._reads, masks=masks)
        self.columns.append(torch.cat(list(blocks), 1))

    def follow(self, observed: Observed, spot: Placement, visible: VisibleRows) -> None:
        """Keep what the site puts out in runs from now on, and what is added to it."""

        def see(y: Tensor) -> Added:
            masks = visible.now(observed, spot)
            reader = output_reader(self.operator, y, rows=self._rows, generator=self._sees, masks=masks)
            call = len(self._outputs)
            self._outputs.append(reader(y))

            def add(r: Tensor, beside: bool) -> None:
                self._added[call] = reader(r)
                self.beside |= beside

            return add

        for call in spot.calls:
            observed.follow(call, see, self._spoil)

    def _spoil(self) -> None:
        self._spoiled = True

    @property
    def summed(self) -> bool:
        """Whether all that became of each output is that something was added to it."""
        return not self._spoiled and len(self._added) == len(self._outputs)

    def is_like(self, other: _Record) -> bool:
        """Whether both have the same calls, with as many rows in each; what data decide may differ."""
        return [y.shape for y in self._outputs] == [y.shape for y in other._outputs] and bool(self._outputs)

    def outputs(self, *, summed: bool) -> list[Tensor]:
        """Return what the site put out at each call, with what was added to it if ``summed``."""
        return [y + self._added[call] if summed else y for call, y in enumerate(self._outputs)]


class _Pairs:
    """Sums over columns x' and what is to be made up for there, l, in float64, in two halves of the batches."""

    def __init__(self, original: _Record, changed: _Record, *, summed: bool) -> None:
        self._operator = operator = changed.operator
        groups, out, *rest = operator.kernel.shape
        n, self._taps = torch.Size(rest).numel(), torch.Size(rest[1:]).numel()
        self._counts = [0, 0]
        new = operator.weight.new_zeros
        self._lag, self._mean = (new(2, groups, size, dtype=torch.float64) for size in (out, n))
        self._crossed, self._second = (new(2, groups, size, n, dtype=torch.float64) for size in (out, n))
        calls = zip(changed.columns, original.outputs(summed=summed), changed.outputs(summed=summed), strict=True)
        for number, (x, before, after) in enumerate(calls):
            half = number // changed.calls % 2
            now, lag = x.double(), before.double() - after.double()  # a mean may be far above the deviation from it
            self._counts[half] += now.shape[1]
            self._lag[half] += lag.sum(1)
            self._mean[half] += now.sum(1)
            self._crossed[half] += lag.mT @ now
            self._second[half] += now.mT @ now

    def target(self, sensitivity: Tensor | None, *, centred: bool) -> Target:
        """Return W* with b*, and the moments of x'."""
        operator, count = self._operator, sum(self._counts)
        lag, mean = (sums.sum(0).unsqueeze(-1) / count for sums in (self._lag, self._mean))
        moments = Moments(count, mean.squeeze(-1), Metric((self._second.sum(0) / count,), self._taps), sensitivity)
        halves = [self._sums(half, lag, mean, centred=centred) for half in (0, 1) if self._counts[half]]
        moved = _regression(halves)
        kernel = operator.kernel.detach().double().flatten(2) + moved
        target = operator.with_kernel(kernel.view_as(operator.kernel).to(operator.weight.dtype))
        if operator.bias is not None:
            shift = (lag - moved @ mean).flatten()
            target = target.with_bias((operator.bias.detach().double() + shift).to(operator.weight.dtype))
        return Target(target, moments)

    def _sums(self, half: int, lag: Tensor, mean: Tensor, *, centred: bool) -> tuple[Tensor, Tensor, int]:
        """Return the sums of l x'^T and of x' x'^T in a half, and the number of columns."""
        crossed, second, count = self._crossed[half], self._second[half], self._counts[half]
        if centred:  # around the means of both halves: (l - E l)(x' - m')^T, and so on
            then, here = self._lag[half].unsqueeze(-1), self._mean[half].unsqueeze(-1)
            crossed = crossed - then @ mean.mT - lag @ here.mT + count * lag @ mean.mT
            second = second - here @ mean.mT - mean @ here.mT + count * mean @ mean.mT
        return crossed, second, count


def _regression(halves: Sequence[tuple[Tensor, Tensor, int]]) -> Tensor:
    """Return by how much W moves: the regression of l on x', as much of it as holds in the other half.

    With V from one half and the sums of the other the share s lowers E |l - s V x'|^2 the most at
    ``s = <l x'^T, V> / <V C, V>``; for one half alone the share N / (n + N) of N columns has to do.
    """
    lags, seconds, counts = zip(*halves, strict=True)
    total, columns = sum(counts), seconds[0].shape[-1]
    whole = _solve(sum(lags), sum(seconds))
    if len(halves) < 2:
        return whole * total / (total + columns)
    explained = energy = whole.new_zeros(())
    for one, other in ((0, 1), (1, 0)):
        moved = _solve(lags[one], seconds[one])
        explained = explained + (lags[other] * moved).sum()
        energy = energy + (moved @ seconds[other] * moved).sum()
    share = (explained / energy.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
    return whole * share


def _solve(lag: Tensor, second: Tensor) -> Tensor:
    """Return ``E[l x'^T] (C + ridge)^-1``, where C may be nothing but what rounding left of a covariance."""
    _, inverse = triangles(second, RIDGE)
    return lag @ inverse.mT @ inverse
