"""What a layer has in addition to its weights, and how it is carried to the module that takes the layer's place.

``CARRIED`` is the one table for this; it has each entry of ``vars(nn.Module())``. A layer with something that cannot be
carried is left alone (``refuse_carrying``). Parameters keep their marks, which are attributes that users set on them.

Layers that have to stay, because something cannot be carried to another layer or their weight is held elsewhere.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.module import _WrappedHook

from surgery.errors import InputError
from surgery.kinds.layers.modules import is_operator_module, weight_of
from surgery.kinds.layers.within import Within, within_of
from surgery.sites import Call, Skip
from surgery.text import first_line

__all__ = ["CARRIED", "OWN", "carry", "copy_module", "held_skip", "is_watched", "mark", "refuse_carrying"]

OWN = frozenset({"weight", "bias"})  # the parameters that a layer computes with
_PREFIX = "surgery_"  # the names of surgery's own attributes start with this

Carry = Callable[[str, nn.Module, nn.Module, Collection[str]], None]


def _copy(name: str, new: nn.Module, old: nn.Module, own: Collection[str]) -> None:
    """Give the new module the same value."""
    vars(new)[name] = vars(old)[name]


def _move(name: str, new: nn.Module, old: nn.Module, own: Collection[str]) -> None:
    """Give the new module the entries of a dictionary, except those that the layer computes with (``own``)."""
    entries = vars(new)[name]
    entries.update({key: value for key, value in vars(old)[name].items() if key not in own})


def _copy_set(name: str, new: nn.Module, old: nn.Module, own: Collection[str]) -> None:
    """Give the new module a copy of a set."""
    vars(new)[name] = set(vars(old)[name])


def _rebind(name: str, new: nn.Module, old: nn.Module, own: Collection[str]) -> None:
    """Give the new module the same dictionary of hooks; hooks that know their module are bound to the new one."""
    hooks = vars(old)[name]
    for key, hook in hooks.items():
        if isinstance(hook, _WrappedHook) and hook.with_module:
            hooks[key] = _WrappedHook(hook.hook, new)
    vars(new)[name] = hooks


def _training(name: str, new: nn.Module, old: nn.Module, own: Collection[str]) -> None:
    """Give the training flag to the new module and to all its parts."""
    for module in new.modules():
        module.training = old.training


# Hooks move together with their dictionary, so that the handles that users hold can still remove them.
CARRIED: dict[str, Carry] = {
    "training": _training,
    "_parameters": _move,
    "_buffers": _move,
    "_non_persistent_buffers_set": _copy_set,
    "_modules": _move,
    "_backward_pre_hooks": _copy,
    "_backward_hooks": _copy,
    "_is_full_backward_hook": _copy,
    "_forward_hooks": _copy,
    "_forward_hooks_with_kwargs": _copy,
    "_forward_hooks_always_called": _copy,
    "_forward_pre_hooks": _copy,
    "_forward_pre_hooks_with_kwargs": _copy,
    "_state_dict_hooks": _copy,
    "_state_dict_pre_hooks": _copy,
    "_load_state_dict_pre_hooks": _rebind,
    "_load_state_dict_post_hooks": _copy,
}
_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def carry(new: nn.Module, old: nn.Module, own: Collection[str] = OWN) -> None:
    """Give a module all that another has, except the parameters and children that it computes with, named in ``own``.

    Attributes are carried as well; a private attribute is carried if the new module has none of that name. Methods that
    are bound to the old module are bound to the new one.
    """
    for name, how in CARRIED.items():
        how(name, new, old, own)
    for name, value in vars(old).items():
        # torch keeps private attributes of its own there, which belong to the class of the new module
        private = name.startswith("_") and name in vars(new)
        if name not in CARRIED and not name.startswith(_PREFIX) and not private:
            bound = isinstance(value, MethodType) and value.__self__ is old
            vars(new)[name] = MethodType(value.__func__, new) if bound else value


def mark(new: Tensor, old: Tensor) -> None:
    """Give a parameter the attributes that users have set on another."""
    vars(new).update(vars(old))


def is_watched(module: nn.Module) -> bool:
    """Whether a module has a hook that sees its values or its gradients, or a forward of its own."""
    return any(vars(module)[name] for name in _CALLED) or "forward" in vars(module)


def refuse_carrying(module: nn.Module) -> str | None:
    """Return why another module cannot take the place of a layer with all its hooks and attributes, or None."""
    for name, value in vars(module).items():
        if name not in CARRIED and callable(getattr(type(module), name, None)):
            return f"its {name} is patched on the instance"
        if name == "_compiled_call_impl" and value is not None:
            return "it is compiled on its own; compile the model after surgery"
    # it would see only the last factor
    if module._backward_hooks and module._is_full_backward_hook is False:
        return "it has a backward hook of the old kind, which sees only one operation; use register_full_backward_hook"
    names = [*module._parameters, *module._buffers, *module._modules]
    if taken := [name for name in names if name.isdecimal()]:
        return f"it has {taken[0]!r}, which is the name of a factor"
    for name in ("weight", "in_proj_weight"):
        parameter = module._parameters.get(name)
        if parameter is not None and _has_hooks(parameter):
            return "its weight has a hook on its gradient, which factors do not have"
    return None


def _has_hooks(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks) or bool(getattr(tensor, "_post_accumulate_grad_hooks", None))


_M = TypeVar("_M", bound=nn.Module)


def copy_module(model: _M) -> _M:
    """Return a deep copy of a module, including marks on its parameters and hooks on graph modules.

    Tensors that the old weight norm computes are copied as numbers; the model computes them again when it runs.

    Raises:
        InputError: something in the model cannot be copied.
    """
    # deepcopy takes a copy that is in memo already, and does not try to make one
    memo: dict[int, object] = {id(tensor): made for tensor in _awkward(model) for made in [_copied(tensor)]}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch copies its own tree specs in a deprecated way
            copied = copy.deepcopy(model, memo)
    except Exception as error:  # attributes of a model may raise anything
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
    """Return the tensors for which torch's own deep copy would raise an error."""
    computed = (value for m in model.modules() for value in vars(m).values() if isinstance(value, Tensor))
    buffers = (buffer for buffer in model.buffers() if buffer is not None)
    sparse = (parameter for parameter in model.parameters() if parameter.layout != torch.strided)
    return [*(t for t in (*computed, *buffers) if t.requires_grad and not t.is_leaf), *sparse]


def _copied(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied


def _copy_hooks(new: nn.Module, old: nn.Module) -> None:
    """Give a copy of a graph module the hooks that its deep copy drops, except for torch's own checks."""
    for name in CARRIED:
        hooks = vars(old)[name]
        if name.endswith("_hooks") and hooks and not vars(new).get(name):
            own = {key: hook for key, hook in hooks.items() if not str(hook.__module__).startswith("torch.")}
            vars(new)[name] = OrderedDict(own)
    for name in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"):
        vars(new)[name] = OrderedDict(vars(old)[name])
    vars(new)["_is_full_backward_hook"] = vars(old)["_is_full_backward_hook"]


def _copy_marks(new: Any, old: nn.Parameter) -> None:
    """Give a copy of a parameter the attributes and the gradient hooks, which torch's own copy drops."""
    mark(new, old)
    for hook in (old._backward_hooks or {}).values():
        new.register_hook(hook)
    for hook in (getattr(old, "_post_accumulate_grad_hooks", None) or {}).values():
        new.register_post_accumulate_grad_hook(hook)


def held_skip(root: nn.Module, call: Call, reason: str | None = None) -> Skip | None:
    """Return a skip if the module of a call has to stay, for ``reason`` or another; else None."""
    module = root.get_submodule(str(call.path))
    reason = reason or refuse_carrying(module) or _held_elsewhere(root, module)
    path, operator = str(call.path), call.operator
    return None if reason is None else Skip(path, operator.description, reason, operator.parameters)


def _held_elsewhere(root: nn.Module, layer: nn.Module) -> str | None:
    """Return where else the weight of a layer is held, or None.

    After surgery, another holder would still have the old weight, which the model does not use any more.
    """
    weight, within = weight_of(layer), within_of(layer)
    # a computed weight is not a parameter itself, so the parameters that it is computed from must not be shared
    names = within.names - within.exact if isinstance(within, Within) else ()
    computed = [layer.get_parameter(name) for name in names]
    inside = set(layer.modules())
    for path, module in root.named_modules():
        shared = is_operator_module(module) and weight_of(module) is weight
        for name, parameter in module._parameters.items() if module not in inside else ():
            if parameter is not None and any(parameter is other for other in computed):
                return f"its weight is computed from the parameter {name} of {path or 'the model'}"
            if parameter is not None and parameter is weight and not shared and not path.startswith("_"):
                return f"its weight is the parameter {name} of {path or 'the model'} too"
        attributes = {} if isinstance(module, nn.RNNBase) else vars(module)  # recurrent layers keep rows of weights
        for name, value in attributes.items():
            if name not in CARRIED and any(_holds(value, own) for own in (weight, *computed)):
                return f"its weight is held in {name} of {path or 'the model'} too"
    return None


def _holds(value: Any, weight: Any) -> bool:
    """Whether a value is the weight, or is a list, tuple or dict that contains it."""
    if isinstance(value, list | tuple):
        return any(_holds(item, weight) for item in value)
    if type(value) is dict:
        return any(_holds(item, weight) for item in value.values())
    return value is weight
