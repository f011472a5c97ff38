"""Collect the moments of all sites of a model in one pass over calibration inputs."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from surgery.data.moments import Accumulator, Moments, layout_bytes
from surgery.data.samples import Calibration
from surgery.data.visible import VisibleRows
from surgery.errors import InputError
from surgery.kinds.observed import Observed
from surgery.kinds.registry import Model, observe
from surgery.sites.placement import Placement

__all__ = ["Progress", "collect", "rows_of"]

Progress = Callable[[str, int, int], None]  # (name of the work, batches or steps done, all of them)
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

    ``sites`` names the sites to collect; by default all of them. Sites that read the same value share their moments.
    Positions that a mask hides do not count. All moments together take at most ``budget_bytes`` where possible: the
    largest are approximated, as the module ``moments`` says, until they fit. A column of n values gets about 2 n rows,
    and at least 4096 if there are so many, at random positions that ``seed`` decides. ``also_watch`` may watch more of
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
    return {
        placement.site.name: moments
        for group, accumulator in zip(shared, accumulators, strict=True)
        for moments in [_finish(accumulator, group[0])]
        for placement in group
        if sites is None or placement.site.name in sites
    }


def _run(observed: Observed, batches: Calibration, progress: Progress | None) -> None:
    for done, batch in enumerate(batches):
        if progress is not None:
            progress("calibrate", done, len(batches))
        observed.run(batch)
    if progress is not None:
        progress("calibrate", len(batches), len(batches))


def _finish(accumulator: Accumulator, placement: Placement) -> Moments:
    try:
        return accumulator.moments()
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
    made = []
    for placement in placements:
        own = seed + zlib.crc32(placement.site.name.encode())
        made.append(Accumulator(placement.site.operator, limit=limit, rows=rows_of(placement, batches), seed=own))
    return made


def rows_of(placement: Placement, batches: int) -> int:
    """Return how many columns to use of each input, so that all batches and calls together give enough."""
    wanted = max(_LEAST_ROWS, _ROWS * placement.site.operator.kernel[0, 0].numel())
    return -(-wanted // (batches * placement.site.runs))


def _total(placements: Sequence[Placement], limit: int) -> int:
    return sum(layout_bytes(placement.site.operator, limit) for placement in placements)
