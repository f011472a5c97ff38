"""What is visible of the values in a run over samples with masks: rows of what sites read, and of a model's outputs.

Rows may have samples in front, or positions: torch's attention flattens (T, N, d) to (T*N, d), and a shape does not
tell it from (N*T, d). So the order of a site's rows is seen from two runs of one batch, the samples in turn the second
time: the rows of each sample go where it goes. A site whose rows have neither order counts them all.

An output (N, T) may as well be T features of N samples. So where the shape alone does not tell, other inputs are put
where they are hidden: such an output has hidden positions if it changes there, and not all over.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.algebra.operators import Operator
from surgery.data.masks import read_masks
from surgery.data.samples import Calibration
from surgery.kinds.inputs import Inputs
from surgery.kinds.observed import Observed
from surgery.sites.placement import Placement

__all__ = ["Masks", "SeeRows", "VisibleOutputs", "VisibleRows"]

Masks = Sequence[Tensor]  # (N, T) of bool each, True where visible
SeeRows = Callable[[Tensor, Masks], None]
_CLOSE = 1e-5


class VisibleRows:
    """The masks that apply to what each site reads.

    ``observed`` is run on a batch if samples have masks, before anything watches it.
    """

    def __init__(self, observed: Observed, samples: Calibration, spots: Iterable[Placement]) -> None:
        self._samples = samples
        self._orders = _orders(observed, samples, list(spots)) if samples.masks else {}
        self._batch: Inputs | None = None
        self._masks: Masks = ()

    def watch(self, observed: Observed, spot: Placement, see: SeeRows) -> None:
        """Show ``see`` what a site reads, with the masks of the batch; of this model, or of one made from it."""

        def show(x: Tensor) -> None:
            see(x, self.now(observed, spot))

        for call in spot.calls:
            observed.watch(call, show)

    def now(self, observed: Observed, spot: Placement) -> Masks:
        """Return the masks that apply to a site's rows in the batch that runs; none where all are visible.

        They are (T, N) for rows with positions in front.
        """
        orders = self._orders.get(spot.site.name, ())
        if orders and self._batch is not observed.batch:
            self._batch, self._masks = observed.batch, self._samples.visible(observed.batch)
        return [mask if order == 0 else mask.T for order in orders for mask in self._masks]


def _orders(observed: Observed, samples: Calibration, spots: Sequence[Placement]) -> dict[str, tuple[int, ...]]:
    """Return the axis of the samples, 0 or 1, in the rows of each site, for those that have them at one of these."""
    batch = next(iter(samples))
    masks = read_masks(samples.masks, pytree.tree_leaves(batch))
    if len(masks[0]) == 1:
        return {spot.site.name: (0, 1) for spot in spots}  # the shape tells
    seen: list[dict[str, list[tuple[Tensor, Tensor]]]] = []
    for spot in spots:

        def see(x: Tensor, operator: Operator = spot.site.operator, name: str = spot.site.name) -> None:
            front = _by_sample(operator, x, masks)
            behind = x.new_empty(0) if operator.spatial_dims else _by_sample(operator, x, [m.T for m in masks])
            seen[-1][name].append((front, behind))

        for call in spot.calls:
            observed.watch(call, see)
    for inputs in (batch, _turned(batch, samples.sampled)):
        seen.append(defaultdict(list))
        observed.run(inputs)
    observed.forget()
    found: dict[str, tuple[int, ...]] = {}
    for name, before in seen[0].items():
        fits = (axis for axis in (0, 1) if _follow(before, seen[1][name], axis))
        if (axis := next(fits, None)) is not None:
            found[name] = (axis,)
    return found


def _turned(batch: Inputs, sampled: Sequence[bool]) -> Inputs:
    """Return a batch with the last sample in front."""
    leaves, structure = pytree.tree_flatten(batch)
    rows = zip(leaves, sampled, strict=True)
    args, kwargs = pytree.tree_unflatten([leaf.roll(1, 0) if many else leaf for leaf, many in rows], structure)
    return tuple(args), dict(kwargs)


def _by_sample(operator: Operator, x: Tensor, masks: Masks) -> Tensor:
    """Return one number of each row of a value, (N, ...) if it has the rows of a mask, (T, N, ...) of one (T, N).

    Else an empty tensor.
    """
    axis = None if operator.reads_indices else 1 if operator.spatial_dims else -1
    wide = x.detach() if axis is None or x.dim() < 3 else x.detach().movedim(axis, -1)
    shape = wide.shape if axis is None else wide.shape[:-1]
    along_time = bool(operator.spatial_dims) and x.dim() == 3
    for mask in masks:
        in_front = shape[:2] == mask.shape or (along_time and len(x) == len(mask))
        if in_front or shape == (mask.numel(),):
            rows = wide.double() if axis is None else wide if x.dtype == torch.float64 else wide.float()
            if axis is not None:
                rows = rows @ torch.arange(1, rows.shape[-1] + 1, dtype=rows.dtype, device=rows.device).sin()
            return rows if in_front else rows.view(mask.shape)
    return x.new_empty(0)


def _follow(first: Sequence[tuple[Tensor, ...]], second: Sequence[tuple[Tensor, ...]], axis: int) -> bool:
    """Whether the rows of samples at an axis are where the samples are, at each call that has rows for positions."""
    if len(first) != len(second):
        return False
    pairs = [(a[axis], b[axis]) for a, b in zip(first, second, strict=True) if a[axis].numel() or b[axis].numel()]
    for before, after in pairs:
        if before.shape != after.shape:
            return False
        off = float(torch.linalg.vector_norm(after - before.roll(1, axis)))
        moved = float(torch.linalg.vector_norm(after - before))
        if not off <= 0.01 * moved + _CLOSE * float(torch.linalg.vector_norm(before)):
            return False
    return bool(pairs)


class VisibleOutputs:
    """What is visible of a model's outputs; ``run`` returns those of a batch, always in the same order.

    It is run once or twice more where samples have masks and a shape does not tell what it is.
    """

    def __init__(self, run: Callable[[Inputs], Sequence[Tensor]], samples: Calibration) -> None:
        self._samples = samples
        self._whole: set[int] = set()  # outputs that have the shape of positions, and none
        batch = next((batch for batch in samples if samples.visible(batch)), None)
        if batch is None:
            return
        before = run(batch)
        doubtful = [at for at, leaf in enumerate(before) if self._doubtful(leaf, samples.visible(batch))]
        if doubtful:
            other, moved = _elsewhere(batch, samples)
            after = run(other)
            for at in doubtful:
                mask = _mask_of(samples.visible(batch), before[at])
                assert mask is not None  # it would not be in doubt
                if not _changes_where_hidden(before[at], after[at], mask, moved):
                    self._whole.add(at)

    def of(self, batch: Inputs, leaves: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """Return what is visible of each output of a batch, (N, T, 1, ...) of bool to be broadcast, or None for all."""
        masks = self._samples.visible(batch)
        for at, leaf in enumerate(leaves):
            mask = None if at in self._whole else _mask_of(masks, leaf)
            yield None if mask is None else mask.reshape(*mask.shape, *(1 for _ in leaf.shape[2:]))

    @staticmethod
    def _doubtful(leaf: Tensor, masks: Masks) -> bool:
        mask = _mask_of(masks, leaf)
        if mask is None:
            return False
        count, length = mask.shape
        return leaf.dim() == 2 or count == length or length in leaf.shape[2:]


def _mask_of(masks: Masks, leaf: Tensor) -> Tensor | None:
    return next((mask for mask in masks if leaf.shape[:2] == mask.shape), None)


def _elsewhere(batch: Inputs, samples: Calibration) -> tuple[Inputs, dict[torch.Size, Tensor]]:
    """Return a batch with values of visible positions where others are hidden, and where these differ, by (N, T)."""
    leaves, structure = pytree.tree_flatten(batch)
    masks = samples.visible(batch)
    moved = {mask.shape: torch.zeros_like(mask) for mask in masks}
    places = {mask.place for mask in samples.masks}
    for at, leaf in enumerate(leaves):
        mask = _mask_of(masks, leaf) if isinstance(leaf, Tensor) and at not in places else None
        if mask is None or not bool(mask.any()):
            continue
        shown = leaf[mask]
        count = int((~mask).sum())
        changed = leaf.clone()
        changed[~mask] = shown.flip(0).repeat(math.ceil(count / len(shown)), *(1 for _ in shown.shape[1:]))[:count]
        moved[mask.shape] |= (changed != leaf).reshape(*mask.shape, -1).any(-1)
        leaves[at] = changed
    args, kwargs = pytree.tree_unflatten(leaves, structure)
    return (tuple(args), dict(kwargs)), moved


def _changes_where_hidden(before: Tensor, after: Tensor, mask: Tensor, moved: dict[torch.Size, Tensor]) -> bool:
    """Whether an output changes where hidden inputs did and not all over, or is one number wherever it is hidden."""
    before, after = (leaf.detach().double() for leaf in (before, after))
    hidden = before[~mask]
    if len(hidden) > 1 and bool((hidden == hidden[:1]).all()):
        return True
    scale = float(before[mask].nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if bool(mask.any()) else 0.0
    same = torch.isclose(after, before, rtol=0.0, atol=_CLOSE * scale, equal_nan=True)
    changed = ~same.reshape(*mask.shape, -1).all(-1)
    partly = (mask.any(1) & ~mask.all(1)).unsqueeze(1)
    inside, outside = changed[moved[mask.shape] & partly], changed[mask & partly]
    if not len(inside) or not len(outside):
        return False
    return float(inside.double().mean()) >= 0.95 and float(inside.double().mean()) > float(outside.double().mean())
