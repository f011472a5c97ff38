"""A copy of a module with all that ``copy.deepcopy`` leaves behind, or stumbles over."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from surgery.errors import InputError
from surgery.kinds.layers.carried import CARRIED, mark
from surgery.text import first_line

__all__ = ["copy_module"]

_M = TypeVar("_M", bound=nn.Module)


def copy_module(model: _M) -> _M:
    """Return a deep copy of a module, marks on its parameters and hooks on graph modules included.

    Tensors that old weight norm computes are copied as numbers: they are computed anew when the model runs.

    Raises:
        InputError: something in the model cannot be copied.
    """
    memo: dict[int, object] = {id(tensor): made for tensor in _awkward(model) for made in [_copied(tensor)]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch copies its own tree specs in a way that it deprecates
            copied = copy.deepcopy(model, memo)
    except Exception as error:  # what hangs on a model may raise anything
        what = f"the model cannot be copied: {first_line(error)}"
        raise InputError(what, next_step="give inplace=True, on a model that nothing else needs") from error
    for old, new in zip(model.modules(), copied.modules(), strict=True):
        for name, parameter in old._parameters.items():
            if parameter is not None:
                _copy_marks(new._parameters[name], parameter)
        if isinstance(old, GraphModule):
            _copy_hooks(new, old)
    return copied


def _awkward(model: nn.Module) -> list[Tensor]:
    """Return the tensors of which torch's own deep copy would raise an error."""
    computed = (value for m in model.modules() for value in vars(m).values() if isinstance(value, Tensor))
    buffers = (buffer for buffer in model.buffers() if buffer is not None)
    sparse = (parameter for parameter in model.parameters() if parameter.layout != torch.strided)
    return [*(t for t in (*computed, *buffers) if t.requires_grad and not t.is_leaf), *sparse]


def _copied(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _copy_hooks(new: nn.Module, old: nn.Module) -> None:
    """Give a copy of a graph module the hooks that its own way of copying drops, but not torch's own checks."""
    for name in CARRIED:
        hooks = vars(old)[name]
        if name.endswith("_hooks") and hooks and not vars(new).get(name):
            own = {key: hook for key, hook in hooks.items() if not str(hook.__module__).startswith("torch.")}
            vars(new)[name] = OrderedDict(own)
    for name in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"):
        vars(new)[name] = OrderedDict(vars(old)[name])
    vars(new)["_is_full_backward_hook"] = vars(old)["_is_full_backward_hook"]


def _copy_marks(new: Any, old: nn.Parameter) -> None:
    """Give a copy of a parameter the attributes and the hooks of its gradient, which torch's own copy drops."""
    mark(new, old)
    for hook in (old._backward_hooks or {}).values():
        new.register_hook(hook)
    for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
        new.register_post_accumulate_grad_hook(hook)
