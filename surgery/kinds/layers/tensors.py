"""Tensors of layers: which ones refuse, how they are identified and counted, and torch's layouts of weights.

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

from surgery.algebra import Geometry, Layout, Operator, PaddingMode
from surgery.errors import Refusal

__all__ = ["conv_geometry", "count", "key_of", "memory", "refuse_tensor", "stored_weight"]


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


def stored_weight(operator: Operator, stored: Layout) -> Tensor:
    """Return an operator's weight in the layout in which a graph stores it."""
    return operator.weight.t().contiguous() if stored == "in_out" else operator.weight


def conv_geometry(
    kernel_size: tuple[int, ...],
    *,
    stride: Any,
    padding: Any,
    dilation: Any,
    output_padding: Any,
    transposed: bool,
    padding_mode: PaddingMode = "zeros",
) -> Geometry | Refusal:
    """Return the geometry for torch's arguments (numbers, sequences, 'same', 'valid'), or why there is none."""
    dims = len(kernel_size)
    spread = [_spread(value, dims) for value in (stride, dilation, output_padding)]
    if any(value is None for value in spread):
        return Refusal("its stride, dilation or output padding is computed by the graph")
    strides, dilations, output_paddings = (value or () for value in spread)
    if isinstance(padding, str):
        spans = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilations, kernel_size, strict=True)]
        pads = tuple((span // 2, span - span // 2) for span in spans)
    else:
        sides = _spread(padding, dims)
        if sides is None:
            return Refusal("its padding is computed by the graph")
        pads = tuple((side, side) for side in sides)
    return Geometry(strides, pads, dilations, output_paddings, transposed, padding_mode)


def _spread(value: Any, dims: int) -> tuple[int, ...] | None:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    values = values * dims if len(values) == 1 else values
    return values if len(values) == dims and all(isinstance(v, int) for v in values) else None
