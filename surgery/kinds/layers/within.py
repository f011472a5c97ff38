"""Layers that do more than their operator: users' own classes, weight norm, parametrizations.

A subclass of a linear layer, a convolution or an embedding may pad its input, compute its weight or scale its output;
in the middle it calls one operator:

    y = after(operator(before(x)))        with a weight that is computed from the layer's own parameters alone

``within_of`` finds this operator by following the forward on the meta device; it assumes nothing about the class. See
``around`` for how a chain runs in the operator's place, and ``restored`` for how a chain becomes such a layer again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from surgery.algebra import Operator, Shape
from surgery.errors import Refusal
from surgery.kinds.layers.follow import OperatorCall
from surgery.kinds.layers.layer_call import BASES, follow, is_plain, operator_of, own_hooks, trials
from surgery.kinds.layers.undo import fit, tolerance
from surgery.text import first_line

__all__ = ["LayerParameter", "Within", "know", "within_of"]


@dataclass(frozen=True)
class LayerParameter:
    """A parameter of a layer that goes into the chain; ``name`` is its path below the layer."""

    name: str
    shape: Shape
    trains: bool
    marks: Mapping[str, Any]


@dataclass(frozen=True)
class Within:
    """The operator inside a layer, and all that is needed to run or restore the layer around it.

    ``kind`` is the class whose forward runs around the operator; ``ghosts`` are the names and shapes of the tensors
    that stand for parameters in that forward. ``parts`` are all parameters that go into the chain. ``weight`` and
    ``bias`` name the parameters that are the operator's weight and bias, or that these are computed from; ``exact``
    names those that are the operator's own, and ``gains`` the other parameters of the weight. ``order`` has the names
    of the layer's own parameters in order. ``rest`` are the arguments of the operator's call, which is the one ``at``
    this place among all calls of operators' functions. ``pads`` says that the padding changes with the input, so that
    the input is padded before the operator. ``ends`` says that the operator's output is the layer's output. ``extra``
    is the number of entries of the parameters, less the number of the operator's.
    """

    kind: type[nn.Module]
    parts: tuple[LayerParameter, ...]
    weight: str
    bias: str | None
    exact: frozenset[str]
    gains: tuple[str, ...]
    ghosts: tuple[tuple[str, Shape], ...]
    order: tuple[str, ...]
    rest: tuple[Any, ...]
    at: int
    pads: bool
    ends: bool
    extra: int

    @property
    def names(self) -> frozenset[str]:
        """The paths of all parameters that go into the chain."""
        return frozenset(part.name for part in self.parts)


_known: WeakKeyDictionary[nn.Module, tuple[Any, Within | Refusal]] = WeakKeyDictionary()


def within_of(module: nn.Module) -> Within | Refusal | None:
    """Return the operator inside a layer, or why it cannot be factored; None for modules that are not such layers."""
    if not _is_candidate(module):
        return None
    if any(map(is_lazy, module.parameters())):
        return Refusal("its weight is not made yet; run the model once")
    known = _known.get(module)
    if known is None or known[0] != _key(module):
        known = (_key(module), _find(module))
        _known[module] = known
    return known[1]


def know(module: nn.Module, within: Within) -> None:
    """Remember the operator inside a layer that was restored: it is the same as before, whatever the numbers are."""
    _known[module] = (_key(module), within)


def _key(module: nn.Module) -> Any:
    """Return all that a layer's forward depends on, except for numbers."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    arguments = tuple(str(vars(module).get(name)) for name in ("stride", "padding", "dilation", "groups"))
    return (type(module), len(module._forward_pre_hooks), shapes, arguments)


def _is_candidate(module: nn.Module) -> bool:
    kind = type(module)
    if not isinstance(module, BASES) or is_plain(module) or kind.__name__.startswith("Lazy"):
        return False
    if is_parametrized(module) and any(type(part).__name__ == "_Orthogonal" for part in module.modules()):
        return False  # no chain of a lower rank is orthogonal
    # users' classes, torch's parametrized classes, and torch's own classes without a plain weight (old weight norm)
    users = not kind.__module__.startswith("torch.")
    return users or (is_parametrized(module) and _unparametrized(kind) is not kind) or kind in BASES


def _unparametrized(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a layer had before torch parametrized it."""
    base = kind.__bases__[0]
    own = kind.__module__ == "torch.nn.utils.parametrize" and not base.__module__.startswith("torch.ao")
    return base if own else kind


def _find(module: nn.Module) -> Within | Refusal:
    try:
        seen = [follow(module, shape) for shape in trials(module)]
    except Exception as error:  # a forward may raise anything on an input without numbers
        return Refusal(f"its forward cannot be followed: {first_line(error)}")
    refusals = [found for found in seen if isinstance(found, Refusal)]
    if refusals:
        return refusals[0]
    first, *others = [found for found in seen if isinstance(found, tuple)]
    return _read(module, first, [other[0] for other in others])


def _read(module: nn.Module, first: tuple[OperatorCall, bool], others: list[OperatorCall]) -> Within | Refusal:
    seen, ends = first
    own = dict(module.named_parameters(remove_duplicate=False))
    # The forward was followed at several input sizes. All calls must be the same except for padding, and the weight
    # must be computed from one large parameter and small gains; only then can a chain stand in and the layer be
    # restored.
    names = [name for name in own if name in seen.weight_from | seen.bias_from]
    # "exact" parameters are the tensors themselves that the operator gets, not values computed from them
    exact = {name for name in names if own[name] is seen.weight or own[name] is seen.bias}
    if reason := _refuse_names(module, seen, own):
        return Refusal(reason)
    pads = any(other.parts.rest != seen.parts.rest for other in others)
    if pads and not _differ_in_padding([seen, *others]):
        return Refusal("its operator's stride or dilation changes with the size of its input")
    operator = operator_of(seen, pads=pads)
    if isinstance(operator, Refusal):
        return operator
    weight = max(seen.weight_from, key=lambda name: own[name].numel())
    gains = tuple(name for name in names if name in seen.weight_from and name != weight)
    large = [name for name in gains if sum(size > 1 for size in own[name].shape) > 1]
    if large:
        return Refusal(f"its weight is made of several matrices, {weight} and {large[0]}")
    if own[weight].numel() != operator.weight.numel():
        return Refusal("its weight is computed from a parameter of another size")
    bias = next(iter(seen.bias_from), None)
    if not _comes_back(module, operator, (weight, bias), gains, exact):
        return Refusal("its weight is computed in a way that cannot be undone, so that it could not be restored")
    return Within(
        kind=_unparametrized(type(module)),
        parts=tuple(LayerParameter(n, tuple(own[n].shape), own[n].requires_grad, dict(vars(own[n]))) for n in names),
        weight=weight,
        bias=bias,
        exact=frozenset(exact),
        gains=gains,
        ghosts=_ghosts(module, names, own),
        order=tuple(module._parameters),
        rest=seen.parts.rest,
        at=seen.at,
        pads=pads,
        ends=ends and not pads,
        extra=sum(own[name].numel() for name in names) - operator.parameters,
    )


def _comes_back(
    module: nn.Module, operator: Operator, names: tuple[str, str | None], gains: tuple[str, ...], exact: set[str]
) -> bool:
    """Whether parameters can be found from which the layer computes its present weight and bias."""
    tensors = [t for t in (operator.weight, operator.bias) if t is not None]
    if exact >= {name for name in names if name is not None}:
        return True
    # restoring is tried at once, on the present weight, so that a layer that cannot come back is never factored
    if any(t.device.type == "meta" or isinstance(t, FakeTensor) or not t.is_floating_point() for t in tensors):
        return True  # nothing can be tried without numbers
    bias = None if names[1] is None or operator.bias is None or names[1] in exact else (names[1], operator.bias)
    return fit(module, (names[0], operator.weight), bias, gains)[1] <= tolerance(operator.weight.dtype)


def _refuse_names(module: nn.Module, seen: OperatorCall, own: Mapping[str, Tensor]) -> str | None:
    if seen.bias is not None and len(seen.bias_from) != 1:
        return "its bias is computed from several parameters" if seen.bias_from else "its bias is not a parameter"
    for name in sorted(seen.weight_from | seen.bias_from):
        if "." in name and not (is_parametrized(module) and name.startswith("parametrizations.")):
            return f"its weight is computed from {name}, a parameter of a submodule"
    if own.get("weight") is not None and "weight" not in seen.weight_from:
        return "its forward does not use its weight as the weight of its operator"
    return None


def _ghosts(module: nn.Module, names: list[str], own: Mapping[str, Tensor]) -> tuple[tuple[str, Shape], ...]:
    """Return the names and shapes of the tensors that stand for parameters of a chain in a layer's forward.

    If torch computes a weight before the forward (weight norm, a parametrization), it is the computed weight.
    """
    found: dict[str, Shape] = {}
    computed = {name.partition("_")[0]: name for name in names} if own_hooks(module) else {}
    for name in names:
        if name.startswith("parametrizations."):
            name = name.split(".")[1]
            found[name] = tuple(getattr(module, name).shape)
        elif "weight" in computed and name.startswith("weight_"):
            found["weight"] = tuple(getattr(module, "weight").shape)  # noqa: B009  (mypy knows no such attribute)
        else:
            found[name] = tuple(own[name].shape)
    return tuple(found.items())


def _differ_in_padding(calls: list[OperatorCall]) -> bool:
    forms = set()
    for seen in calls:
        names, *values = seen.parts.rest
        given = dict(zip(names[2:], values, strict=True))
        # all but the padding has to be the same; a transposed convolution's padding cannot be done by hand
        if given.pop("padding", None) is None or "output_padding" in given:
            return False
        forms.add(tuple(given.items()))
    return len(forms) == 1
