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

Progress = Callable[[str, int, int], None]
_LIMITS = (4608, 2304, 1152, 576, 288, 144, 72, 36, 18)  # columns
_ROWS, _LEAST_ROWS = 2, 4096


def collect(
    model: Model,
    batches: Calibration,
    *,
    sites: Collection[str] | None = None,
    budget_bytes: int = 2**31,
    seed: int = 0,
    progress: Progress | None = None,
    beside: Callable[[Observed], None] | None = None,
) -> Mapping[str, Moments]:
    """Return the moments of what each site reads, by site name, from one run over all batches in evaluation mode.

    Sites on the same value share theirs. Positions that a mask hides do not count. ``sites`` narrows it down.
    ``budget_bytes`` bounds what all moments take together: the largest are approximated as ``Moments`` says until they
    fit. For n columns about 2 n rows are used, and at least 4096 if there are so many, at random positions that
    ``seed`` decides. ``beside`` may watch more of the model in the same run.

    Raises:
        InputError: inputs that the model does not take, or activations that are not finite.
        CaptureError: the graph of an nn.Module can be neither traced nor exported.
    """
    observed = observe(model, next(iter(batches)))
    found = observed.find().placements
    groups = _shared(found)  # of all sites: what is read of a value must not depend on which of them are wanted
    shared = [group for group in groups if sites is None or any(spot.site.name in sites for spot in group)]
    accumulators = _accumulators([group[0] for group in shared], len(batches), budget_bytes, seed)
    visible = VisibleRows(observed, batches, [group[0] for group in shared])
    for group, accumulator in zip(shared, accumulators, strict=True):
        visible.watch(observed, group[0], accumulator.add)
    if beside is not None:
        beside(observed)
    _run(observed, batches, progress)
    return {
        spot.site.name: moments
        for group, accumulator in zip(shared, accumulators, strict=True)
        for moments in [_finish(accumulator, group[0])]
        for spot in group
        if sites is None or spot.site.name in sites
    }


def _run(observed: Observed, batches: Calibration, progress: Progress | None) -> None:
    for done, batch in enumerate(batches):
        if progress is not None:
            progress("calibrate", done, len(batches))
        observed.run(batch)
    if progress is not None:
        progress("calibrate", len(batches), len(batches))


def _finish(accumulator: Accumulator, spot: Placement) -> Moments:
    try:
        return accumulator.moments()
    except InputError as error:
        raise InputError(f"{spot.site.name}: {error.what}", next_step=error.next_step) from None


def _shared(spots: Sequence[Placement]) -> list[list[Placement]]:
    """Group the sites that read the same columns of the same values."""
    groups: dict[tuple[Any, ...], list[Placement]] = defaultdict(list)
    for spot in spots:
        sources = tuple(call.source for call in spot.calls)
        groups[(sources, spot.site.operator.form.reading)].append(spot)
    return list(groups.values())


def _accumulators(spots: Sequence[Placement], batches: int, budget_bytes: int, seed: int) -> list[Accumulator]:
    limit = next((n for n in _LIMITS if _total(spots, n) <= budget_bytes), _LIMITS[-1])
    made = []
    for spot in spots:
        own = seed + zlib.crc32(spot.site.name.encode())
        made.append(Accumulator(spot.site.operator, limit=limit, rows=rows_of(spot, batches), seed=own))
    return made


def rows_of(spot: Placement, batches: int) -> int:
    """Return how many columns of each input are used: enough for moments, of all batches and runs together."""
    wanted = max(_LEAST_ROWS, _ROWS * spot.site.operator.kernel[0, 0].numel())
    return -(-wanted // (batches * spot.site.runs))


def _total(spots: Sequence[Placement], limit: int) -> int:
    return sum(layout_bytes(spot.site.operator, limit) for spot in spots)
