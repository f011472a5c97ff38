"""Fit sites one after another: each to give what it gave in the original from what the factored network feeds it.

Where the sites before it have been factored, a site reads x' in the place of x. Of all operators on x' the one whose
output is nearest to W x is the regression (Zhang et al. 2015, arXiv 1505.06798, fit their layers so)

    W* = W E[x x'^T] E[x' x'^T]^-1,        E |W x - W' x'|^2  =  tr((W* - W') E[x' x'^T] (W* - W')^T) + what no W' can

so that a chain is fitted to W* under the moments of x', and takes back what of the errors before it can be told from
x'. Where the mean is taken up behind the operator, by a bias or a normalisation, moments are central ones, and the bias
is b* = b + W m - W* m'. A ridge on both moments pulls W* towards W; and since N columns of n numbers say little where N
is not much larger than n, so does the share n / (n + N).

The columns of the original are read once; those of the changed network at the same positions.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
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
from surgery.graphs import Model, Spot
from surgery.operators import Operator
from surgery.solvers.weighted import Metric

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
        self._columns: dict[str, _Columns] = {}
        for spot in _spots(observed, sites):
            self._columns[spot.site.name] = columns = _Columns(spot, len(samples))
            for call in spot.calls:
                observed.watch(call, columns.keep)
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
                    pairs[spot.site.name] = pair = _Pairs(self._columns[spot.site.name])
                    for call in spot.calls:
                        observed.watch(call, pair.add)

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

    def read(self, x: Tensor, generator: torch.Generator) -> list[Tensor]:
        return list(read_columns(self.operator, x, rows=self._rows, generator=generator))

    def keep(self, x: Tensor) -> None:
        self.blocks += self.read(x, self._generator)


class _Pairs:
    """Sums over the columns x of the original and x' of a changed model, (groups, rows, n) each, in float64."""

    def __init__(self, columns: _Columns) -> None:
        self._columns, self._generator = columns, columns.generator()
        self._left = iter(columns.blocks)
        groups, _, *rest = columns.operator.kernel.shape
        n = torch.Size(rest).numel()
        self._count, self._taps = 0, torch.Size(rest[1:]).numel()
        self._means = columns.operator.weight.new_zeros(2, groups, n, dtype=torch.float64)
        self._crossed, self._second = self._means.new_zeros(2, groups, n, n)

    def add(self, x: Tensor) -> None:
        for block in self._columns.read(x, self._generator):
            then, now = next(self._left).double(), block.double()  # a mean may be far above the deviation from it
            self._count += now.shape[1]
            self._means += torch.stack([then.sum(1), now.sum(1)])
            self._crossed += then.mT @ now
            self._second += now.mT @ now

    def target(self, sensitivity: Tensor | None, *, centred: bool) -> Target:
        """Return W* with b*, and the moments of x'."""
        operator, columns = self._columns.operator, self._means.shape[-1]
        before, now = (self._means / self._count).unsqueeze(-1)
        second, crossed = self._second / self._count, self._crossed / self._count
        moments = Moments(self._count, now.squeeze(-1), Metric((second,), self._taps), sensitivity)
        if centred:
            second, crossed = second - now @ now.mT, crossed - before @ now.mT
        level = second.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(torch.float64).tiny)
        ridge = RIDGE * level[:, None, None] * torch.eye(columns, dtype=torch.float64, device=level.device)
        kernel = operator.kernel.detach().double().flatten(2)
        found = torch.linalg.solve(second + ridge, (crossed + ridge).mT @ kernel.mT).mT
        found = kernel + (found - kernel) * self._count / (self._count + columns)
        moved = operator.with_kernel(found.view_as(operator.kernel).to(operator.weight.dtype))
        if operator.bias is not None:
            shift = (kernel @ before - found @ now).flatten()
            moved = moved.with_bias((operator.bias.detach().double() + shift).to(operator.weight.dtype))
        return Target(moved, moments)
