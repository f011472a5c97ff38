"""Which positions masks leave visible in the values of a run: in the inputs of sites, and in the model's outputs.

The rows of a value may be ordered by sample or by position: torch's attention flattens (T, N, d) to (T*N, d), which
has the same shape as (N*T, d). To find the order, a batch is run twice, the second time with samples rotated by one.
The axis along which the rows have rotated is that of the samples. A site that has no such axis counts all its rows.

    T = 2 positions of N = 3 samples     by sample (N*T, d)     by position (T*N, d)
    a, b, c                              a1 a2 b1 b2 c1 c2      a1 b1 c1 a2 b2 c2
    rotated: c, a, b                     c1 c2 a1 a2 b1 b2      c1 a1 b1 c2 a2 b2

An output (N, T) may also be T features of N samples. Where the shape does not decide, the model is run once more with
other inputs at hidden positions: the output has hidden positions if it changes there, and not everywhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.algebra import Operator
from surgery.data.masks import read_masks
from surgery.data.samples import Calibration
from surgery.kinds.inputs import Inputs
from surgery.kinds.observed import Observed
from surgery.sites import Placement

__all__ = ["Masks", "SeeRows", "VisibleOutputs", "VisibleRows"]

Masks = Sequence[Tensor]  # (N, T) of bool each, True where visible
SeeRows = Callable[[Tensor, Masks], None]
_CLOSE = 1e-5


class VisibleRows:
    """The masks that apply to the input rows of each site.

    If the samples have masks, the constructor runs ``observed`` twice, to find the order of each site's rows.
    """

    def __init__(self, observed: Observed, samples: Calibration, placements: Iterable[Placement]) -> None:
        self._samples = samples
        self._orders = _orders(observed, samples, list(placements)) if samples.masks else {}
        self._batch: Inputs | None = None
        self._masks: Masks = ()

    def watch(self, observed: Observed, placement: Placement, see: SeeRows) -> None:
        """Call ``see`` with each input of a site and its masks; ``observed`` is this model, or one made from it."""

        def show(x: Tensor) -> None:
            see(x, self.now(observed, placement))

        for call in placement.calls:
            observed.watch(call, show)

    def now(self, observed: Observed, placement: Placement) -> Masks:
        """Return the masks that apply to a site's rows in the batch that is being run; none where all rows are visible.

        Masks are (N, T) for rows ordered by sample, and (T, N) for rows ordered by position.
        """
        orders = self._orders.get(placement.site.name, ())
        if orders and self._batch is not observed.batch:  # read the masks once for each batch
            self._batch, self._masks = observed.batch, self._samples.visible(observed.batch)
        return [mask if order == 0 else mask.T for order in orders for mask in self._masks]


def _orders(observed: Observed, samples: Calibration, placements: Sequence[Placement]) -> dict[str, tuple[int, ...]]:
    """Return the axis of the samples, 0 or 1, in the rows of each site; a site with neither is left out."""
    batch = next(iter(samples))
    masks = read_masks(samples.masks, pytree.tree_leaves(batch))
    if len(masks[0]) == 1:
        return {placement.site.name: (0, 1) for placement in placements}  # one sample: both orders are the same
    seen: list[dict[str, list[tuple[Tensor, Tensor]]]] = []
    for placement in placements:

        def see(x: Tensor, operator: Operator = placement.site.operator, name: str = placement.site.name) -> None:
            by_sample = _row_numbers(operator, x, masks)
            by_position = x.new_empty(0) if operator.spatial_dims else _row_numbers(operator, x, [m.T for m in masks])
            seen[-1][name].append((by_sample, by_position))

        for call in placement.calls:
            observed.watch(call, see)
    for inputs in (batch, _rotated(batch, samples.sampled)):
        seen.append(defaultdict(list))
        observed.run(inputs)
    observed.forget()
    found: dict[str, tuple[int, ...]] = {}
    for name, before in seen[0].items():
        fits = (axis for axis in (0, 1) if _follow(before, seen[1][name], axis))
        if (axis := next(fits, None)) is not None:
            found[name] = (axis,)
    return found


def _rotated(batch: Inputs, sampled: Sequence[bool]) -> Inputs:
    """Return a batch whose samples are rotated by one: the last comes first."""
    leaves, structure = pytree.tree_flatten(batch)
    rows = zip(leaves, sampled, strict=True)
    args, kwargs = pytree.tree_unflatten([leaf.roll(1, 0) if many else leaf for leaf, many in rows], structure)
    return tuple(args), dict(kwargs)


def _row_numbers(operator: Operator, x: Tensor, masks: Masks) -> Tensor:
    """Return one number that stands for each row of a value, in the shape of the first mask that fits the rows.

    The number is a fixed combination of the row's channels. Returns an empty tensor if no mask fits.
    """
    axis = None if operator.reads_indices else 1 if operator.spatial_dims else -1
    wide = x.detach() if axis is None or x.dim() < 3 else x.detach().movedim(axis, -1)
    shape = wide.shape if axis is None else wide.shape[:-1]
    along_time = bool(operator.spatial_dims) and x.dim() == 3
    for mask in masks:
        leading = shape[:2] == mask.shape or (along_time and len(x) == len(mask))
        if leading or shape == (mask.numel(),):
            rows = wide.double() if axis is None else wide if x.dtype == torch.float64 else wide.float()
            if axis is not None:  # weights without a pattern: different rows give different numbers
                rows = rows @ torch.arange(1, rows.shape[-1] + 1, dtype=rows.dtype, device=rows.device).sin()
            return rows if leading else rows.view(mask.shape)
    return x.new_empty(0)


def _follow(first: Sequence[tuple[Tensor, ...]], second: Sequence[tuple[Tensor, ...]], axis: int) -> bool:
    """Whether the second run's rows are the first run's, rotated along an axis, at each call that has such rows."""
    if len(first) != len(second):
        return False
    pairs = [(a[axis], b[axis]) for a, b in zip(first, second, strict=True) if a[axis].numel() or b[axis].numel()]
    for before, after in pairs:
        if before.shape != after.shape:
            return False
        # The rows rotated with the samples if they are much nearer to the rotated rows than to the unrotated ones.
        off = float(torch.linalg.vector_norm(after - before.roll(1, axis)))
        moved = float(torch.linalg.vector_norm(after - before))
        if not off <= 0.01 * moved + _CLOSE * float(torch.linalg.vector_norm(before)):
            return False
    return bool(pairs)


class VisibleOutputs:
    """Which positions of a model's outputs are visible.

    ``run`` returns the outputs for a batch, always in the same order. The constructor calls it once if samples have
    masks, and once more if the shape of an output does not decide whether its axes are samples and positions.
    """

    def __init__(self, run: Callable[[Inputs], Sequence[Tensor]], samples: Calibration) -> None:
        self._samples = samples
        self._unmasked: set[int] = set()  # outputs that have a mask's shape, but no positions
        batch = next((batch for batch in samples if samples.visible(batch)), None)
        if batch is None:
            return
        before = run(batch)
        doubtful = [at for at, leaf in enumerate(before) if self._is_doubtful(leaf, samples.visible(batch))]
        if doubtful:
            other, moved = _with_other_hidden_values(batch, samples)
            after = run(other)
            for at in doubtful:
                mask = _mask_of(samples.visible(batch), before[at])
                assert mask is not None  # an output without a mask is never doubtful
                if not _changes_where_hidden(before[at], after[at], mask, moved):
                    self._unmasked.add(at)

    def of(self, batch: Inputs, leaves: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """Yield the visible positions of each output of a batch: (N, T, 1, ...) of bool, or None if all are visible."""
        masks = self._samples.visible(batch)
        for at, leaf in enumerate(leaves):
            mask = None if at in self._unmasked else _mask_of(masks, leaf)
            yield None if mask is None else mask.reshape(*mask.shape, *(1 for _ in leaf.shape[2:]))

    @staticmethod
    def _is_doubtful(leaf: Tensor, masks: Masks) -> bool:
        mask = _mask_of(masks, leaf)
        if mask is None:
            return False
        # T may count features if there is no further axis, or if a later axis is as long as T. If N = T, either axis
        # may be that of the samples.
        count, length = mask.shape
        return leaf.dim() == 2 or count == length or length in leaf.shape[2:]


def _mask_of(masks: Masks, leaf: Tensor) -> Tensor | None:
    return next((mask for mask in masks if leaf.shape[:2] == mask.shape), None)


def _with_other_hidden_values(batch: Inputs, samples: Calibration) -> tuple[Inputs, dict[torch.Size, Tensor]]:
    """Return a batch with visible values copied to hidden positions, and where that changed a value, by (N, T)."""
    leaves, structure = pytree.tree_flatten(batch)
    masks = samples.visible(batch)
    moved = {mask.shape: torch.zeros_like(mask) for mask in masks}
    places = {mask.place for mask in samples.masks}
    for at, leaf in enumerate(leaves):
        mask = _mask_of(masks, leaf) if isinstance(leaf, Tensor) and at not in places else None
        if mask is None or not bool(mask.any()):
            continue
        # Hidden positions get visible values, in reverse order and repeated as often as needed: these are inputs of the
        # kind that the model expects.
        shown = leaf[mask]
        count = int((~mask).sum())
        changed = leaf.clone()
        changed[~mask] = shown.flip(0).repeat(math.ceil(count / len(shown)), *(1 for _ in shown.shape[1:]))[:count]
        moved[mask.shape] |= (changed != leaf).reshape(*mask.shape, -1).any(-1)
        leaves[at] = changed
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    return (tuple(args), dict(kwargs)), moved


def _changes_where_hidden(before: Tensor, after: Tensor, mask: Tensor, moved: dict[torch.Size, Tensor]) -> bool:
    """Whether an output is constant at hidden positions, or changes there, where inputs did, more than elsewhere."""
    before, after = (leaf.detach().double() for leaf in (before, after))
    hidden = before[~mask]
    if len(hidden) > 1 and bool((hidden == hidden[:1]).all()):
        return True
    # Within the samples that have both hidden and visible positions, nearly all positions whose hidden inputs changed
    # must change, and a smaller share of the visible ones.
    scale = float(before[mask].nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if bool(mask.any()) else 0.0
    same = torch.isclose(after, before, rtol=0.0, atol=_CLOSE * scale, equal_nan=True)
    changed = ~same.reshape(*mask.shape, -1).all(-1)
    partly = (mask.any(1) & ~mask.all(1)).unsqueeze(1)
    inside, outside = changed[moved[mask.shape] & partly], changed[mask & partly]
    if not len(inside) or not len(outside):
        return False
    return float(inside.double().mean()) >= 0.95 and float(inside.double().mean()) > float(outside.double().mean())
