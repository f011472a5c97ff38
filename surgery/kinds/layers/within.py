"""Layers that do more than their operator: classes of users' own, weight norm, parametrizations.

A subclass of a linear layer, a convolution or an embedding pads its input, computes its weight, scales its output, and
calls one operator in the middle:

    y = after(operator(before(x)))        with a weight that is computed from the layer's own parameters alone

``within_of`` finds that operator by following the forward on the meta device; nothing is assumed of the class. How a
chain runs in the operator's place is in ``around``, and how parameters come back from a chain in ``restored``.
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

from surgery.algebra.operators import Operator, Shape
from surgery.errors import Refusal
from surgery.kinds.layers.follow import Seen
from surgery.kinds.layers.layer_call import BASES, follow, is_plain, operator_of, own_hooks, trials
from surgery.kinds.layers.undo import fit, tolerance
from surgery.text import first_line

__all__ = ["Part", "Within", "know", "within_of"]


@dataclass(frozen=True)
class Part:
    """A parameter that goes into the chain of a layer, by its path below the layer."""

    name: str
    shape: Shape
    trains: bool
    marks: Mapping[str, Any]


@dataclass(frozen=True)
class Within:
    """The operator inside a layer: ``kind`` is the class whose forward runs around it, on ``ghosts`` by name.

    ``parts`` are all parameters that go into the chain; ``weight`` and ``bias`` are the names of the parameters that
    are the operator's own or that theirs are computed from, and ``exact`` are those that are the operator's own.
    ``rest`` are the arguments of the call, which is the one ``at`` this place of all calls of operators' functions; its
    input is padded in front where ``pads``, since its padding changes with the input. ``ends`` says that the operator's
    output is the layer's, and ``extra`` how many numbers more the parameters have than the operator.
    """

    kind: type[nn.Module]
    parts: tuple[Part, ...]
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
    """Return the operator inside a layer, or why there is none that can be factored; None for what is no such layer."""
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
    """Take it as known what is inside a layer: one that was built again has the same, whatever its numbers are."""
    _known[module] = (_key(module), within)


def _key(module: nn.Module) -> Any:
    """Return what a layer's forward depends on, but for numbers."""
    shapes = tuple((name, tuple(p.shape)) for name, p in module.named_parameters())
    arguments = tuple(str(vars(module).get(name)) for name in ("stride", "padding", "dilation", "groups"))
    return (type(module), len(module._forward_pre_hooks), shapes, arguments)


def _is_candidate(module: nn.Module) -> bool:
    kind = type(module)
    if not isinstance(module, BASES) or is_plain(module) or kind.__name__.startswith("Lazy"):
        return False
    if is_parametrized(module) and any(type(part).__name__ == "_Orthogonal" for part in module.modules()):
        return False  # no chain of a lower rank is orthogonal
    users = not kind.__module__.startswith("torch.")
    return users or (is_parametrized(module) and _unparametrized(kind) is not kind) or kind in BASES


def _unparametrized(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class that a layer was of before torch gave it one with computed parameters."""
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


def _read(module: nn.Module, first: tuple[Seen, bool], others: list[Seen]) -> Within | Refusal:
    seen, ends = first
    own = dict(module.named_parameters(remove_duplicate=False))
    names = [name for name in own if name in seen.weight_from | seen.bias_from]
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
        return Refusal("its weight is computed from another number of parameters")
    bias = next(iter(seen.bias_from), None)
    if not _comes_back(module, operator, (weight, bias), gains, exact):
        return Refusal("its weight is computed in a way that cannot be undone, so that it could not come back")
    return Within(
        kind=_unparametrized(type(module)),
        parts=tuple(Part(n, tuple(own[n].shape), own[n].requires_grad, dict(vars(own[n]))) for n in names),
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
    """Whether parameters can be found from which the layer computes the weight and the bias that it has now."""
    tensors = [t for t in (operator.weight, operator.bias) if t is not None]
    if exact >= {name for name in names if name is not None}:
        return True
    if any(t.device.type == "meta" or isinstance(t, FakeTensor) or not t.is_floating_point() for t in tensors):
        return True  # nothing can be tried without numbers
    bias = None if names[1] is None or operator.bias is None or names[1] in exact else (names[1], operator.bias)
    return fit(module, (names[0], operator.weight), bias, gains)[1] <= tolerance(operator.weight.dtype)


def _refuse_names(module: nn.Module, seen: Seen, own: Mapping[str, Tensor]) -> str | None:
    if seen.bias is not None and len(seen.bias_from) != 1:
        return "its bias is computed from several parameters" if seen.bias_from else "its bias is no parameter"
    for name in sorted(seen.weight_from | seen.bias_from):
        if "." in name and not (is_parametrized(module) and name.startswith("parametrizations.")):
            return f"its weight is computed from {name}, a parameter of a part of it"
    if own.get("weight") is not None and "weight" not in seen.weight_from:
        return "its forward does not use its weight as the weight of its operator"
    return None


def _ghosts(module: nn.Module, names: list[str], own: Mapping[str, Tensor]) -> tuple[tuple[str, Shape], ...]:
    """Return what stands for the parameters of a chain in a forward: for a computed one, what is computed."""
    found: dict[str, Shape] = {}
    computed = {name.partition("_")[0]: name for name in names} if own_hooks(module) else {}
    for name in names:
        if name.startswith("parametrizations."):
            name = name.split(".")[1]
            found[name] = tuple(getattr(module, name).shape)
        elif "weight" in computed and name.startswith("weight_"):
            found["weight"] = tuple(getattr(module, "weight").shape)  # noqa: B009  (it is no attribute of a Module)
        else:
            found[name] = tuple(own[name].shape)
    return tuple(found.items())


def _differ_in_padding(calls: list[Seen]) -> bool:
    forms = set()
    for seen in calls:
        names, *values = seen.parts.rest
        given = dict(zip(names[2:], values, strict=True))
        if given.pop("padding", None) is None or "output_padding" in given:
            return False
        forms.add(tuple(given.items()))
    return len(forms) == 1
