"""The weight that a chain of modules stands for, as a read-only tensor that is computed when it is used.

Code around a layer reads its ``weight``: for its dtype, for prototypes, for a penalty. After surgery such code still
reads the right numbers, and gradients reach the factors. Code that writes to the weight, such as an initialisation or
the merge of an adapter, gets an error, because the change would be lost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.errors import InputError

__all__ = ["ComposedWeight"]

_WITHOUT_NUMBERS = frozenset(
    {
        "__hash__",
        "__len__",
        "dim",
        "element_size",
        "is_complex",
        "is_contiguous",
        "is_floating_point",
        "ndimension",
        "nelement",
        "numel",
        "size",
        "stride",
    }
)
_VALUES = frozenset({"T", "H", "mT", "mH", "data", "real", "imag"})  # attributes that are tensors
_WRITES = frozenset({"__set__", "__delete__", "__setitem__", "resize_", "set_", "requires_grad_"})


class ComposedWeight(Tensor):
    """A tensor of a known form whose numbers ``make`` computes at each use; its views are read-only too.

    >>> weight = ComposedWeight(lambda: torch.ones(2, 3), like=torch.empty(2, 3, device="meta"))
    >>> weight.shape, float(weight.sum())
    (torch.Size([2, 3]), 6.0)
    """

    _make: Callable[[], Tensor]
    _is_hf_initialized: bool

    @staticmethod
    def __new__(cls, make: Callable[[], Tensor], *, like: Tensor, device: Any = None) -> ComposedWeight:
        """Return a tensor with the form of ``like`` that stands for what ``make`` computes."""
        made: ComposedWeight = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            strides=like.stride(),
            dtype=like.dtype,
            device=device or like.device,
            requires_grad=like.requires_grad,
        )
        made._make = make
        made._is_hf_initialized = True  # transformers must not initialise it when it loads a model
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ComposedWeight({self._make()!r})"

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with the numbers, and refuse to write to them."""
        return _compute(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with the numbers; only operations that bypass ``__torch_function__`` get here."""
        plain = pytree.tree_map_only(ComposedWeight, lambda value: value._make().detach(), (args, kwargs or {}))
        return func(*plain[0], **plain[1])


class _View(Tensor):
    """The numbers of a composed weight, or a part of them, read-only as well."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute with the numbers, and refuse to write to them."""
        return _compute(func, args, kwargs or {})


def _compute(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the result of a function of composed weights; raise InputError if it would write to one."""
    # Three cases: attributes and methods that need no numbers (dtype, shape, dim) are answered by the empty tensor
    # itself; writes are refused; for all else ``make`` runs, and results that share its memory become read-only views.
    name = getattr(func, "__name__", "")
    attribute = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else ""
    if attribute == "is_leaf":
        return not args[0].requires_grad
    if name in _WITHOUT_NUMBERS or (attribute and attribute not in _VALUES):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    if _writes(name, args, kwargs):
        raise InputError(
            f"{name} would write to a weight that is factored, and the change would be lost",
            next_step="recompose the model first, or change the factors",
        )
    # a weight that is an argument twice becomes one tensor
    made: dict[int, Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, ComposedWeight):
            return made.setdefault(id(value), value._make())
        return made.setdefault(id(value), value.as_subclass(Tensor)) if isinstance(value, _View) else value

    with torch._C.DisableTorchFunctionSubclass():
        given = pytree.tree_map(plain, (args, kwargs))
        if name == "__deepcopy__":
            return given[0][0].detach().clone()
        result = func(*given[0], **given[1])
        memory = {_memory(tensor) for tensor in made.values()}
        return pytree.tree_map_only(Tensor, lambda t: _read_only(t) if _memory(t) in memory else t, result)


def _writes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    inplace = name.endswith("_") and not name.endswith("__")
    # ``__iadd__`` and the like write; of the names that begin so, three do not
    augmented = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    given = args[:1] or tuple(kwargs.values())  # torch.nn.init passes all its arguments by name
    written = pytree.tree_leaves(given) if inplace or augmented or name in _WRITES else []
    written += pytree.tree_leaves(kwargs.get("out"))
    return any(isinstance(value, ComposedWeight | _View) for value in written)


def _memory(tensor: Tensor) -> int:
    return 0 if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()


def _read_only(tensor: Tensor) -> Tensor:
    return tensor if torch.compiler.is_compiling() else tensor.as_subclass(_View)
