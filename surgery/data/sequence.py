"""Fit sites one after another: each site is fitted to the original's outputs on the inputs of the factored network.

Once earlier sites are factored, a site reads x' instead of x. If a tensor is added to its output, such as the other
branch of a residual connection, that tensor is r' instead of r. The operator on x' whose sum comes nearest to the
original's is the regression (Zhang et al. 2015, arXiv 1505.06798, fit their layers so, without the branch)

    W* = W + E[l x'^T] E[x' x'^T]^-1,        l = (W x + r) - (W x' + r')

    E |W x + r - (W' x' + r')|^2  =  tr((W* - W') E[x' x'^T] (W* - W')^T) + a rest that does not depend on W'

l is the lag of the changed network behind the original. A chain is fitted to W* under the moments of x', and so
corrects the part of earlier errors that x' explains. If a bias or a normalisation absorbs the mean of the output,
moments are central, and the bias is b* = b + E[l] - (W* - W) m'. Two things pull W* towards W, because a regression on
few columns overfits them: a ridge, and a factor between 0 and 1 from cross-validation. The factor measures how much of
the regression on one half of the batches holds on the other half.

There is an r only if nothing reads the output except its addition to a tensor of the same shape. Among sites that are
fitted together, only the first such site gets an r, and only if r is not the output of another site; otherwise two
sites would correct the same error. The outputs of the original are read once, and those of the changed network at the
same positions. A site that is called on another number of rows in the changed network has no target.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from surgery.algebra import Operator
from surgery.data.batch_norm import Reference, reestimate_batch_norm
from surgery.data.collect import rows_of
from surgery.data.factor import RIDGE
from surgery.data.moments import Moments, output_reader, read_columns
from surgery.data.samples import Calibration
from surgery.data.sums import Computed, SquareSum
from surgery.data.visible import Masks, VisibleRows
from surgery.kinds.observed import Added, Observed
from surgery.kinds.registry import Model, observe
from surgery.sites import Placement
from surgery.solvers.weighted import SecondMoment, root_of
from surgery.system.spill import Spill, Spilled

__all__ = ["Originals", "Target"]

_CAST = 2**20  # numbers that are cast to float64 at once


@dataclass(frozen=True, eq=False)
class Target:
    """What to fit a chain to: the operator W* with bias b*, on inputs x' with these moments."""

    operator: Operator
    moments: Moments


class Originals:
    """The outputs of the original's dense sites over all samples, kept at the positions that moments use.

    A site is dense here if its second moment is one matrix.
    """

    def __init__(self, model: Model, samples: Calibration, moments: Mapping[str, Moments]) -> None:
        self._samples, self._moments = samples, moments
        observed = observe(model, next(iter(samples)))
        placements = _placements(observed, {name for name, found in moments.items() if found.dense})
        self._visible = VisibleRows(observed, samples, placements)
        spill = Spill()
        self._records = {placement.site.name: _SeenSite(placement, len(samples), spill) for placement in placements}
        for placement in placements:
            self._records[placement.site.name].follow(observed, placement, self._visible)
        for batch in samples:
            observed.run(batch)

    def targets(
        self, changed: Model, sites: Collection[str], norms: Reference, centred: Collection[str]
    ) -> Mapping[str, Target]:
        """Return the targets of some sites in a changed model, by site name; each is made when it is asked for.

        The batch norms of the changed model are corrected in place, in the same run; ``norms`` is their reference, from
        the original. ``centred`` names the sites whose mean a bias or a normalisation absorbs.
        """
        records: dict[str, _SeenSite] = {}
        spill = Spill()

        def watch(observed: Observed) -> None:
            for placement in _placements(observed, sites):
                if placement.site.name in self._records:
                    records[placement.site.name] = record = _SeenSite(placement, len(self._samples), spill)
                    self._visible.watch(observed, placement, record.read)
                    record.follow(observed, placement, self._visible)

        reestimate_batch_norm(changed, self._samples, reference=norms, also_watch=watch)
        # A site gets a target if it ran on as many rows as in the original; the first that qualifies also gets r.
        alike = {name: record for name, record in records.items() if record.is_like(self._records[name])}
        summed = (name for name, r in alike.items() if r.summed and self._records[name].summed and not r.adds_site)
        first = next(summed, None)

        def make(name: str) -> Target:
            pairs = _Pairs(self._records[name], alike[name], summed=name == first)
            return pairs.target(lambda: self._moments[name].sensitivity, centred=name in centred)

        return Computed({name: partial(make, name) for name in alike})


def _placements(observed: Observed, sites: Collection[str]) -> list[Placement]:
    return [placement for placement in observed.find().placements if placement.site.name in sites]


class _SeenSite:
    """Inputs and outputs of one site in a run, at random positions that are the same in each run.

    Many of them stand in the file of ``spill``.
    """

    def __init__(self, placement: Placement, batches: int, spill: Spill) -> None:
        self.operator, self.calls = placement.site.operator, len(placement.calls)
        self.columns: list[Spilled] = []  # for each call (groups, rows, n)
        self._spill = spill
        # Both generators start alike, so that outputs are read where inputs are; the seed is that of the site's name.
        self._rows, seed = rows_of(placement, batches), zlib.crc32(placement.site.name.encode())
        self._reads, self._sees = (torch.Generator().manual_seed(seed) for _ in range(2))
        self._outputs: list[Spilled] = []  # for each call (groups, rows, outputs)
        self._added: dict[int, Spilled] = {}  # r of the same shape, by the number of the call
        self._spoiled = False
        self.adds_site = False  # whether r is the output of another site

    def read(self, x: Tensor, masks: Masks) -> None:
        """Keep the columns of one input of the site."""
        blocks = read_columns(self.operator, x, rows=self._rows, generator=self._reads, masks=masks)
        self.columns.append(self._spill.holding(torch.cat(list(blocks), 1)))

    def follow(self, observed: Observed, placement: Placement, visible: VisibleRows) -> None:
        """Keep the site's outputs in later runs, and what is added to them."""

        def see(y: Tensor) -> Added:
            masks = visible.now(observed, placement)
            reader = output_reader(self.operator, y, rows=self._rows, generator=self._sees, masks=masks)
            call = len(self._outputs)
            self._outputs.append(self._spill.holding(reader(y)))

            def add(r: Tensor, is_site: bool) -> None:
                self._added[call] = self._spill.holding(reader(r))
                self.adds_site |= is_site

            return add

        for call in placement.calls:
            observed.follow(call, see, self._spoil)

    def _spoil(self) -> None:
        self._spoiled = True

    @property
    def summed(self) -> bool:
        """Whether nothing but one addition has read each output."""
        return not self._spoiled and len(self._added) == len(self._outputs)

    def is_like(self, other: _SeenSite) -> bool:
        """Whether both records have the same calls with the same numbers of rows; these may depend on the data."""
        return [y.shape for y in self._outputs] == [y.shape for y in other._outputs] and bool(self._outputs)

    def outputs(self, *, summed: bool) -> Iterator[Tensor]:
        """Yield the site's output at each call, plus r if ``summed``."""
        for call, y in enumerate(self._outputs):
            yield y.opened() + self._added[call].opened() if summed else y.opened()


class _Pairs:
    """Sums of columns x' and of their lag l in float64, separately for two halves of the batches."""

    def __init__(self, original: _SeenSite, changed: _SeenSite, *, summed: bool) -> None:
        self._operator = operator = changed.operator
        groups, out, *rest = operator.kernel.shape
        n, self._taps = torch.Size(rest).numel(), torch.Size(rest[1:]).numel()
        self._counts = [0, 0]
        new = operator.weight.new_zeros
        # Sums over the columns of each half: of l, x', l x'^T and x' x'^T.
        self._lag, self._mean = (new(2, groups, size, dtype=torch.float64) for size in (out, n))
        crossed, spill = new(2, groups, out, n, dtype=torch.float64), Spill()
        self._second = [SquareSum(groups, n, spill, self._mean.device) for _ in range(2)]
        columns = (x.opened() for x in changed.columns)
        calls = zip(columns, original.outputs(summed=summed), changed.outputs(summed=summed), strict=True)
        for number, (x, before, after) in enumerate(calls):
            # Calls of one batch stay together, since their errors go together. Example of 2 calls: 0 and 1 are in half
            # 0, 2 and 3 in half 1, 4 and 5 in half 0 again.
            half = number // changed.calls % 2
            self._counts[half] += x.shape[1]
            for rows in _in_parts(x.shape[1], n):
                # float64: a mean may far exceed the deviation
                now, lag = x[:, rows].double(), before[:, rows].double() - after[:, rows].double()
                self._lag[half] += lag.sum(1)
                self._mean[half] += now.sum(1)
                crossed[half].baddbmm_(lag.mT, now)
                self._second[half].add(now)
        self._crossed = [spill.holding(sums) for sums in crossed]

    def target(self, sensitivity: Callable[[], Tensor | None], *, centred: bool) -> Target:
        """Return W* and b*, with the moments of x'; the sensitivity is made last, since it may be large."""
        operator, count = self._operator, sum(self._counts)
        lag, mean = (sums.sum(0).unsqueeze(-1) / count for sums in (self._lag, self._mean))
        moved = self._regression(lag, mean, centred=centred)
        kernel = operator.kernel.detach().double().flatten(2) + moved
        target = operator.with_kernel(kernel.view_as(operator.kernel).to(operator.weight.dtype))
        if operator.bias is not None:
            shift = (lag - moved @ mean).flatten()
            target = target.with_bias((operator.bias.detach().double() + shift).to(operator.weight.dtype))
        made = sensitivity()
        second = self._second_of([0, 1], mean, centred=False)
        second /= count
        return Target(target, Moments(count, mean.squeeze(-1), SecondMoment((second,), self._taps), made))

    def _centre(self, halves: Sequence[int], mean: Tensor) -> tuple[Tensor, Tensor]:
        """Return (groups, n, 2) A and B with ``sum (x' - m')(x' - m')^T = sum x' x'^T - A B^T`` over some halves."""
        # C - h m'^T - m' (h - N m')^T for the sum h of N columns, where m' is the mean of both halves together.
        count, here = self._count(halves), self._mean[list(halves)].sum(0).unsqueeze(-1)
        return torch.cat([here, mean], -1), torch.cat([mean, here - count * mean], -1)

    def _count(self, halves: Sequence[int]) -> int:
        return sum(self._counts[half] for half in halves)

    def _crossed_of(self, halves: Sequence[int], lag: Tensor, mean: Tensor, *, centred: bool) -> Tensor:
        """Return the sum of l x'^T over some halves, in a new tensor."""
        first, *others = halves
        crossed = self._crossed[first].opened().clone()
        for half in others:
            crossed += self._crossed[half].opened()
        if centred:
            # The sum of (l - E l)(x' - m')^T, expanded, with the means E l and m' of both halves together.
            then, here = (sums[list(halves)].sum(0).unsqueeze(-1) for sums in (self._lag, self._mean))
            left = torch.cat([self._count(halves) * lag - then, lag], -1)
            crossed.baddbmm_(left, torch.cat([mean, -here], -1).mT)
        return crossed

    def _second_of(self, halves: Sequence[int], mean: Tensor, *, centred: bool) -> Tensor:
        """Return the sum of x' x'^T over some halves, in a new tensor."""
        first, *others = halves
        second = self._second[first].over(1)
        for half in others:
            self._second[half].add_to(second)
        if centred:
            left, right = self._centre(halves, mean)
            second.baddbmm_(left, right.mT, alpha=-1)
        return second

    def _energy(self, moved: Tensor, half: int, mean: Tensor, *, centred: bool) -> Tensor:
        """Return ``<V C, V>`` for V and the sum C of x' x'^T over a half, which is read block by block."""
        energy = moved.new_zeros(())
        for groups, rows, block in self._second[half].blocks():
            energy += ((moved[groups] @ block.mT) * moved[groups, :, rows]).sum()
        if centred:
            left, right = self._centre([half], mean)
            energy -= ((moved @ left) * (moved @ right)).sum()
        return energy

    def _regression(self, lag: Tensor, mean: Tensor, *, centred: bool) -> Tensor:
        """Return W* - W: the regression of l on x', times the factor that holds on the other half.

        For V from one half and the sums of the other, ``s = <l x'^T, V> / <V C, V>`` is the factor that minimises
        E |l - s V x'|^2. With one half alone, the factor is N / (n + N) for N columns of n values.
        """
        halves, total, columns = [half for half in (0, 1) if self._counts[half]], sum(self._counts), mean.shape[-2]
        # Sums are made where they are needed, since they are large.
        crossed_of = partial(self._crossed_of, lag=lag, mean=mean, centred=centred)
        second_of = partial(self._second_of, mean=mean, centred=centred)

        def solved(chosen: Sequence[int]) -> Tensor:
            return _solve(partial(second_of, chosen), partial(crossed_of, chosen))

        whole = solved(halves)
        if len(halves) < 2:
            return whole * total / (total + columns)
        # Each half predicts the other, and the two are pooled into one factor, cut to between 0 and 1.
        explained = energy = whole.new_zeros(())
        for one, other in ((0, 1), (1, 0)):
            moved = solved([one])
            explained = explained + (crossed_of([other]) * moved).sum()
            energy = energy + self._energy(moved, other, mean, centred=centred)
        share = (explained / energy.clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
        return whole * share


def _in_parts(rows: int, width: int) -> Iterator[slice]:
    """Yield slices of so many rows of a width, each with few enough numbers to be cast at once."""
    # Example of 4096 rows of 1152 numbers: the first slice has 910 of them.
    step = max(1, _CAST // width)
    yield from (slice(start, start + step) for start in range(0, rows, step))


def _solve(second: Callable[[], Tensor], crossed: Callable[[], Tensor]) -> Tensor:
    """Return ``E[l x'^T] (C + ridge)^-1``; C may be a covariance of which only rounding errors are left."""
    # C + ridge = R R^T, whose inverse is R^-T R^-1.
    found = root_of(second, RIDGE)
    return found.solve_turned(found.solve(crossed().mT)).mT
