"""Which tensors cannot be computed with exactly, and why; and how tensors are identified and counted.

Weights may be complex, quantized, sparse, on the meta device, without a shape, or of a class with its own rules.
Nothing here computes with a tensor or changes one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy

__all__ = ["count", "key_of", "memory", "refuse_tensor"]


def refuse_tensor(tensor: Tensor, what: str = "weight") -> str | None:
    """Return why a tensor cannot be computed with exactly, and what to do; None if it can.

    ``what`` is the word for the tensor in the reason. Fake tensors pass, because shapes are computed with them.

    >>> refuse_tensor(torch.zeros(2, 2, dtype=torch.complex64))
    'its weight is complex64; complex numbers are not handled'
    >>> refuse_tensor(torch.zeros(2, 2)) is None
    True
    """
    reason = _refuse_form(tensor) or _refuse_dtype(tensor.dtype)
    return None if reason is None else f"its {what} {reason}"


def _refuse_form(tensor: Tensor) -> str | None:
    if is_lazy(tensor):
        return "has no shape yet; run the model once, so that its lazy layers get theirs"
    if _has_own_rules(tensor) and not isinstance(tensor, FakeTensor):
        return f"is a {type(tensor).__name__}, not a plain tensor; change the model before it is quantized or sharded"
    if not _is_dense(tensor):
        layout = "nested" if tensor.is_nested else _word(tensor.layout)
        return f"has the layout {layout}; make it a dense tensor first (to_dense)"
    if tensor.device.type == "meta":
        return "is on the meta device, without numbers; load the model's weights first"
    return None


def _refuse_dtype(dtype: torch.dtype) -> str | None:
    if dtype.is_complex:
        return f"is {_word(dtype)}; complex numbers are not handled"
    if not dtype.is_floating_point:
        return f"is {_word(dtype)}, not floating point; change the model before it is quantized"
    # float8 and the like
    if dtype.itemsize < 2:
        return f"is {_word(dtype)}, too coarse to compute with; change the model before it is quantized"
    return None


def _has_own_rules(tensor: Tensor) -> bool:
    """Whether the class of a tensor overrides torch's functions or operators; other subclasses are plain."""
    kind = type(tensor)
    if kind in (Tensor, nn.Parameter):
        return False
    functions = (Tensor.__torch_function__, nn.Parameter.__torch_function__)
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ or not any(
        _plain(kind.__torch_function__) is _plain(function) for function in functions
    )


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _plain(function: object) -> object:
    """Return the function of a bound class method."""
    return getattr(function, "__func__", function)


def _word(value: object) -> str:
    return str(value).removeprefix("torch.").removeprefix("_")


def memory(tensor: Tensor) -> int:
    """Return the address of the memory that a tensor is a view of; 0 if it has none that is known."""
    plain = not is_lazy(tensor) and not _has_own_rules(tensor) and _is_dense(tensor)
    return tensor.untyped_storage().data_ptr() if plain and tensor.device.type != "meta" else 0


def count(tensors: nn.Module | Iterable[Tensor]) -> int:
    """Return the number of entries of tensors, or of a module's parameters; tensors without a shape count as 0."""
    given = tensors.parameters() if isinstance(tensors, nn.Module) else tensors
    return sum(0 if is_lazy(tensor) else tensor.numel() for tensor in given)


def key_of(tensor: Tensor) -> tuple[Any, ...]:
    """Return a key that two tensors share exactly if they are the same view of the same memory."""
    # fake and meta tensors have no memory; each of these is its own parameter
    pointer = memory(tensor)
    if pointer == 0:
        return ("object", id(tensor))
    return (pointer, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
