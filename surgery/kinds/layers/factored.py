"""The module that takes the place of a factored layer: its factors in order, with the layer's hooks and attributes.

The module is also the record of its factorization: it knows the class of the layer, the factorization and the ranks. So
recompose finds each chain by its module, wherever and however often the model calls it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.algebra import Branches, Chain, Operator, Shift, Step
from surgery.errors import InputError, Refusal
from surgery.kinds.layers import steps as layers
from surgery.kinds.layers.around import run_within
from surgery.kinds.layers.carried import OWN, carry, is_watched, mark
from surgery.kinds.layers.composed import ComposedWeight
from surgery.kinds.layers.layer_call import base_of
from surgery.kinds.layers.modules import build_module, is_operator_module, read_module, stored_as, weight_of
from surgery.kinds.layers.restored import hollow, restore
from surgery.kinds.layers.steps import build_link, is_link_module, read_link_module
from surgery.kinds.layers.within import Within, know, within_of
from surgery.sites import Origin

__all__ = [
    "Factored",
    "build_factored",
    "build_layer",
    "build_steps",
    "chain_of",
    "is_chain",
    "weight_names",
    "weights",
]

_FORMATS = {"channels_last": 4, "channels_last_3d": 5}  # memory format -> the number of axes that it needs


class Factored(nn.Sequential):
    """The factors of one layer, applied in order, with the layer's hooks, buffers and other attributes.

    Children named ``0``, ``1``, ... are the factors; other children are the layer's. ``weight`` is what the factors
    compose to: a read-only tensor that is computed when it is read. ``bias`` is the bias of the last factor.
    """

    def __init__(self, steps: Sequence[nn.Module], *, kind: type[nn.Module], origin: Origin | None = None) -> None:
        super().__init__(*steps)
        self.surgery_kind, self.surgery_origin, self.surgery_steps = kind, origin, len(steps)
        self.surgery_format = "contiguous_format"  # by name: torch cannot always pickle the format itself
        self.surgery_shape: tuple[int, ...] = ()  # of the weight, where it is known
        self.surgery_within: Within | None = None  # what the layer does around its operator

    @property
    def steps(self) -> list[nn.Module]:
        """The modules of the chain, in order."""
        return [self._modules[str(at)] for at in range(self.surgery_steps)]

    def forward(self, input: Tensor) -> Tensor:
        """Apply all factors, together with what the layer does before and after its operator."""
        within = self.surgery_within
        if within is None:
            return self.run(input)
        result: Tensor = run_within(self, within, input, self.run, next(iter(self.parameters())))
        return result

    def run(self, input: Tensor) -> Tensor:
        """Apply all factors."""
        for at in range(self.surgery_steps):
            input = self._modules[str(at)](input)
        return input

    def __getattr__(self, name: str) -> Any:
        # Python asks here for names that are not plain attributes; a factored layer computes its weight and bias
        if name == "weight" and "surgery_steps" in vars(self):
            return _composed(self)
        if name == "bias" and "surgery_steps" in vars(self):
            holder = self if "bias" in self._parameters else _bias_holder(self)
            return holder._parameters.get("bias")
        if name == "surgery_within":
            return None  # modules from older pickles do not have this attribute
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self._of_kind(name)

    def _of_kind(self, name: str) -> Any:
        """Return a method or class attribute that the user's class of layers has in addition to torch's."""
        for kind in vars(self).get("surgery_kind", nn.Module).__mro__:
            if kind.__module__.startswith("torch."):
                break
            if name in vars(kind):
                value = vars(kind)[name]
                return value.__get__(self, kind) if hasattr(value, "__get__") else value
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("weight", "bias"):
            raise InputError(f"{name} of a factored layer cannot be set", next_step="recompose the model first")
        super().__setattr__(name, value)


def _bias_holder(factored: Factored) -> nn.Module:
    """Return the module that has the layer's bias: the last factor with weights, or the shift after it."""
    *_, last = (module for module in factored.steps if any(True for _ in module.parameters()))
    while isinstance(last, nn.Sequential | layers.Sum):  # of the last branch, where there are branches
        last = last[-1]
    return last


def _composed(factored: Factored) -> Tensor:
    """Return the weight: its form is known at once, and its numbers are composed when they are used."""
    turned = stored_as(factored.surgery_kind) == "in_out"

    def make() -> Tensor:
        # the chain is checked first, with detached tensors; then it is read unchecked, so that gradients reach the
        # factors
        exact = torch.compiler.is_dynamo_compiling() or isinstance(chain_of(factored), Chain)
        chain = chain_of(factored, detached=not exact)
        whole = chain if isinstance(chain, Refusal) else chain.compose()
        if isinstance(whole, Refusal):
            what = f"the weight of a factored layer cannot be composed: {whole.reason}"
            raise InputError(what, next_step="take off what changed the factors, or read the factors themselves")
        return whole.weight.mT.contiguous() if turned else whole.weight

    if torch.compiler.is_dynamo_compiling():
        return make()
    parts = list(factored.parameters())
    shape = factored.surgery_shape or tuple(make().shape)
    like = torch.empty(shape, dtype=parts[0].dtype, device="meta", requires_grad=any(p.requires_grad for p in parts))
    return ComposedWeight(make, like=like, device=parts[0].device)


def chain_of(factored: Factored, *, detached: bool = True) -> Chain | Refusal:
    """Return the chain that the module runs, or why it is not a chain: a factor was exchanged, or has a hook."""
    steps = []
    for name, module in list(factored.named_children())[: factored.surgery_steps]:
        step = _read_step(module, detached=detached)
        if isinstance(step, Refusal):
            return Refusal(f"its factor {name} {step.reason}")
        steps.append(step)
    return Chain(tuple(steps), factored.surgery_origin)


def is_chain(module: nn.Module) -> bool:
    """Whether a module takes the place of a factored layer and is still a chain."""
    return isinstance(module, Factored) and isinstance(chain_of(module), Chain)


def _read_step(module: nn.Module, *, detached: bool) -> Step | Refusal:
    if is_watched(module):
        return Refusal("has a hook or a forward of its own")
    if is_operator_module(module):
        operator = read_module(module, detached=detached)
        return Refusal(f"is not exact: {operator.reason}") if isinstance(operator, Refusal) else operator
    if type(module) is layers.Shift:
        return Shift(module.bias.detach() if detached else module.bias)
    if is_link_module(module):
        return read_link_module(module) or Refusal("is a reshape that no factorization makes")
    if type(module) is layers.Sum:
        return _read_sum(module, detached=detached)
    return Refusal(f"is {type(module).__name__}, which is not a plain layer")


def _read_sum(module: layers.Sum, *, detached: bool) -> Step | Refusal:
    rows = []
    for row in module:
        if type(row) is not nn.Sequential or is_watched(row):
            return Refusal("is a sum of things that are not rows of layers")
        steps = [_read_step(part, detached=detached) for part in row]
        refusals = [step for step in steps if isinstance(step, Refusal)]
        if refusals:
            return refusals[0]
        rows.append(tuple(steps))
    return Branches(tuple(rows))  # type: ignore[arg-type]


def _carriers(factored: Factored) -> Iterator[tuple[str, nn.Module]]:
    """Yield the factors with weights, each with its path below the module."""
    for at, step in enumerate(factored.steps):
        for path, module in step.named_modules(prefix=str(at)):
            if "weight" in module._parameters:
                yield path, module


def weights(factored: Factored) -> list[nn.Parameter]:
    """Return the weights of all factors, in order."""
    return [module.weight for _, module in _carriers(factored)]  # type: ignore[misc]


def weight_names(factored: Factored, path: str) -> list[str]:
    """Return the names of the weights of all factors, in order, for a module at a path."""
    return [f"{path}.{place}.weight" for place, _ in _carriers(factored)]


def build_factored(chain: Chain, layer: nn.Module, moved: Tensor | None = None) -> Factored:
    """Return the module of a chain that takes the place of a layer, with the layer's hooks, attributes and bias.

    The bias is the layer's own parameter; ``moved`` is added to it in place.
    """
    within = within_of(layer)
    own = OWN
    if isinstance(within, Within):
        # a bias that the layer computes goes into the chain as numbers; a bias that is a parameter is carried as it is
        own, bias = within.names, layer._parameters.get("bias") if "bias" in within.exact else None
        computed = within.bias is not None and bias is None
    else:
        bias, computed = layer._parameters.get("bias"), False
    if not computed:
        chain = chain.with_bias(None if bias is None else bias.detach())
    factored = Factored(build_steps(chain, layer), kind=type(layer), origin=chain.origin)
    carry(factored, layer, own)
    weight: Any = weight_of(layer)
    factored.surgery_format, factored.surgery_shape = _format(weight), tuple(weight.shape)
    if isinstance(within, Within):
        hollow(factored, layer, within)
    for _, module in _carriers(factored):
        _give(module, "weight", module.weight, weight, factored.surgery_format)
    if bias is not None:
        _bias_holder(factored)._parameters["bias"] = bias
        if moved is not None:
            with torch.no_grad():
                bias.add_(moved.to(bias))
    return factored


def build_layer(factored: Factored, operator: Operator) -> nn.Module:
    """Return the layer of an operator that takes the place of factors: of the original class, with all attributes."""
    steps = {str(at) for at in range(factored.surgery_steps)}
    parts = weights(factored)
    if factored.surgery_within is not None:
        return _build_within(factored, factored.surgery_within, operator, steps)
    layer: nn.Module = build_module(operator, factored, kind=factored.surgery_kind)
    # the attributes of the user's class are carried below, so its __init__ is not needed
    if base_of(factored.surgery_kind) is type(layer):
        layer.__class__ = factored.surgery_kind  # not called: a user's class may need other arguments
    carry(layer, factored, own=steps)
    _give(layer, "weight", layer.weight, parts[0], factored.surgery_format)
    layer.weight.requires_grad_(any(part.requires_grad for part in parts))
    _give_bias(layer, factored)
    return layer


def _build_within(factored: Factored, within: Within, operator: Operator, steps: set[str]) -> nn.Module:
    """Return a layer of a class that does more than its operator, with parameters that give the operator's weight."""
    layer = restore(factored, within, operator, steps)
    parts = weights(factored)
    trains = any(part.requires_grad for part in parts)
    for name in {within.weight} - within.exact:
        layer.get_parameter(name).requires_grad_(trains)
    if within.weight in within.exact:
        _give(layer, within.weight, layer.get_parameter(within.weight), parts[0], factored.surgery_format)
        layer.get_parameter(within.weight).requires_grad_(trains)
    if within.bias is not None and within.bias in within.exact:
        _give_bias(layer, factored)
    know(layer, within)
    return layer


def _give_bias(layer: nn.Module, factored: Factored) -> None:
    """Give a layer the bias of the factors: the same parameter, if only the last factor has a bias."""
    # if other factors got a bias too, the composed bias has other numbers than the last one
    holders = [m for step in factored.steps for m in step.modules() if m._parameters.get("bias") is not None]
    if holders:
        own = holders[-1]._parameters["bias"]
        if len(holders) == 1 and holders[0] is _bias_holder(factored):
            layer._parameters["bias"] = own
        else:
            _give(layer, "bias", layer.bias, own)


def build_steps(chain: Chain, like: nn.Module) -> list[nn.Module]:
    """Return a module for each step of a chain; the last may have the class of ``like``, the layer that is factored."""
    return [_build_step(step, like, last=step is chain.steps[-1]) for step in chain.steps]


def _build_step(step: Step, layer: nn.Module, *, last: bool) -> nn.Module:
    if isinstance(step, Operator):
        return build_module(step, layer, last=last)
    if isinstance(step, Branches):
        return layers.Sum(nn.Sequential(*(build_module(op, layer, last=False) for op in row)) for row in step.rows)
    return layers.Shift(nn.Parameter(step.bias)) if isinstance(step, Shift) else build_link(step)


def _give(module: nn.Module, name: str, tensor: Any, like: Any, form: str = "") -> None:
    """Put a tensor into a module as a parameter, with the flag and the marks of ``like`` and a memory format."""
    fits = tensor.dim() == _FORMATS.get(form)
    data = tensor.detach().contiguous(memory_format=getattr(torch, form)) if fits else tensor.detach()
    parameter = nn.Parameter(data, requires_grad=like.requires_grad)
    mark(parameter, like)
    module._parameters[name] = parameter


def _format(weight: Tensor) -> str:
    for form, dims in _FORMATS.items():
        known = weight.dim() == dims and weight.is_contiguous(memory_format=getattr(torch, form))
        if known and not weight.is_contiguous():
            return form
    return "contiguous_format"
