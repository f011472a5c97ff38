"""The call of an operator in the forward of one layer: which classes of layers count, and how a forward is followed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.algebra import Conv, Operator, Shape
from surgery.errors import Refusal
from surgery.kinds.layers.follow import Follow, OperatorCall
from surgery.kinds.layers.untouched import evaluation, kept_random, kept_state

__all__ = ["BASES", "base_of", "clone", "computes", "follow", "is_plain", "operator_of", "own_hooks", "trials"]

BASES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Embedding,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
_METHODS = ("forward", "_conv_forward", "__call__", "_call_impl", "__getattr__", "__getattribute__", "weight", "bias")
_HOOKS = ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")  # the hooks of these modules compute a weight


def base_of(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return the class among ``BASES`` whose forward a class of layers has unchanged; None if there is none."""
    for base in BASES:
        if kind is base:
            return base
        # a subclass that only adds methods or another __init__ computes as its base does
        own = issubclass(kind, base) and not kind.__module__.startswith("torch.")
        if own and all(getattr(kind, name, None) is getattr(base, name, None) for name in _METHODS):
            return base
    return None


def is_plain(module: nn.Module) -> bool:
    """Whether a module computes as one of torch's layers, and has its weight as a parameter."""
    return base_of(type(module)) is not None and "weight" in module._parameters


def own_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks of torch that compute a module's weight: old weight norm and spectral norm."""
    hooks = [*module._forward_pre_hooks.values(), *module._load_state_dict_pre_hooks.values()]
    hooks += module._state_dict_hooks.values()
    return [hook for hook in hooks if computes(hook)]


def computes(hook: Any) -> bool:
    """Whether a hook is one of torch's that compute a weight."""
    hook = getattr(hook, "hook", hook)
    return type(hook).__module__.startswith(_HOOKS)


def trials(module: nn.Module) -> list[Shape]:
    """Return shapes of trial inputs for a layer: the first that it accepts, or three sizes for a convolution."""
    layer: Any = module
    if isinstance(module, nn.Embedding):
        return [next(s for s in ((1, 4), (4,), (1, 4, 4)) if _takes(module, s))]
    if isinstance(module, nn.Linear):
        shapes: list[Shape] = [(1,) * axes + (layer.in_features,) for axes in (1, 2, 3)]
        return [next((shape for shape in shapes if _takes(module, shape)), shapes[0])]
    # three inputs that are larger by 0, 1 and 2 show whether the padding depends on the size, as "same" with a stride
    # does
    spans = [d * (k - 1) + 1 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return [(1, layer.in_channels, *(2 * max(spans) + 9 + more for _ in spans)) for more in (0, 1, 2)]


def _takes(module: nn.Module, shape: Shape) -> bool:
    try:
        follow(module, shape)
    except Exception:  # another shape may do
        return False
    return True


def clone(module: nn.Module, parameters: Mapping[str, Any]) -> nn.Module:
    """Return a module with other tensors for some of its parameters, by path; it shares all else with the original."""
    made = object.__new__(type(module))
    vars(made).update(vars(module))
    for name in ("_parameters", "_buffers", "_modules"):
        vars(made)[name] = dict(vars(module)[name])
    for name, child in module._modules.items():
        inner = {k.partition(".")[2]: v for k, v in parameters.items() if k.startswith(f"{name}.")}
        if inner and child is not None:
            made._modules[name] = clone(child, inner)
    made._parameters.update({name: value for name, value in parameters.items() if "." not in name})
    return made


@contextlib.contextmanager
def _followed(module: nn.Module) -> Iterator[None]:
    with torch.no_grad(), kept_random(module), evaluation(module), kept_state(module):
        yield


def follow(
    module: nn.Module, shape: Shape, parameters: Mapping[str, Tensor] | None = None
) -> tuple[OperatorCall, bool] | Refusal:
    """Return the one call of an operator in a layer's forward, and whether its output is the layer's output.

    The forward runs on an input of this shape, without numbers. ``parameters`` replace parameters of the layer, by
    path. Raises whatever the forward raises.
    """
    layer = clone(module, parameters or {})
    own = {name: p for name, p in layer.named_parameters(remove_duplicate=False) if p is not None}
    floats = [p for p in own.values() if p.is_floating_point()]
    if not floats:
        return Refusal("it has no floating-point parameters")
    dtype = torch.int64 if isinstance(module, nn.Embedding) else floats[0].dtype
    source = torch.empty(shape, dtype=dtype, device="meta")
    mode = Follow(own, source, floats[0].device)
    with _followed(layer), mode:
        for hook in [hook for hook in layer._forward_pre_hooks.values() if computes(hook)]:
            hook(layer, (source,))
        result = type(layer).forward(layer, source)
        return _the_call(mode, layer, result)


def _the_call(mode: Follow, layer: nn.Module, result: Any) -> tuple[OperatorCall, bool] | Refusal:
    if mode.refusals:
        return Refusal(mode.refusals[0])
    if len(mode.calls) != 1:
        words = "no function of an operator" if not mode.calls else "more than one function of an operator"
        return Refusal(f"its forward calls {words} on its own weight")
    seen = mode.calls[0]
    # a parameter that the chain takes over must not be needed anywhere else in the forward
    names = seen.weight_from | seen.bias_from
    if shared := sorted((names & mode.elsewhere) | (seen.weight_from & seen.bias_from)):
        return Refusal(f"its forward uses {shared[0]} in more than its operator")
    if not isinstance(result, Tensor):
        return Refusal("its forward returns more than one tensor")
    # a tensor that the forward computes from the weight and keeps would have no numbers once the weight is a ghost
    kept = [v for v in vars(layer).values() if isinstance(v, Tensor) and v is not seen.weight and mode.names(v) & names]
    if kept and not own_hooks(layer):
        return Refusal("its forward keeps what it computes from its weight")
    return seen, result is seen.output


def operator_of(seen: OperatorCall, *, pads: bool) -> Operator | Refusal:
    """Return the operator of a call with its numbers; ``pads`` leaves out the padding, which is then done before it."""
    operator = seen.parts.build(seen.weight.detach(), None if seen.bias is None else seen.bias.detach())
    if isinstance(operator, Conv) and pads:
        if not operator.geometry.symmetric or operator.geometry.padding_mode != "zeros":
            return Refusal("its operator's padding changes with the size of its input")
        geometry = replace(operator.geometry, padding=tuple((0, 0) for _ in operator.geometry.padding))
        return replace(operator, geometry=geometry)
    return operator
