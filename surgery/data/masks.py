"""Masks: inputs that say which positions of sequences are padding, and the rows of a value at those positions.

A mask is an input (N, T) of zeros and ones, or of whole numbers of which all but 0 count as 1. Its name has "mask" in
it, and another input has the shape (N, T, ...). A 0 hides the position, as in "attention_mask"; in torch's
"key_padding_mask" a 1 hides it. Inputs of other conventions are not masks here: masks of heads, of special tokens or of
positions to predict, and "padding_mask", which is in use with either meaning.

A mask applies to values with rows (N, T, ...) or (N*T, ...), and its transpose to values with rows (T, N, ...) or
(T*N, ...). ``surgery.data.visible`` finds out which of these orders, if any, the rows of a value have.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.kinds.inputs import Inputs

__all__ = ["Mask", "find_masks", "hides_with_ones", "is_mask_name", "leaf_names", "read_masks", "visible_rows"]

_HIDES_WITH_ONES = "key_padding_mask"
_OTHER = ("head_mask", "token_type", "global", "special", "masked", "pad", "mask_time", "mask_feature", "loss")


@dataclass(frozen=True)
class Mask:
    """The index of a mask among the flat inputs; if ``inverted``, its ones hide positions instead of its zeros."""

    place: int
    inverted: bool = False


def hides_with_ones(name: str) -> bool:
    """Return whether a mask of this name follows torch's convention for padding: True hides a position."""
    return _HIDES_WITH_ONES in name


def is_mask_name(name: str) -> bool:
    """Return whether an input of this name is a mask of positions.

    >>> [is_mask_name(name) for name in ("attention_mask", "src_key_padding_mask", "head_mask", "bool_masked_pos")]
    [True, True, False, False]
    """
    name = name.lower()
    return "mask" in name and (hides_with_ones(name) or not any(word in name for word in _OTHER))


def leaf_names(names: Sequence[str], inputs: Inputs) -> list[str]:
    """Return a name for each flat input: the innermost key it is nested under, else its argument's from ``names``."""
    found = []
    for (_, *path), _ in pytree.tree_flatten_with_path(inputs)[0]:
        by_name = [str(key.key) for key in path if isinstance(key, pytree.MappingKey)]
        top = path[0]
        place = top.idx if isinstance(top, pytree.SequenceKey) else len(names)
        found.append(by_name[-1] if by_name else names[place] if place < len(names) else "")
    return found


def find_masks(names: Sequence[str], leaves: Sequence[Any]) -> tuple[Mask, ...]:
    """Return the masks among flat inputs; none if they hide nothing. Leaves that hold no samples are None."""
    places = [at for at, (name, leaf) in enumerate(zip(names, leaves, strict=True)) if _is_mask(name, leaf)]
    masked = [leaf.shape[:2] for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and at not in places]
    masks = [Mask(at, hides_with_ones(names[at].lower())) for at in places if leaves[at].shape in masked]
    return tuple(masks) if any(not bool(mask.all()) for mask in read_masks(masks, leaves)) else ()


def _is_mask(name: str, leaf: Any) -> bool:
    if not isinstance(leaf, Tensor) or leaf.dim() != 2 or leaf.is_complex() or not is_mask_name(name):
        return False
    if leaf.is_floating_point():  # a float mask that is 0 everywhere is added to attention scores, and hides nothing
        return bool(((leaf == 0) | (leaf == 1)).all()) and bool(leaf.any())
    return not bool((leaf < 0).any())


def read_masks(masks: Iterable[Mask], leaves: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return the visible positions, (N, T) of bool, one tensor for each length T.

    If two masks have the same length, nothing tells which one applies to a value: what either shows is visible.
    """
    # Masks are keyed by their shape (N, T): encoder and decoder masks of different lengths stay apart.
    found: dict[tuple[int, ...], Tensor] = {}
    for mask in masks:
        leaf = leaves[mask.place]
        shown = leaf == 0 if mask.inverted else leaf != 0
        shape = tuple(shown.shape)
        found[shape] = found[shape] | shown if shape in found else shown
    return tuple(found.values())


def visible_rows(masks: Sequence[Tensor], positions: Sequence[int]) -> Tensor | None:
    """Return which rows of a value are visible, as a flat bool tensor, or None where no mask applies.

    ``positions`` is the shape of the rows: (N, T, ...) or (N*T,). If N or T is also the length of a later axis, it
    is not known which axes the mask means, and it does not apply.
    """
    positions = tuple(positions)
    for mask in masks:
        if positions[:2] == tuple(mask.shape) and not set(mask.shape) & set(positions[2:]):
            # Example: a mask (N, T) of rows (N, T, heads) counts for all heads of a position.
            return mask.reshape(*mask.shape, *(1 for _ in positions[2:])).expand(positions).flatten()
        if positions == (mask.numel(),):
            return mask.flatten()
    return None
