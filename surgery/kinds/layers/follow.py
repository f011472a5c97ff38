"""Follow the forward of a layer: find the call of an operator on the layer's own weight, or run a chain in its place.

A layer of a class of its own may pad its input, scale its weight, or crop what comes out; in the middle it calls one
function of torch. ``Follow`` runs a forward once on a tensor without numbers and notes that call; ``Substitute`` runs
it with tensors that stand for the weight, and computes the call by something else.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from surgery.algebra import Conv, Embedding, Linear, Operator, Shape
from surgery.errors import Refusal
from surgery.kinds.layers.tensors import conv_geometry

__all__ = ["Tap", "Follow", "RunInPlace", "CalledWith", "OperatorCall", "without_modes"]

without_modes = _disable_current_modes  # torch's tracers must not see tensors that are not of their graphs

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
_DEFAULTS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1, "norm_type": 2.0}
_CALLS: dict[Any, tuple[str, ...]] = {
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d), _CONV),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _TRANSPOSED),
    F.linear: ("input", "weight", "bias"),
    F.embedding: _EMBEDDING,
}
_PRODUCTS = (torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_TENSORS = frozenset({"T", "H", "mT", "mH", "data", "real", "imag"})  # attributes of tensors that are tensors
_READS = frozenset({"item", "tolist", "numpy", "__bool__", "__float__", "__int__", "__index__", "__contains__"})
_ROUNDS = ("round", "floor", "ceil", "trunc", "sign", "quantize", "heaviside", "argmax", "bucketize")
_RANDOM = ("dropout", "rand", "bernoulli")


@dataclass(frozen=True, eq=False)
class CalledWith:
    """The call of an operator's function.

    ``rest`` has the names of the arguments, and the values of all arguments but the tensors. ``turned`` says that the
    weight is (in, out), as in a product of matrices.
    """

    source: Any
    weight: Any
    bias: Any
    rest: tuple[Any, ...]
    turned: bool = False

    def build(self, weight: Tensor, bias: Tensor | None) -> Operator | Refusal:
        """Return the operator of the call with a weight and a bias, or why there is none."""
        names, *values = self.rest
        given = dict(zip(names[2:], values, strict=True))
        if names == _EMBEDDING:
            if given["max_norm"] is not None or given["scale_grad_by_freq"] or given["sparse"]:
                return Refusal("it renormalises its rows, or has gradients of its own")
            return Embedding(weight, padding_index=given["padding_idx"])
        if names not in (_CONV, _TRANSPOSED):
            return Linear(weight.mT if self.turned else weight, bias=bias)
        arguments = {key: given.get(key, 0) for key in ("stride", "padding", "dilation", "output_padding")}
        geometry = conv_geometry(tuple(weight.shape[2:]), transposed=names == _TRANSPOSED, **arguments)
        return geometry if isinstance(geometry, Refusal) else Conv(weight, geometry, given["groups"], bias=bias)


def _read(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> CalledWith | None:
    """Return the parts of the call of an operator's function; None for any other function."""
    if func in _PRODUCTS:
        weight = args[1] if len(args) == 2 else None
        names: tuple[str, ...] = ("input", "weight")
        plain = isinstance(weight, Tensor) and weight.dim() == 2
        return CalledWith(args[0], weight, None, (names,), turned=True) if plain else None
    try:
        found = _CALLS.get(func)
    except TypeError:  # a function that cannot be hashed is not in the table
        return None
    if found is None:
        return None
    given = dict(zip(found, args, strict=False)) | dict(kwargs)
    if not {"input", "weight"} <= set(given) or not set(given) <= set(found):
        return None
    rest = (None if name == "bias" else _frozen(given.get(name, _DEFAULTS.get(name))) for name in found[2:])
    return CalledWith(given["input"], given["weight"], given.get("bias"), (found, *rest))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


def _given(args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> list[Tensor]:
    return [*_tensors(args), *(_tensors(kwargs.values()) if kwargs else ())]


def _attribute(func: Any) -> str:
    """Return the name of the tensor attribute that a function reads, or an empty string."""
    return str(func.__self__.__name__) if getattr(func, "__name__", "") == "__get__" else ""


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@dataclass(frozen=True, eq=False)
class OperatorCall:
    """One call of an operator: its tensors, the names of the parameters that they are made of, and its input's shape.

    ``at`` is the place of this call among all calls of operators' functions in the forward.
    """

    parts: CalledWith
    weight: Tensor
    bias: Tensor | None
    weight_from: frozenset[str]
    bias_from: frozenset[str]
    shape: Shape
    at: int
    output: Tensor = field(repr=False)


class Follow(TorchFunctionMode):
    """Notes what a forward does with ``parameters`` and with ``source``, its input on the meta device.

    A tensor that is computed from parameters alone has numbers; a tensor that depends on ``source`` has none. ``calls``
    are the calls of operators on tensors that depend on ``source``. ``elsewhere`` names the parameters that meet such
    tensors in other functions. ``refusals`` says what the forward does that it could not do with a chain.
    """

    # Two facts are kept for each tensor, by its id: which parameters it is made of (_from), and whether it depends on
    # source (_flows). For y = conv(pad(x), g * v / |v|), pad(x) and y flow, the weight is made of {g, v}, and the call
    # of conv is noted in calls.

    def __init__(self, parameters: Mapping[str, Tensor], source: Tensor, device: torch.device) -> None:
        super().__init__()
        self.calls: list[OperatorCall] = []
        self.elsewhere: set[str] = set()
        self.refusals: list[str] = []
        self._device = device
        self._own = {_storage(tensor) for tensor in parameters.values()}
        self._from = {id(tensor): frozenset({name}) for name, tensor in parameters.items()}
        self._flows = {id(source)}
        self._kept: list[Any] = [source]  # an id is valid only while its tensor lives
        self._operators = 0

    def names(self, tensor: Any) -> frozenset[str]:
        """The names of the parameters that a tensor is computed from, if it does not depend on ``source``."""
        return self._from.get(id(tensor), frozenset())

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and note what it does."""
        kwargs = kwargs or {}
        given = _given(args, kwargs)
        flows = any(id(tensor) in self._flows for tensor in given)
        names = frozenset[str]().union(*map(self.names, given))
        attribute = _attribute(func)
        # layers make tensors on the device of their input; the input's stand-in is on the meta device
        if attribute == "device" and flows:
            return self._device
        if attribute and attribute not in _TENSORS:
            return func(*args, **kwargs)
        if names:
            self._look(getattr(func, "__name__", ""), args, names)
        # all calls of operators' functions are counted, so that a later run can find the same call by its place
        self._operators += _read(func, args, kwargs) is not None
        if not flows:
            return self._note(func(*args, **kwargs), names)
        return self._flow(func, args, kwargs, names)

    def _look(self, name: str, args: Sequence[Any], names: frozenset[str]) -> None:
        """Note uses of a weight that a chain could not serve: its numbers are read, rounded or drawn at random.

        Raises:
            ValueError: the forward writes to a parameter.
        """
        if name in _READS:
            self.refusals.append("its forward reads the numbers of its weight")
        elif any(word in name for word in _RANDOM):
            self.refusals.append("its weight is random in training")
        elif any(word in name for word in _ROUNDS):
            self.refusals.append("its weight is rounded (quantization)")
        elif name == "__set__" or (name.endswith("_") and not name.endswith("__")):
            first = args[0] if args else None
            if isinstance(first, Tensor) and _storage(first) in self._own:
                raise ValueError("its forward writes to its parameters")

    def _note(self, result: Any, names: frozenset[str]) -> Any:
        for tensor in _tensors((result,)) if names else ():
            self._from[id(tensor)] = names
            self._kept.append(tensor)
        return result

    def _flow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], names: frozenset[str]) -> Any:
        # weight.to(x) must not move the weight to the meta device: it would lose its numbers
        if getattr(func, "__name__", "") in ("to", "type_as") and id(args[0]) not in self._flows:
            like = next(tensor for tensor in args[1:] if isinstance(tensor, Tensor))
            return self._note(args[0].to(dtype=like.dtype), names)
        parts = _read(func, args, kwargs)
        at, shape = self._operators - 1, () if parts is None else tuple(parts.source.shape)
        # a function of the input runs on the meta device, so all its tensors have to be there
        plain = pytree.tree_map_only(Tensor, self._plain, (tuple(args), dict(kwargs)))
        result = func(*plain[0], **plain[1])
        for tensor in _tensors((result,)):
            self._flows.add(id(tensor))
            self._kept.append(tensor)
        if parts is None or not self._is_call(parts):
            self.elsewhere |= names
        else:
            made = (parts.weight, parts.bias, self.names(parts.weight), self.names(parts.bias))
            self.calls.append(OperatorCall(parts, *made, shape, at, result))
        return result

    def _plain(self, tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in self._flows else tensor.to("meta")

    def _is_call(self, parts: CalledWith) -> bool:
        tensors = (parts.weight,) if parts.bias is None else (parts.weight, parts.bias)
        flows = any(id(tensor) in self._flows for tensor in tensors)
        return id(parts.source) in self._flows and bool(self.names(parts.weight)) and not flows


class Tap(TorchFunctionMode):
    """Shows ``see`` the parts of an operator's call at a place, and replaces the output by what ``change`` returns."""

    def __init__(self, at: int, see: Callable[[CalledWith], None], change: Callable[[Any], Any] | None) -> None:
        super().__init__()
        self._left, self._see, self._change = at, see, change

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, with ``see`` and ``change`` if it is the call at the place."""
        parts = _read(func, args, kwargs or {})
        # every call of an operator's function counts down, as ``Follow`` has counted up
        here = parts is not None and self._left == 0
        self._left -= parts is not None
        if parts is not None and here:
            self._see(parts)
        result = func(*args, **(kwargs or {}))
        return self._change(result) if here and self._change is not None else result


class RunInPlace(TorchFunctionMode):
    """Calls ``run`` in the place of the operator whose weight is made of ``ghosts``.

    Ghosts are tensors on the meta device that stand for parameters: they have the right form and no numbers.
    """

    def __init__(self, ghosts: Collection[Tensor], device: torch.device, run: Callable[[CalledWith], Any]) -> None:
        super().__init__()
        self._device, self._run = device, run
        self._ghosts = {id(ghost): ghost for ghost in ghosts}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, or ``run`` for the operator; a tensor that is computed from ghosts is a ghost too."""
        kwargs = kwargs or {}
        if not any(id(tensor) in self._ghosts for tensor in _given(args, kwargs)):
            return func(*args, **kwargs)
        if _attribute(func) == "device":
            return self._device
        parts = _read(func, args, kwargs)
        if parts is not None and id(parts.weight) in self._ghosts and id(parts.source) not in self._ghosts:
            return self._run(parts)
        # x.to(weight) takes the dtype of the ghost, but not its device
        if args and getattr(func, "__name__", "") in ("to", "type_as") and id(args[0]) not in self._ghosts:
            return args[0].to(dtype=next(t for t in args[1:] if isinstance(t, Tensor)).dtype)
        with without_modes():
            plain = pytree.tree_map_only(Tensor, self._plain, (args, kwargs))
            result = pytree.tree_map_only(Tensor, _without_numbers, func(*plain[0], **plain[1]))
        for tensor in _tensors((result,)):
            self._ghosts[id(tensor)] = tensor
        return result

    def _plain(self, tensor: Tensor) -> Tensor:
        return tensor if id(tensor) in self._ghosts else _without_numbers(tensor)


def _without_numbers(tensor: Tensor) -> Tensor:
    if tensor.device.type == "meta":
        return tensor
    return torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
