"""Unpack all modules below a root whose weights only a kernel reads, and pack again those that stayed whole."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import InputError, Refusal
from surgery.kinds.layers import attention, recurrent_forms
from surgery.kinds.layers.attention import UnpackedAttention
from surgery.kinds.layers.modules import replace_module
from surgery.kinds.layers.recurrent import UnpackedRecurrent

__all__ = [
    "PackedLayers",
    "has_packed",
    "is_packed",
    "pack_all",
    "packed_parameter",
    "part_weights",
    "refuse_inplace",
    "unpack_all",
]

_Packed = nn.MultiheadAttention | nn.RNNBase
_Unpacked = UnpackedAttention | UnpackedRecurrent
PackedLayers = dict[int, _Packed]


def has_packed(root: nn.Module) -> bool:
    """Whether a module below the root can be unpacked or packed."""
    return any(isinstance(module, _Packed | _Unpacked) for module in root.modules())


def refuse_inplace(model: nn.Module) -> str | None:
    """Return why a module cannot be changed in place, or None; a model that is itself unpacked has to be replaced."""
    if isinstance(model, _Packed | _Unpacked):
        return f"a model that consists only of {type(model).__name__} cannot be changed in place"
    return None


def is_packed(name: str) -> bool:
    """Whether a parameter is the packed projections of torch's attention, which has this name for them alone.

    >>> is_packed("block.attention.in_proj_weight"), is_packed("my_in_proj_weight")
    (True, False)
    """
    return name.rpartition(".")[2] == "in_proj_weight"


def part_weights(packed: str) -> list[str]:
    """Return the names of the weights that a packed projection comes apart into.

    >>> part_weights("attention.in_proj_weight")[0]
    'attention.in_proj_q.weight'
    """
    prefix, dot, _ = packed.rpartition(".")
    return [f"{prefix}{dot}{part}.weight" for part in attention.PROJECTIONS]


def packed_parameter(site: str) -> tuple[str, int, int] | None:
    """Return the packed parameter that has a site's weight, which part of it the weight is, and how many there are.

    For the names of other sites, return None.

    >>> packed_parameter("block.attention.in_proj_k"), packed_parameter("lstm.hh_l0"), packed_parameter("head")
    (('block.attention.in_proj_weight', 1, 3), ('lstm.weight_hh_l0', 0, 1), None)
    """
    prefix, dot, last = site.rpartition(".")
    if last in attention.PROJECTIONS:
        return f"{prefix}{dot}in_proj_weight", attention.PROJECTIONS.index(last), len(attention.PROJECTIONS)
    return (f"{prefix}{dot}weight_{last}", 0, 1) if recurrent_forms.is_part(last) else None


def unpack_all(root: nn.Module) -> PackedLayers:
    """Unpack all modules below a root, in place; return the originals by the id of the module in their place.

    Attention whose packed weight is tied to that of another attention is left alone: unpacking would untie them.
    """
    originals: PackedLayers = {}
    # a module under two paths is one user, two modules with one weight are two
    users = Counter(id(m._parameters.get("in_proj_weight")) for m in root.modules() if _is_packed(m))
    made: dict[int, _Unpacked | Refusal] = {}
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if not path or not _is_packed(module):
            continue
        weight = module._parameters.get("in_proj_weight")
        if weight is None or users[id(weight)] < 2:
            # a module under several paths is unpacked once
            if id(module) not in made:
                made[id(module)] = _unpack(module)
            new = made[id(module)]
            if not isinstance(new, Refusal):
                originals[id(new)] = module
                replace_module(root, path, new)
    return originals


def pack_all(root: nn.Module, originals: PackedLayers) -> None:
    """Pack all modules below a root whose parts are whole, in place; an unchanged module becomes its original again.

    ``originals`` is what ``unpack_all`` returned for the same root.
    """
    packed: dict[int, _Packed] = {}
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if not path or not isinstance(module, _Unpacked):
            continue
        if id(module) not in packed:
            found = _packed(module, originals.get(id(module)))
            if found is None:
                continue
            packed[id(module)] = found
        replace_module(root, path, packed[id(module)])


def _is_packed(module: nn.Module) -> bool:
    return isinstance(module, _Packed) and not isinstance(module, _Unpacked)


def _unpack(module: Any) -> _Unpacked | Refusal:
    return attention.unpack(module) if isinstance(module, nn.MultiheadAttention) else recurrent_forms.unpack(module)


def _packed(module: _Unpacked, original: _Packed | None) -> _Packed | None:
    new: _Packed
    try:
        new = attention.repack(module) if isinstance(module, UnpackedAttention) else recurrent_forms.repack(module)
    except InputError:  # a part is factored
        return None
    # the original object is what the user's own references hold
    return original if original is not None and _same(module, original, new) else new


def _same(module: _Unpacked, original: _Packed, new: _Packed) -> bool:
    """Whether a module that is packed again holds the same numbers and shares the same parameters as the original."""
    if isinstance(module, UnpackedAttention):
        if module.out_proj is not original.out_proj:
            return False
        old = original.state_dict()
        return all(_equal(old[name], tensor) for name, tensor in new.state_dict().items())
    return all(new._parameters[name] is parameter for name, parameter in original._parameters.items())


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same numbers, or no numbers."""
    return first.is_meta or torch.equal(first, second)
