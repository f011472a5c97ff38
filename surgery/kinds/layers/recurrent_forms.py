"""Convert recurrent modules between torch's own form and the unpacked form of ``recurrent``.

A recurrent module consists of its settings, which are JSON values, and its parameters. They are the same in both forms.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import nn

from surgery.algebra import Shape
from surgery.errors import InputError, Refusal
from surgery.kinds.layers.carried import carry, refuse_carrying
from surgery.kinds.layers.recurrent import UnpackedGRU, UnpackedLSTM, UnpackedRecurrent, UnpackedRNN
from surgery.sites import Loop

__all__ = ["empty", "is_part", "loop_of", "repack", "settings", "unpack"]

_KINDS: dict[str, type[nn.RNNBase]] = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}
_UNPACKED: dict[type[nn.RNNBase], type[UnpackedRecurrent]] = {
    nn.LSTM: UnpackedLSTM,
    nn.GRU: UnpackedGRU,
    nn.RNN: UnpackedRNN,
}
_SETTINGS = (
    "mode",
    "input_size",
    "hidden_size",
    "num_layers",
    "bias",
    "batch_first",
    "dropout",
    "bidirectional",
    "proj_size",
    "training",
)
_MOST_LAYERS = 1000


def unpack(module: nn.RNNBase) -> UnpackedRecurrent | Refusal:
    """Return a recurrent module with its weights as modules, or why it must stay as it is; the argument is not changed.

    Example:
        >>> [name for name, _ in unpack(nn.LSTM(3, 4, num_layers=2)).named_children()]
        ['ih_l0', 'hh_l0', 'ih_l1', 'hh_l1']
    """
    kind, parametrized = type(module), torch.nn.utils.parametrize.is_parametrized(module)
    if not parametrized and (kind not in _UNPACKED or "forward" in vars(module)):
        what = f"{kind.__name__} may compute something other than torch's own"
        return Refusal(f"{what}: it is a subclass or has its own forward")
    if parametrized or any(module._parameters.get(name) is None for name in module._flat_weights_names):
        return Refusal("its weights are computed from other parameters (weight norm or another parametrization)")
    reason = refuse_carrying(module)
    return _UNPACKED[kind](module) if reason is None else Refusal(reason)


def repack(module: UnpackedRecurrent) -> nn.RNNBase:
    """Return torch's own module with the same weights and biases, as the inverse of ``unpack``.

    The argument is not changed.

    Raises:
        InputError: a part is not a plain nn.Linear of the original shape without a bias.
    """
    new: Any = empty(settings(module))
    for name, parameter in list(new._parameters.items()):
        part = name.removeprefix("weight_")
        value = module._parameters[name] if part == name else _weight(module, part, tuple(parameter.shape))
        setattr(new, name, value)
    carry(new, module, own=[*new._parameters, *(name for name in module._modules if is_part(name))])
    return new


def settings(module: UnpackedRecurrent) -> dict[str, Any]:
    """Return all settings of a module, without its parameters, as JSON values."""
    return {name: getattr(module, name) for name in _SETTINGS}


def empty(wanted: Any) -> nn.RNNBase | None:
    """Return torch's own module with these settings, on the meta device; None if the settings are not valid."""
    # the settings may come from a file: torch's class gets them only if they have the right names and types
    given = dict(wanted) if isinstance(wanted, dict) else {}
    if set(given) != set(_SETTINGS) or not isinstance(given["mode"], str) or given["mode"] not in _KINDS:
        return None
    mode, training = given.pop("mode"), given.pop("training")
    if (
        not all(isinstance(value, int | float) for value in given.values())
        or not 0 < given["num_layers"] < _MOST_LAYERS
    ):
        return None
    if mode != "LSTM":
        del given["proj_size"]
    if mode.startswith("RNN"):
        given["nonlinearity"] = mode.removeprefix("RNN_").lower()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of dropout in a module with one layer
            return _KINDS[mode](**given, device="meta").train(bool(training))
    except (TypeError, ValueError, RuntimeError):
        return None


def is_part(name: str) -> bool:
    """Whether a name is that of a part of an unpacked recurrent module."""
    return re.fullmatch(r"(ih|hh|hr)_l\d+(_reverse)?", name) is not None


def loop_of(root: nn.Module, path: str | None) -> Loop | None:
    """Return the loop around the recurrent weight at a path, or around a factor of it; None for all other modules.

    It is None in layers with projections too, because ONNX's kernel has none.
    """
    words = (path or "").split(".")
    for at, word in enumerate(words):
        layer = root.get_submodule(".".join(words[:at]))
        if isinstance(layer, UnpackedRecurrent) and word.startswith("hh_") and not layer.proj_size:
            return Loop(layer.mode, layer.batch_first)
    return None


def _weight(module: UnpackedRecurrent, name: str, shape: Shape) -> nn.Parameter:
    part: Any = module._modules[name]
    if type(part) is not nn.Linear or part.bias is not None or tuple(part.weight.shape) != shape:
        raise InputError(
            f"{_KINDS[module.mode].__name__} cannot hold {name}, {type(part).__name__}({part.extra_repr()})",
            allowed=f"a plain nn.Linear with a weight {shape} and no bias",
            next_step="recompose it first",
        )
    weight: nn.Parameter = part.weight
    return weight
