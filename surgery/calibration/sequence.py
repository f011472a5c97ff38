"""Fit sites one after another: each to give what it gave in the original from what the factored network feeds it.

Where the sites before it have been factored, a site reads x' in the place of x. Of all operators on x' the one whose
output is nearest to W x is the regression (Zhang et al. 2015, arXiv 1505.06798, fit their layers so)

    W* = W E[x x'^T] E[x' x'^T]^-1,        E |W x - W' x'|^2  =  tr((W* - W') E[x' x'^T] (W* - W')^T) + what no W' can

so that a chain is fitted to W* under the moments of x', and takes back what of the errors before it can be told from
x'. Where the mean is taken up behind the operator, by a bias or a normalisation, moments are central ones, and the bias
is b* = b + W m - W* m'. A ridge pulls W* towards W. So does a share that is found by cross-validation: few columns make
a regression that holds for them alone, and how much of it holds in one half of the batches when it is found in the
other is measured.

The columns of the original are read once; those of the changed network at the same positions.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.calibration.batch_norm import Reference, reestimate_batch_norm
from surgery.calibration.collect import rows_of
from surgery.calibration.columns import read_columns
from surgery.calibration.factor import RIDGE
from surgery.calibration.inputs import Calibration
from surgery.calibration.moments import Moments
from surgery.calibration.observe import Observed, observe
from surgery.calibration.visible import Masks, VisibleRows
from surgery.graphs import Model, Spot
from surgery.operators import Operator
from surgery.solvers.weighted import Metric, triangles

__all__ = ["Originals", "Target"]


@dataclass(frozen=True, eq=False)
class Target:
    """What to fit a chain to: an operator, for inputs of these moments."""

    operator: Operator
    moments: Moments


class Originals:
    """The columns that some sites of a model read, in a run over all samples: as many as moments take, in memory."""

    def __init__(self, model: Model, samples: Calibration, sites: Mapping[str, Moments]) -> None:
        self._samples, self._moments = samples, sites
        observed = observe(model, next(iter(samples)))
        spots = _spots(observed, sites)
        self._visible = VisibleRows(observed, samples, spots)
        self._columns: dict[str, _Columns] = {}
        for spot in spots:
            self._columns[spot.site.name] = columns = _Columns(spot, len(samples))
            self._visible.watch(observed, spot, columns.keep)
        for batch in samples:
            observed.run(batch)

    def targets(
        self, changed: Model, sites: Collection[str], norms: Reference, centred: Collection[str]
    ) -> dict[str, Target]:
        """Return the targets of some sites in a changed model, whose batch norms are corrected on the way, in place.

        ``norms`` is what reached the batch norms of the original. ``centred`` are the sites whose mean is taken up.
        """
        pairs: dict[str, _Pairs] = {}

        def watch(observed: Observed) -> None:
            for spot in _spots(observed, sites):
                if spot.site.name in self._columns:
                    pairs[spot.site.name] = pair = _Pairs(self._columns[spot.site.name], len(spot.calls))
                    self._visible.watch(observed, spot, pair.add)

        reestimate_batch_norm(changed, self._samples, reference=norms, beside=watch)
        return {
            name: pair.target(self._moments[name].sensitivity, centred=name in centred) for name, pair in pairs.items()
        }


def _spots(observed: Observed, sites: Collection[str]) -> list[Spot]:
    return [spot for spot in observed.kind.find().spots if spot.site.name in sites]


class _Columns:
    """The columns of one operator at random positions, the same in each run."""

    def __init__(self, spot: Spot, batches: int) -> None:
        self.operator = spot.site.operator
        self._rows = rows_of(spot, batches)
        self._seed = zlib.crc32(spot.site.name.encode())
        self._generator = self.generator()
        self.blocks: list[Tensor] = []

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed)

    def read(self, x: Tensor, masks: Masks, generator: torch.Generator) -> list[Tensor]:
        return list(read_columns(self.operator, x, rows=self._rows, generator=generator, masks=masks))

    def keep(self, x: Tensor, masks: Masks) -> None:
        self.blocks += self.read(x, masks, self._generator)


class _Pairs:
    """Sums over the columns x of the original and x' of a changed model, in float64, in two halves of the batches."""

    def __init__(self, columns: _Columns, calls: int) -> None:
        self._columns, self._generator, self._calls = columns, columns.generator(), calls
        self._left = iter(columns.blocks)
        groups, _, *rest = columns.operator.kernel.shape
        n = torch.Size(rest).numel()
        self._taps, self._seen = torch.Size(rest[1:]).numel(), 0
        self._counts = [0, 0]
        self._means = columns.operator.weight.new_zeros(2, 2, groups, n, dtype=torch.float64)  # halves, x and x'
        self._crossed, self._second = self._means.new_zeros(2, 2, groups, n, n)  # sums of x x'^T, x' x'^T; halves

    def add(self, x: Tensor, masks: Masks) -> None:
        half = self._seen // self._calls % 2
        self._seen += 1
        for block in self._columns.read(x, masks, self._generator):
            then, now = next(self._left).double(), block.double()  # a mean may be far above the deviation from it
            self._counts[half] += now.shape[1]
            self._means[half] += torch.stack([then.sum(1), now.sum(1)])
            self._crossed[half] += then.mT @ now
            self._second[half] += now.mT @ now

    def target(self, sensitivity: Tensor | None, *, centred: bool) -> Target:
        """Return W* with b*, and the moments of x'."""
        operator, count = self._columns.operator, sum(self._counts)
        before, now = (self._means.sum(0) / count).unsqueeze(-1)
        second = self._second.sum(0) / count
        moments = Moments(count, now.squeeze(-1), Metric((second,), self._taps), sensitivity)
        halves = [self._sums(half, before, now, centred=centred) for half in (0, 1) if self._counts[half]]
        kernel = operator.kernel.detach().double().flatten(2)
        found = kernel + _regression(kernel, halves)
        moved = operator.with_kernel(found.view_as(operator.kernel).to(operator.weight.dtype))
        if operator.bias is not None:
            shift = (kernel @ before - found @ now).flatten()
            moved = moved.with_bias((operator.bias.detach().double() + shift).to(operator.weight.dtype))
        return Target(moved, moments)

    def _sums(self, half: int, before: Tensor, now: Tensor, *, centred: bool) -> tuple[Tensor, Tensor, int]:
        """Return the sums of (x - x') x'^T and of x' x'^T in a half, and the number of columns."""
        second, crossed, count = self._second[half], self._crossed[half], self._counts[half]
        if centred:  # around the means of both halves: (x - m)(x' - m')^T, and so on
            then, here = self._means[half].unsqueeze(-1)
            second = second - here @ now.mT - now @ here.mT + count * now @ now.mT
            crossed = crossed - then @ now.mT - before @ here.mT + count * before @ now.mT
        return crossed - second, second, count


def _regression(kernel: Tensor, halves: Sequence[tuple[Tensor, Tensor, int]]) -> Tensor:
    """Return by how much W moves: the regression of W (x - x') on x', as much of it as holds in the other half.

    With V from one half and the sums of the other the share s lowers E |W (x - x') - s V x'|^2 the most at
    ``s = <W D, V> / <V C, V>``; for one half alone the share N / (n + N) of N columns has to do.
    """
    lags, seconds, counts = zip(*halves, strict=True)
    total, columns = sum(counts), kernel.shape[-1]
    whole = _solve(kernel, sum(lags), sum(seconds))
    if len(halves) < 2:
        return whole * total / (total + columns)
    explained = energy = kernel.new_zeros(())
    for one, other in ((0, 1), (1, 0)):
        moved = _solve(kernel, lags[one], seconds[one])
        explained = explained + (kernel @ lags[other] * moved).sum()
        energy = energy + (moved @ seconds[other] * moved).sum()
    share = (explained / energy.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
    return whole * share


def _solve(kernel: Tensor, lag: Tensor, second: Tensor) -> Tensor:
    """Return ``W D (C + ridge)^-1``, where C may be nothing but what rounding left of a covariance."""
    _, inverse = triangles(second, RIDGE)
    return kernel @ lag @ inverse.mT @ inverse
