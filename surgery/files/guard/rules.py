"""Arguments that allowed operators must not get, because their kernels do not check them. Pure checks of plain values.

There are two kinds of rules: for literal arguments, such as a divisor, and for the sizes of tensors. A kernel that
reads a weight by the sizes of the input reads past the weight's end if the two differ. Most of torch's operators check
this themselves; ``tools/check_operators.py --fuzz`` shows which do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from surgery.errors import UnsafeFileError
from surgery.files.guard.operators import PLAIN_OPERATORS

__all__ = ["BY_SIZES", "MOST_BITS_OUTSIDE", "UNKNOWN", "Arguments", "Held", "check_call", "check_sizes", "check_values"]


class _Unknown:
    """Stands for a value that is known only when the program runs."""


UNKNOWN = _Unknown()


@dataclass(frozen=True)
class Held:
    """A tensor of known sizes: numbers, or expressions as text; equal texts mean equal sizes."""

    sizes: tuple[int | str, ...]


MOST_BITS_OUTSIDE = 1 << 10  # of a number that crosses the border of a region, or is in a recipe
_MOST_POWER = 64
_MOST_EXTENT = 1 << 48  # numbers of a tensor: far more than any memory holds
_MOST_WINDOW = 1 << 20
_MOST_SCALE = 1e6
_MOST_LAYERS = 1000

Arguments = Mapping[str, Any]  # by the names of the schema; tensors are UNKNOWN or Held
Rule = Callable[[Arguments], str | None]  # the fault of these arguments, which continues "it calls X ...", or None


# -- literal arguments ------------------------------------------------------------------------------------------------


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(each is UNKNOWN or isinstance(each, bool | int | float) for each in values)


def _arithmetic(name: str, values: Sequence[Any]) -> str | None:
    """Python's arithmetic on sizes takes numbers only: a list times a number could fill the memory."""
    if name in ("torch.sym_sum", "_operator.getitem"):
        first, *rest = values or [None]
        lists = first if isinstance(first, list | tuple) else [first]
        fits = len(values) == (1 if name == "torch.sym_sum" else 2) and _are_numbers([*lists, *rest])
        return None if fits else "with a value that is not a number"
    if not 1 <= len(values) <= 3 or not _are_numbers(values):
        return "with a value that is not a number"
    last = values[-1]
    if name in ("_operator.floordiv", "_operator.mod", "_operator.truediv") and last is not UNKNOWN and not last:
        return "with the divisor 0"
    if name in ("_operator.pow", "_operator.lshift") and (last is UNKNOWN or not abs(last) <= _MOST_POWER):
        return f"with an exponent or a shift that is not a number up to {_MOST_POWER}"
    return None


def _integers(value: Any) -> list[int]:
    return [each for each in value if type(each) is int] if isinstance(value, list | tuple) else []


def _strided(arguments: Arguments) -> str | None:
    sizes, strides, offset = (arguments.get(name) for name in ("size", "stride", "storage_offset"))
    known = [_integers(sizes), _integers(strides)]
    if len(known[0]) != len(sizes or ()) or len(known[1]) != len(strides or ()) or offset is UNKNOWN:
        return "with sizes, strides or an offset that are known only when it runs"
    if len(known[0]) != len(known[1]) or min([*known[0], *known[1], offset or 0], default=0) < 0:
        return "with sizes, strides and an offset that do not fit together"
    # The last element lies within offset + sum(size * stride).
    extent = (offset or 0) + sum(size * stride for size, stride in zip(*known, strict=True))
    return None if max(extent, math.prod(known[0])) < _MOST_EXTENT else "with sizes and strides beyond any memory"


def _in_training(arguments: Arguments) -> str | None:
    return None if arguments.get("training") is True else "outside training, where it trusts its statistics"


def _window(arguments: Arguments) -> str | None:
    values = [arguments.get(name) for name in ("kernel_size", "stride", "padding", "dilation")]
    listed = [part for each in values if each is not None for part in (each if isinstance(each, list) else [each])]
    fits = all(type(each) is int and abs(each) < _MOST_WINDOW for each in listed)
    return None if fits else f"with a window that is not a number under {_MOST_WINDOW}"


def _truncated(arguments: Arguments) -> str | None:
    """Dividing the least whole number by -1, rounded towards zero, ends the process."""
    divisor = arguments.get("other")
    if arguments.get("rounding_mode") != "trunc" or (isinstance(divisor, int | float) and divisor not in (0, -1)):
        return None
    return "towards zero, with a divisor that could be 0 or -1"


def _replicated(arguments: Arguments) -> str | None:
    return _padded(arguments) if arguments.get("mode") == "replicate" else None


def _padded(arguments: Arguments) -> str | None:
    """Padding by copies of the border: a width that does not fit 64 bits wraps around to a small one."""
    given = arguments.get("padding", arguments.get("pad"))
    fits = isinstance(given, list) and all(type(each) is int and abs(each) < _MOST_EXTENT for each in given)
    return None if fits else "with a padding that is not a list of numbers that fit memory"


def _scaled(arguments: Arguments) -> str | None:
    """Upsampling reads at index * scale: if that overflows a whole number, it reads anywhere."""
    for name, value in arguments.items():
        if name.startswith("scale") and value is not None:
            scales = value if isinstance(value, list) else [value]
            if not all(isinstance(each, int | float) and 1 / _MOST_SCALE < each < _MOST_SCALE for each in scales):
                return f"with a scale that is not a number from {1 / _MOST_SCALE:g} to {_MOST_SCALE:g}"
    return None


# -- sizes -------------------------------------------------------------------------------------------------------------


def _sizes(arguments: Arguments, name: str) -> tuple[int | str, ...] | None:
    value = arguments.get(name)
    return value.sizes if isinstance(value, Held) else None


def _channels(arguments: Arguments) -> str | None:
    """A batch norm reads one number of each of its weights for each channel of the input."""
    sizes = _sizes(arguments, "input")
    if sizes is None or len(sizes) < 2:
        return "on an input whose channels are not known"
    for name in ("weight", "bias", "running_mean", "running_var"):
        if arguments.get(name) is not None and _sizes(arguments, name) != sizes[1:2]:
            return f"with {sizes[1]} channels and {name} of other sizes"
    return None


def _antialiased(arguments: Arguments) -> str | None:
    """Antialiased upsampling computes indices from its scales, and does not compare the scales with the sizes."""
    sizes, out = _sizes(arguments, "input") or _sizes(arguments, "self") or (), arguments.get("output_size")
    scales = [arguments.get("scales_h"), arguments.get("scales_w")]
    if scales == [None, None]:
        return None
    if len(sizes) != 4 or not isinstance(out, list) or len(out) != 2:
        return "with scales, on an input whose sizes are not known"
    # size * scale and the declared output size may differ by rounding, by less than 1.
    for size, wanted, scale in zip(sizes[2:], out, scales, strict=True):
        if scale is not None and (type(size) is not int or type(wanted) is not int or abs(size * scale - wanted) >= 1):
            return "with scales that do not fit the sizes"
    return None


def _transform(arguments: Arguments) -> str | None:
    """Fourier transforms trust their axes, and the size of the output that they compute from half a spectrum."""
    sizes, axes = _sizes(arguments, "self"), arguments.get("dim")
    if sizes is None or not isinstance(axes, list) or any(type(axis) is not int for axis in axes):
        return "on an input whose sizes are not known"
    if not axes or len(set(axes)) < len(axes) or not all(0 <= axis < len(sizes) for axis in axes):
        return "along axes that it does not have"
    # Half a spectrum of `size` numbers belongs to an output of at most 2 * size - 1.
    last, size = arguments.get("last_dim_size"), sizes[axes[-1]]
    if "last_dim_size" in arguments and (type(last) is not int or type(size) is not int or not 0 < last < 2 * size):
        return "to a size that does not fit"
    return None


def _weight_norm(arguments: Arguments) -> str | None:
    weight, norms, dim = _sizes(arguments, "v"), _sizes(arguments, "g"), arguments.get("dim", 0)
    if weight is None or norms is None or any(type(each) is not int or not each for each in weight):
        return "of a weight that is empty or whose sizes are not known"
    if type(dim) is not int or not 0 <= dim < len(weight):
        return f"along {dim}"
    # v of sizes (4, 3, 3) with dim 0 needs norms of sizes (4, 1, 1).
    one = tuple(size if place == dim else 1 for place, size in enumerate(weight))
    return None if norms == one else f"with norms of sizes {norms}"


def _lstm_sizes(arguments: Arguments, given: int, hidden: int, inside: int) -> list[tuple[int, ...]]:
    """Return the sizes of an LSTM's weights in order, for ``given`` inputs, ``hidden`` outputs, ``inside`` cells."""
    # For each layer and direction: (4 inside, inputs), (4 inside, hidden), two biases of 4 inside, and a projection
    # (hidden, inside) where the two differ; a layer after the first reads the outputs of both directions.
    both = 2 if arguments["bidirectional"] else 1
    found: list[tuple[int, ...]] = []
    for layer in range(arguments["num_layers"]):
        for _ in range(both):
            found += [(4 * inside, hidden * both if layer else given), (4 * inside, hidden)]
            found += [(4 * inside,)] * 2 if arguments["has_biases"] else []
            found += [(hidden, inside)] if hidden != inside else []
    return found


def _lstm(arguments: Arguments) -> str | None:
    """An LSTM reads its states and weights by the sizes of its input and of its first states."""
    given, lists = _sizes(arguments, "input"), [*(arguments.get("hx") or []), *(arguments.get("params") or [])]
    layers = arguments.get("num_layers")
    flags = [arguments.get(name) for name in ("has_biases", "bidirectional", "batch_first")]
    if type(layers) is not int or not 0 < layers < _MOST_LAYERS or any(type(each) is not bool for each in flags):
        return "with a number of layers or options that are not known"
    held = [each.sizes for each in lists if isinstance(each, Held)]
    if given is None or len(given) != 3 or len(held) != len(lists) or [len(each) for each in held[:2]] != [3, 3]:
        return "on an input, states or weights whose sizes are not known"
    # The states are (rows, batch, hidden) and (rows, batch, inside), with one row a layer and direction.
    batch, (hidden, inside, width) = given[0 if flags[2] else 1], (held[0][2], held[1][2], given[2])
    if type(hidden) is not int or type(inside) is not int or type(width) is not int:
        return "with states whose sizes are not known"
    rows = layers * (2 if flags[1] else 1)
    wanted = [(rows, batch, hidden), (rows, batch, inside), *_lstm_sizes(arguments, width, hidden, inside)]
    return None if held == wanted else "with states or weights of sizes that do not fit"


_ATEN = "torch.ops.aten."
_TRUNCATED = [f"{name}.{kind}_mode" for name in ("div", "divide", "div_") for kind in ("Tensor", "Scalar")]
_LITERAL: dict[str, Rule] = {
    f"{_ATEN}as_strided.default": _strided,
    f"{_ATEN}max_pool1d.default": _window,
    f"{_ATEN}max_pool1d_with_indices.default": _window,
    f"{_ATEN}pad.default": _replicated,
    **{f"{_ATEN}replication_pad{n}d.default": _padded for n in (1, 2, 3)},
    f"{_ATEN}_native_batch_norm_legit.no_stats": _in_training,
    f"{_ATEN}_native_batch_norm_legit_functional.default": _in_training,
    **dict.fromkeys((_ATEN + name for name in _TRUNCATED), _truncated),
}
BY_SIZES: dict[str, Rule] = {
    f"{_ATEN}_native_batch_norm_legit.no_stats": _channels,
    f"{_ATEN}_native_batch_norm_legit_functional.default": _channels,
    f"{_ATEN}_native_batch_norm_legit_no_training.default": _channels,
    f"{_ATEN}_weight_norm.default": _weight_norm,
    f"{_ATEN}_weight_norm_interface.default": _weight_norm,
    f"{_ATEN}lstm.input": _lstm,
    **{f"{_ATEN}_upsample_{kind}2d_aa.default": _antialiased for kind in ("bilinear", "bicubic")},
    **{f"{_ATEN}_fft_{kind}.default": _transform for kind in ("r2c", "c2r", "c2c")},
}


def _refuse(target: str, fault: str | None) -> None:
    if fault:
        raise UnsafeFileError(f"it calls {target[:80]!r} {fault}", allowed="arguments that the operator can take")


def check_call(target: str, arguments: Arguments) -> None:
    """Raise UnsafeFileError if an operator does not check its literal arguments, and they are not safe.

    Arguments are by name. Python's arithmetic has no names: there, any keys do, and the order counts.
    """
    if target in PLAIN_OPERATORS:
        _refuse(target, _arithmetic(target, list(arguments.values())))
    elif rule := _LITERAL.get(target):
        _refuse(target, rule(arguments))
    elif "upsample" in target:
        _refuse(target, _scaled(arguments))


def check_sizes(target: str, arguments: Arguments) -> None:
    """Raise UnsafeFileError if sizes of tensors do not fit together, and the operator does not check them."""
    if rule := BY_SIZES.get(target):
        _refuse(target, rule(arguments))


def _held(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_held(each) for each in value]
    return Held(tuple(value.shape)) if isinstance(value, torch.Tensor) else value


def _is_index(index: Any) -> bool:
    """Whether an index into a tensor consists of whole numbers, slices, None and dots only."""
    parts = index if isinstance(index, tuple) else (index,)
    bounds = [b for p in parts for b in ((p.start, p.stop, p.step) if isinstance(p, slice) else (p,))]
    return all(bound is None or bound is ... or type(bound) is int for bound in bounds)


def check_values(target: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Check a call whose values are all known, such as one of a recipe; raises UnsafeFileError."""
    if target not in PLAIN_OPERATORS:
        *_, namespace, name, overload = target.split(".")
        operator = getattr(getattr(getattr(torch.ops, namespace), name), overload)
        names = [each.name for each in operator._schema.arguments]
        named = {key: _held(each) for key, each in (dict(zip(names, args, strict=False)) | dict(kwargs)).items()}
        check_call(target, named)
        check_sizes(target, named)
        return
    values = [*args, *kwargs.values()]
    if target == "_operator.getitem" and args and isinstance(args[0], torch.Tensor):
        fits = len(values) == 2 and _is_index(values[1])
        _refuse(target, None if fits else "with an index that is not made of numbers and slices")
        return
    if any(isinstance(each, torch.Tensor) for each in values):
        numbers = all(isinstance(each, torch.Tensor | int | float) for each in values)
        fault = None if numbers else "with a value that is not a number"
    elif target == "_operator.getitem":
        fault = None if len(values) == 2 and type(values[1]) is int else "with an index that is not a whole number"
    else:
        long = any(type(each) is int and each.bit_length() > MOST_BITS_OUTSIDE for each in values)
        fault = "with long numbers" if long else _arithmetic(target, values)
    _refuse(target, fault)
