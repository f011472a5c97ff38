"""Layers that have to stay, because something cannot be carried to another layer or their weight is held elsewhere."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.kinds.layers.carried import CARRIED, refuse_carrying
from surgery.kinds.layers.modules import is_operator_module, weight_of
from surgery.kinds.layers.within import Within, within_of
from surgery.sites.flow import Call
from surgery.sites.site import Skip

__all__ = ["held_skip"]


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
