"""Operators that compute each number on its own: arithmetic, comparisons, activations, casts."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.kinds.onnx.ops.said import Op, Said
from surgery.kinds.onnx.tensors import torch_dtype

__all__ = ["POINTWISE"]


def _plain(function: Callable[..., Tensor]) -> Op:
    """Return the operator that is a function of its inputs alone."""
    return lambda said, *inputs: function(*inputs)


def _pair(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    """Return an operator of two inputs; before version 7 it says itself how to broadcast."""
    return lambda said, a, b: None if said.get("broadcast") or "axis" in said.attributes else function(a, b)


def _each(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    """Return an operator of any number of inputs."""
    return lambda said, *inputs: functools.reduce(function, inputs)


def _div(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def _mod(said: Said, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if said.get("fmod", 0) else torch.remainder(a, b)


def _pow(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype != b.dtype and b.numel() == 1 and a.dim() >= b.dim():
        return torch.pow(a, b.item()).to(a.dtype)
    return torch.pow(a, b).to(a.dtype)


def _mean(said: Said, *inputs: Tensor) -> Tensor:
    return functools.reduce(torch.add, inputs) / len(inputs)


def _is_inf(said: Said, x: Tensor) -> Tensor:
    found = torch.isposinf(x) if said.get("detect_positive", 1) else torch.zeros_like(x, dtype=torch.bool)
    return found | torch.isneginf(x) if said.get("detect_negative", 1) else found


def _prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


def _celu(said: Said, x: Tensor) -> Tensor:
    return F.celu(x, said.get("alpha", 1.0))


def _selu(said: Said, x: Tensor) -> Tensor:
    alpha, gamma = said.get("alpha", 1.6732632423543772), said.get("gamma", 1.0507009873554805)
    return gamma * F.elu(x, alpha)


def _hard_sigmoid(said: Said, x: Tensor) -> Tensor:
    return (x * said.get("alpha", 0.2) + said.get("beta", 0.5)).clamp(0, 1)


def _softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def _mish(x: Tensor) -> Tensor:
    return x * torch.tanh(_softplus(x))


def _gelu(said: Said, x: Tensor) -> Tensor:
    return F.gelu(x, approximate=said.get("approximate", "none"))


def _swish(said: Said, x: Tensor) -> Tensor:
    return x * torch.sigmoid(said.get("alpha", 1.0) * x)


def _thresholded(said: Said, x: Tensor) -> Tensor:
    return torch.where(x > said.get("alpha", 1.0), x, torch.zeros_like(x))


def _shrink(said: Said, x: Tensor) -> Tensor:
    lambd, bias = said.get("lambd", 0.5), said.get("bias", 0.0)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, torch.zeros_like(x)))


def _clip(said: Said, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    least: Any = said.get("min") if low is None else low
    most: Any = said.get("max") if high is None else high
    if isinstance(least, float) or isinstance(most, float):
        return torch.clamp(x, least, most)
    x = x if least is None else torch.maximum(x, least)
    return x if most is None else torch.minimum(x, most)


def _cast(said: Said, x: Tensor) -> Tensor | None:
    to = torch_dtype(said.get("to"))
    return None if to is None else _to(x, to)


def _to(x: Tensor, to: torch.dtype) -> Tensor:
    if x.is_floating_point() and to in (torch.uint8, torch.int8, torch.int16):  # they wrap, by way of a wider number
        return x.long().to(to)
    return x.to(to)


def _cast_like(said: Said, x: Tensor, like: Tensor) -> Tensor:
    return _to(x, like.dtype)


def _dropout(said: Said, x: Tensor, ratio: Tensor | None = None, training: Tensor | None = None) -> Any:
    if said.opset < 7 or (training is not None and bool(training)):
        return None
    return (x, torch.ones_like(x, dtype=torch.bool)) if said.outputs > 1 else x


def _shift(said: Said, a: Tensor, b: Tensor) -> Tensor | None:
    if a.dtype is torch.uint8:
        found = a.int() << b.int() if said.get("direction") == "LEFT" else a.int() >> b.int()
        return found.to(torch.uint8)
    return None


def _fast_gelu(said: Said, x: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def _quick_gelu(said: Said, x: Tensor) -> Tensor:
    return x * torch.sigmoid(said.get("alpha", 1.702) * x)


def _sigmoid_of_hard_swish(x: Tensor) -> Tensor:
    return x * (x / 6 + 0.5).clamp(0, 1)


POINTWISE: dict[str, Op] = {
    "Abs": _plain(torch.abs),
    "Acos": _plain(torch.acos),
    "Acosh": _plain(torch.acosh),
    "Add": _pair(torch.add),
    "And": _pair(torch.logical_and),
    "Asin": _plain(torch.asin),
    "Asinh": _plain(torch.asinh),
    "Atan": _plain(torch.atan),
    "Atanh": _plain(torch.atanh),
    "BitShift": _shift,
    "BitwiseAnd": _plain(torch.bitwise_and),
    "BitwiseNot": _plain(torch.bitwise_not),
    "BitwiseOr": _plain(torch.bitwise_or),
    "BitwiseXor": _plain(torch.bitwise_xor),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Ceil": _plain(torch.ceil),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": _plain(torch.cos),
    "Cosh": _plain(torch.cosh),
    "Div": _pair(_div),
    "Dropout": _dropout,
    "Elu": lambda said, x: F.elu(x, said.get("alpha", 1.0)),
    "Equal": _pair(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Floor": _plain(torch.floor),
    "Gelu": _gelu,
    "Greater": _pair(torch.gt),
    "GreaterOrEqual": _pair(torch.ge),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(_sigmoid_of_hard_swish),
    "Identity": _plain(lambda x: x),
    "IsInf": _is_inf,
    "IsNaN": _plain(torch.isnan),
    "LeakyRelu": lambda said, x: F.leaky_relu(x, said.get("alpha", 0.01)),
    "Less": _pair(torch.lt),
    "LessOrEqual": _pair(torch.le),
    "Log": _plain(torch.log),
    "Max": _each(torch.maximum),
    "Mean": _mean,
    "Min": _each(torch.minimum),
    "Mish": _plain(_mish),
    "Mod": _mod,
    "Mul": _pair(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _pair(torch.logical_or),
    "PRelu": _plain(_prelu),
    "Pow": _pair(_pow),
    "Reciprocal": _plain(torch.reciprocal),
    "Relu": _plain(torch.relu),
    "Round": _plain(torch.round),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Sinh": _plain(torch.sinh),
    "Softplus": _plain(_softplus),
    "Softsign": _plain(F.softsign),
    "Sqrt": _plain(torch.sqrt),
    "Sub": _pair(torch.sub),
    "Sum": _each(torch.add),
    "Swish": _swish,
    "Tan": _plain(torch.tan),
    "Tanh": _plain(torch.tanh),
    "ThresholdedRelu": _thresholded,
    "Where": _plain(torch.where),
    "Xor": _pair(torch.logical_xor),
    "com.microsoft.BiasGelu": _plain(lambda x, bias: F.gelu(x + bias)),
    "com.microsoft.FastGelu": _fast_gelu,
    "com.microsoft.Gelu": _plain(F.gelu),
    "com.microsoft.QuickGelu": _quick_gelu,
}
