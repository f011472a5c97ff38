"""Layers that do more than their operator: take out what a chain replaces, and restore the layer afterwards.

``hollow`` takes out of a layer what goes into the chain: the parameters, torch's parametrizations of them, and the
hooks of the old weight norm. Everything else stays. ``restore`` builds the layer again and finds numbers for its
parameters (see ``undo``). The relative error of the weight that these numbers give is then in the attribute
``surgery_error`` of the hollow module.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from surgery.algebra import Operator, relative_error
from surgery.kinds.layers.carried import carry
from surgery.kinds.layers.layer_call import clone, computes, own_hooks
from surgery.kinds.layers.undo import computed, fit, tolerance
from surgery.kinds.layers.untouched import evaluation
from surgery.kinds.layers.within import Within

__all__ = ["hollow", "restore"]

_HOOKS = ("_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks")


def hollow(made: Any, layer: nn.Module, within: Within) -> None:
    """Remove from a module all that computes the weight of a layer, and keep on it what ``restore`` needs.

    The module ``made`` takes the place of ``layer`` and already has the layer's hooks and attributes.
    """
    own = {part.name: layer.get_parameter(part.name) for part in within.parts}
    parts = (replace(p, trains=own[p.name].requires_grad, marks=dict(vars(own[p.name]))) for p in within.parts)
    made.surgery_within, made.surgery_kind = replace(within, parts=tuple(parts)), within.kind
    # the modules of parametrizations stay, without their parameters; so do the old hooks, but they do not run any more
    inner = {name.partition(".")[2]: None for name in within.names if name.startswith("parametrizations.")}
    if inner:
        hooks = layer._load_state_dict_pre_hooks  # the hook of torch's weight norm cannot be pickled
        made._load_state_dict_pre_hooks = type(hooks)({k: h for k, h in hooks.items() if not _is_compat(h)})
        made._modules["parametrizations"] = clone(layer.get_submodule("parametrizations"), inner)
    if own_hooks(layer):
        made.surgery_hooks = {name: vars(layer)[name] for name in _HOOKS}
        for name, hooks in made.surgery_hooks.items():
            vars(made)[name] = type(hooks)({key: hook for key, hook in hooks.items() if not computes(hook)})
        vars(made).pop("weight", None)


def _is_compat(hook: Any) -> bool:
    return getattr(getattr(hook, "hook", hook), "__name__", "") == "_weight_norm_compat_hook"


def restore(factored: Any, within: Within, operator: Operator, steps: Collection[str]) -> nn.Module:
    """Return the layer that was factored, with parameters from which it computes the operator's weight and bias."""
    layer: Any = object.__new__(within.kind)
    nn.Module.__init__(layer)
    # None at first, so that the parameters get their original order whichever is filled first
    layer._parameters.update(dict.fromkeys(within.order))
    carry(layer, factored, own=steps)
    like = operator.weight.detach()
    for part in within.parts:
        if "." not in part.name:
            empty = like.new_zeros(part.shape)
            layer._parameters[part.name] = nn.Parameter(empty, requires_grad=part.trains)
    _parametrize(layer, operator)
    for hook in _compat_hooks(layer, within):
        layer._load_state_dict_pre_hooks[id(hook)] = hook
    # the old hooks come first, as they were, then those that the user has added since
    for name, hooks in vars(factored).get("surgery_hooks", {}).items():
        hooks.update({key: hook for key, hook in vars(factored)[name].items() if key not in hooks})
        vars(layer)[name] = hooks
    factored.surgery_error = _fill(layer, within, operator)
    # old weight norm keeps the computed weight as an attribute, which its hook sets
    with torch.no_grad(), evaluation(layer):
        for hook in [hook for hook in layer._forward_pre_hooks.values() if computes(hook)]:
            hook(layer, ())
    made: nn.Module = layer
    return made


def _rescale(layer: nn.Module, target: Tensor, place: nn.Module, name: str) -> float:
    """Scale the estimate of a spectral norm to fit the weight, and return the relative error of the weight.

    The estimate is a buffer, so it does not follow when the weight gets other numbers.
    """
    made = computed(layer, {})
    if made is not None:
        # W = V / sigma, and sigma = u^T V v grows with v. The nearest multiple c of W has c = <W, target> / <W, W>, so
        # that v times 1 / c gives c W.
        estimate: Any = place._buffers[name]
        place._buffers[name] = estimate * ((made * made).sum() / (made * target).sum()).to(estimate.dtype)
        made = computed(layer, {})
    return math.inf if made is None else relative_error(made, target)


def _norms(layer: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return where a layer keeps the estimates of its weight's spectral norm: modules and names of their buffers."""
    found = [(part, "_v") for part in layer.modules() if type(part).__name__ == "_SpectralNorm"]
    return [*found, *((layer, f"{hook.name}_v") for hook in own_hooks(layer) if hasattr(hook, "n_power_iterations"))]


def _compat_hooks(layer: nn.Module, within: Within) -> list[Any]:
    """Return new hooks with which torch's weight norm loads files of the old weight norm."""
    names = {name.split(".")[1] for name in within.names if name.startswith("parametrizations.")}
    normed = [name for name in sorted(names) if _is_normed(layer, name)]
    new = [parametrizations.weight_norm(nn.Linear(1, 1), name) for name in normed]
    return [hook for made in new for hook in made._load_state_dict_pre_hooks.values()]


def _is_normed(layer: nn.Module, name: str) -> bool:
    steps = layer.get_submodule(f"parametrizations.{name}").children()
    return any(type(step).__name__ == "_WeightNorm" for step in steps)


def _parametrize(layer: nn.Module, operator: Operator) -> None:
    """Let torch compute the weight of a layer again, with the modules that computed it before."""
    steps = layer._modules.pop("parametrizations", None)
    for name, rows in [] if steps is None else list(steps.named_children()):
        value: Any = getattr(operator, name)
        layer._parameters[name] = nn.Parameter(value.detach().clone())
        for step in rows.children():
            parametrize.register_parametrization(layer, name, step, unsafe=True)


def _fill(layer: nn.Module, within: Within, operator: Operator) -> float:
    """Give the parameters their numbers, and return the relative error of what the layer computes from them."""
    exact = {within.weight: operator.weight, within.bias: operator.bias}
    own: Any = dict(layer.named_parameters(remove_duplicate=False))
    marks = {part.name: part for part in within.parts}
    numbers: dict[str, Tensor] = {name: t for name, t in exact.items() if name in within.exact and t is not None}
    error = 0.0
    with torch.no_grad():
        for name, value in numbers.items():
            own[name].copy_(value)
        # parameters that are the operator's own are copied; for others, numbers are fitted
        if within.weight not in within.exact or (within.bias is not None and within.bias not in within.exact):
            given = within.bias is not None and operator.bias is not None and within.bias not in within.exact
            bias = (within.bias, operator.bias) if given else None
            found, error = fit(layer, (within.weight, operator.weight), bias, within.gains)  # type: ignore[arg-type]
            for name, value in found.items():
                own[name].copy_(value)
            # a spectral norm divides by an estimate in a buffer, which no parameter can undo
            for place, name in _norms(layer) if error > tolerance(operator.weight.dtype) else ():
                error = _rescale(layer, operator.weight, place, name)
    for name, part in marks.items():
        own[name].requires_grad_(part.trains)
        vars(own[name]).update(part.marks)
    return error
