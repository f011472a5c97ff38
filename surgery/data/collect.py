"""What one pass over calibration inputs says of all sites: moments of inputs, and sensitivities.

For the model's output f and a random direction v, the gradient g of <v, f> with respect to a site's output y says how
far an error dy moves f: |df|^2 = E_v <v, df>^2 = E <g, dy>^2 to first order. Assume that g is independent of dy, and of
g at other positions (as K-FAC does: Martens and Grosse 2015, arXiv 1503.05671). Then |df|^2 = tr(G E[dy dy^T]) for

    G = E[sum g g^T]    (groups, O, O), the sum over the positions of a run, the mean over runs

f is taken relative to its norm, so that tr(G E) is the squared relative error of the output; for several outputs it is
the mean of their squared errors. With N gradients of O channels, G is mixed with the identity of the same trace, which
gets the share O / (O + N): a direction that few gradients have not shown may still matter (Ledoit and Wolf 2004 shrink
so).

A model without gradients, as some ONNX files, gets noise at one site after another in place of that (``_by_noise``).
There is one backward pass for each batch. Positions that a mask hides count neither in outputs nor at sites.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.algebra import Operator, relative_error
from surgery.data.masks import visible_rows
from surgery.data.moments import Accumulator, Moments, layout_bytes
from surgery.data.samples import Calibration
from surgery.data.sums import Computed, SquareSum
from surgery.data.visible import Masks, VisibleOutputs, VisibleRows
from surgery.errors import InputError
from surgery.kinds.inputs import Inputs
from surgery.kinds.observed import Observed
from surgery.kinds.registry import Model, observe
from surgery.sites import Placement
from surgery.system.progress import Progress
from surgery.system.spill import Spill
from surgery.text import first_line

__all__ = ["collect", "rows_of", "with_sensitivity"]

_NOISY, _DRAWS = 16, 4  # samples at most, and draws for each batch, if noise has to do
_SAMPLES, _BATCH = 512, 8  # samples at most, in batches of at most this size


def with_sensitivity(
    model: Model,
    batches: Calibration,
    moments: Mapping[str, Moments],
    *,
    samples: int = _SAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Mapping[str, Moments]:
    """Return the moments with the sensitivity of each site, from at most ``samples`` samples in small batches.

    The moments of a site that no gradient reaches have no sensitivity. ``seed`` decides the random directions.
    ``progress`` is called with ("differentiate", batches done, all batches).

    Raises:
        InputError: the model has no output to differentiate, or cannot be differentiated.
    """
    observed = observe(model, next(iter(batches)))
    few = _small(batches, samples)
    placements = [placement for placement in observed.find().placements if placement.site.name in moments]
    visible = VisibleRows(observed, few, placements)
    outputs = VisibleOutputs(lambda batch: _leaves(observed.run(batch)), few)
    if not observed.differentiable:
        return _by_noise(observed, placements, few, outputs, moments, seed=seed, progress=progress)
    spill = Spill()
    found = {placement.site.name: _tapped(observed, placement, visible, spill) for placement in placements}
    generator = torch.Generator().manual_seed(seed)
    for done, batch in enumerate(few):
        if progress is not None:
            progress("differentiate", done, len(few))
        leaves = _leaves(observed.run(batch, gradients=True))
        if not observed.differentiable:  # this batch came to a node that ends gradients
            observed.forget()
            return _by_noise(observed, placements, few, outputs, moments, seed=seed, progress=progress)
        _backward(leaves, list(outputs.of(batch, leaves)), generator)
    seen = {name: partial(gram.mean, len(few)) for name, gram in found.items() if gram.count}
    return _weighed(moments, {name: seen.get(name, _none) for name in moments})


def _weighed(
    moments: Mapping[str, Moments], sensitivities: Mapping[str, Callable[[], Tensor | None]]
) -> Computed[Moments]:
    """Return the moments with these sensitivities; those of other sites are as they were."""

    def make(name: str) -> Moments:
        found = moments[name]
        return replace(found, sensitivity=sensitivities[name]()) if name in sensitivities else found

    return Computed({name: partial(make, name) for name in moments})


def _none() -> None:
    return None


_NOISE = 0.01  # of an output's root mean square, which moves the model's outputs in proportion


def _by_noise(
    observed: Observed,
    placements: Sequence[Placement],
    batches: Calibration,
    outputs: VisibleOutputs,
    moments: Mapping[str, Moments],
    *,
    seed: int,
    progress: Progress | None,
) -> Mapping[str, Moments]:
    """Return the moments with sensitivities that are the same for all outputs of a site, without gradients.

    Noise of the variance s^2 is added to all outputs of one site at a time. Then |df|^2 = s^2 tr(G), to first order,
    and G is taken to be a multiple of the identity, of which the diagonal says all.
    """
    batches = batches.take(slice(min(_NOISY, batches.count)))
    noisy: str | None = None
    scales: dict[str, float] = {}
    generator = torch.Generator().manual_seed(seed)

    def tap(name: str, y: Tensor) -> Tensor:
        if noisy is None:
            scales[name] = max(scales.get(name, 0.0), float(y.float().square().mean().sqrt()))
            return y
        noise = torch.randn(y.shape, generator=generator) * (_NOISE * scales[name])
        return y + noise.to(y) if name == noisy else y

    for placement in placements:
        for call in placement.calls:
            observed.tap(call, partial(tap, placement.site.name))
    clean = [_visible_leaves(observed, outputs, batch) for batch in batches]
    found: dict[str, Callable[[], Tensor]] = {}
    for done, placement in enumerate(placements):
        name, operator = placement.site.name, placement.site.operator
        if progress is not None:
            progress("differentiate", done, len(placements))
        noisy = name
        pairs = [pair for pair in zip(batches, clean, strict=True) for _ in range(_DRAWS)]
        moved = [_moved(_visible_leaves(observed, outputs, batch), was) for batch, was in pairs]
        variance = (_NOISE * scales.get(name, 0.0)) ** 2
        if variance:
            groups, out = operator.kernel.shape[:2]
            # tr(G) = |df|^2 / s^2, spread evenly over all outputs.
            level = sum(moved) / len(moved) / variance / (groups * out)
            found[name] = partial(torch.full, (groups, out), level, dtype=torch.float64)
    return _weighed(moments, found)


def _visible_leaves(observed: Observed, outputs: VisibleOutputs, batch: Inputs) -> list[Tensor]:
    leaves = _leaves(observed.run(batch))
    masks = outputs.of(batch, leaves)
    return [leaf if mask is None else leaf.masked_fill(~mask, 0.0) for leaf, mask in zip(leaves, masks, strict=True)]


def _moved(leaves: Sequence[Tensor], before: Sequence[Tensor]) -> float:
    """Return the mean over outputs of the squared relative change."""
    changes = [relative_error(leaf, was) ** 2 for leaf, was in zip(leaves, before, strict=True)]
    return sum(changes) / max(1, len(changes))


def _small(batches: Calibration, samples: int) -> Calibration:
    if batches.exact:
        whole = max(1, samples // batches.batch_size) * batches.batch_size
        return batches.take(slice(min(whole, batches.count)))
    few = batches.take(slice(min(samples, batches.count)))
    return replace(few, batch_size=min(_BATCH, few.batch_size))


def _leaves(output: object) -> list[Tensor]:
    leaves = pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _backward(leaves: Sequence[Tensor], visible: Sequence[Tensor | None], generator: torch.Generator) -> None:
    # The scalar <v, f> of the module docstring: each output is divided by its norm, and all by the square root of their
    # number k, so that the expected square of its change is the mean of k squared relative errors.
    total: Tensor | None = None
    share = max(1, len(leaves)) ** -0.5
    for leaf, mask in zip(leaves, visible, strict=True):
        # Drawn even if unused: the directions of later outputs must not depend on which sites are chosen.
        direction = torch.randn(leaf.shape, generator=generator, dtype=torch.float32, device="cpu").to(leaf)
        if leaf.requires_grad:
            shown = leaf if mask is None else leaf.masked_fill(~mask, 0.0)
            scale = torch.linalg.vector_norm(shown.detach().float()).clamp(min=1e-12)
            part = (shown * direction).sum() * (share / scale.to(leaf.dtype))
            total = part if total is None else total + part
    if total is None:
        raise InputError("no gradient leads from an output of the model to its operators")
    try:
        total.backward()
    except RuntimeError as error:
        raise InputError(f"the model cannot be differentiated: {first_line(error)}") from error


def _tapped(observed: Observed, placement: Placement, visible: VisibleRows, spill: Spill) -> _Gram:
    """Return the sums over gradients at a site's calls in later runs."""
    gram = _Gram(placement.site.operator, spill)
    for call in placement.calls:
        observed.tap(call, lambda y: gram.tap(y, visible.now(observed, placement)))
    return gram


class _Gram:
    """The sum of g g^T over the visible positions of a site's outputs."""

    def __init__(self, operator: Operator, spill: Spill) -> None:
        self.count = 0
        self._groups, self._out = operator.kernel.shape[:2]
        self._axis = -1 - operator.spatial_dims
        self._sum = SquareSum(self._groups, self._out, spill, operator.weight.device)

    def mean(self, runs: int) -> Tensor:
        """Return G, mixed with the identity."""
        # The mean of the diagonal is the level at which the identity has the same trace.
        # Example: 256 gradients of 256 channels count for one half, and the identity for the other.
        share = self._out / (self._out + self.count)
        mean = self._sum.over(runs)
        diagonal = mean.diagonal(dim1=-2, dim2=-1)
        level = diagonal.mean(-1, keepdim=True)
        mean *= 1 - share
        diagonal += share * level
        return mean

    def tap(self, y: Tensor, masks: Masks) -> Tensor:
        """Return a copy of the output whose gradient is added to the sum in the backward pass."""
        # A new leaf starts the graph at the first site; its clone, unlike a leaf, may be changed in place later.
        own = y.detach().requires_grad_().clone() if not y.requires_grad else y.clone()
        own.register_hook(lambda gradient: self._add(gradient, masks))
        return own

    def _add(self, gradient: Tensor, masks: Masks) -> None:
        # (.., O, *size) -> (.., *size, O) -> (rows, g, O) -> (g, rows, O)
        rows = gradient.detach().movedim(self._axis, -1)
        visible = visible_rows(masks, rows.shape[:-1]) if self._axis >= -2 else None
        rows = rows.reshape(-1, self._groups, self._out)
        rows = (rows if visible is None else rows[visible]).transpose(0, 1)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        self._sum.add(rows)
        self.count += rows.shape[1]


_LIMITS = (4608, 2304, 1152, 576, 288, 144, 72, 36, 18)  # of n: up to which the second moment is one matrix
_ROWS, _LEAST_ROWS = 2, 4096  # columns used for each of the n values, and at least in all


def collect(
    model: Model,
    batches: Calibration,
    *,
    sites: Collection[str] | None = None,
    budget_bytes: int = 2**31,
    seed: int = 0,
    progress: Progress | None = None,
    also_watch: Callable[[Observed], None] | None = None,
) -> Mapping[str, Moments]:
    """Return the moments of each site's inputs by site name, from one run over all batches in evaluation mode.

    ``sites`` names the sites to collect; by default all of them. Sites that read the same value share their sums.
    Positions that a mask hides do not count. All sums together take at most ``budget_bytes`` where possible: the
    largest are approximated, as the module ``moments`` says, until they fit. Large sums stand in a file, and a site's
    moments are made of them each time that they are asked for. A column of n values gets about 2 n rows, and at least
    4096 if there are so many, at random positions that ``seed`` decides. ``also_watch`` may watch more of
    the model in the same run. ``progress`` is called with ("calibrate", batches done, all batches).

    Raises:
        InputError: the model does not take the inputs, or activations are not finite.
        CaptureError: the graph of an nn.Module can be neither traced nor exported.
    """
    observed = observe(model, next(iter(batches)))
    found = observed.find().placements
    groups = _shared(found)  # of all sites: the columns read of a value must not depend on ``sites``
    shared = [group for group in groups if sites is None or any(placement.site.name in sites for placement in group)]
    accumulators = _accumulators([group[0] for group in shared], len(batches), budget_bytes, seed)
    visible = VisibleRows(observed, batches, [group[0] for group in shared])
    for group, accumulator in zip(shared, accumulators, strict=True):
        visible.watch(observed, group[0], accumulator.add)
    if also_watch is not None:
        also_watch(observed)
    _run(observed, batches, progress)
    for group, accumulator in zip(shared, accumulators, strict=True):
        _finish(accumulator, group[0])
    return Computed(
        {
            placement.site.name: accumulator.moments
            for group, accumulator in zip(shared, accumulators, strict=True)
            for placement in group
            if sites is None or placement.site.name in sites
        }
    )


def _run(observed: Observed, batches: Calibration, progress: Progress | None) -> None:
    for done, batch in enumerate(batches):
        if progress is not None:
            progress("calibrate", done, len(batches))
        observed.run(batch)
    if progress is not None:
        progress("calibrate", len(batches), len(batches))


def _finish(accumulator: Accumulator, placement: Placement) -> None:
    """Raise InputError if there are no moments of what was added."""
    try:
        accumulator.check()
    except InputError as error:
        raise InputError(f"site {placement.site.name!r}: {error.what}", next_step=error.next_step) from None


def _shared(placements: Sequence[Placement]) -> list[list[Placement]]:
    """Return the sites in groups; the sites of a group read the same columns of the same values."""
    groups: dict[tuple[Any, ...], list[Placement]] = defaultdict(list)
    for placement in placements:
        sources = tuple(call.source for call in placement.calls)
        groups[(sources, placement.site.operator.form.reading)].append(placement)
    return list(groups.values())


def _accumulators(placements: Sequence[Placement], batches: int, budget_bytes: int, seed: int) -> list[Accumulator]:
    # One limit serves all sites, so that the largest moments are approximated first.
    limit = next((n for n in _LIMITS if _total(placements, n) <= budget_bytes), _LIMITS[-1])
    made, spill = [], Spill()
    for placement in placements:
        # By the site's name, so that the positions that are read of a site do not depend on which others are collected.
        own = seed + zlib.crc32(placement.site.name.encode())
        rows = rows_of(placement, batches)
        made.append(Accumulator(placement.site.operator, limit=limit, rows=rows, seed=own, spill=spill))
    return made


def rows_of(placement: Placement, batches: int) -> int:
    """Return how many columns to use of each input, so that all batches and calls together give enough."""
    # Example of 64 channels and 3x3 taps, n = 576: 4096 columns are wanted, 256 from each of 16 batches with one call.
    wanted = max(_LEAST_ROWS, _ROWS * placement.site.operator.kernel[0, 0].numel())
    return -(-wanted // (batches * placement.site.runs))


def _total(placements: Sequence[Placement], limit: int) -> int:
    return sum(layout_bytes(placement.site.operator, limit) for placement in placements)
