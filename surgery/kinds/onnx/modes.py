"""Which recurrent nodes compute what torch's layers compute, and the order of their gates.

torch   LSTM i f g o    GRU r z n        ONNX   LSTM i o f c    GRU z r h
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from torch import Tensor

from surgery.errors import Refusal

__all__ = ["GATES", "OP_TYPES", "attributes_of_mode", "is_backwards", "mode_of", "to_onnx", "to_torch_order"]

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
OP_TYPES = {"LSTM": "LSTM", "GRU": "GRU", "RNN_TANH": "RNN", "RNN_RELU": "RNN"}
_USUAL = {"LSTM": ["sigmoid", "tanh", "tanh"], "GRU": ["sigmoid", "tanh"], "RNN": ["tanh"]}
_ORDER: dict[str, Sequence[int]] = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2)}  # of torch's gates among ONNX's
_LENGTHS, _PEEPHOLES = 4, 7  # the inputs


def mode_of(node: ir.Node) -> str | Refusal:
    """Return the mode of torch's layer that computes what a recurrent node of one direction computes."""
    said = {name: attribute.value for name, attribute in node.attributes.items()}
    given = [value is not None and value.name != "" for value in node.inputs]
    functions = [str(each).lower() for each in said.get("activations") or _USUAL[node.op_type]]
    if said.get("direction", "forward") == "bidirectional" or said.get("layout", 0):
        return Refusal("has both directions or the batch first")
    if node.op_type == "GRU" and not said.get("linear_before_reset", 0):
        return Refusal("multiplies by it behind the reset gate")
    if said.get("clip", 0) or said.get("input_forget", 0) or {"activation_alpha", "activation_beta"} & said.keys():
        return Refusal("clips, ties its gates, or has activations of its own")
    if any(given[_LENGTHS : _LENGTHS + 1]) or any(given[_PEEPHOLES:]):
        return Refusal("has peepholes, or a length for each sequence")
    if functions == _USUAL[node.op_type]:
        return "RNN_TANH" if node.op_type == "RNN" else node.op_type
    if node.op_type == "RNN" and functions == ["relu"]:
        return "RNN_RELU"
    return Refusal("has other activations than torch")


def is_backwards(node: ir.Node) -> bool:
    """Whether a recurrent node of one direction starts with the last step."""
    way = node.attributes.get("direction")
    return way is not None and way.value == "reverse"


def attributes_of_mode(mode: str, hidden: int, *, backwards: bool) -> Mapping[str, Any]:
    """Return the attributes of a node for a mode of torch's layer."""
    found: dict[str, Any] = {"hidden_size": hidden, "direction": "reverse" if backwards else "forward"}
    found |= {"linear_before_reset": 1} if mode == "GRU" else {}
    return found | ({"activations": ["Relu"]} if mode == "RNN_RELU" else {})


def to_torch_order(mode: str, numbers: Tensor) -> Tensor:
    """Return rows of gates in the order of ONNX in that of torch."""
    return _ordered(numbers, GATES[mode], _ORDER.get(mode, (0,)))


def to_onnx(mode: str, numbers: Tensor) -> Tensor:
    """Return rows of gates in the order of torch in that of ONNX.

    >>> import torch
    >>> to_onnx("LSTM", torch.arange(4)).tolist(), to_torch_order("LSTM", torch.tensor([0, 3, 1, 2])).tolist()
    ([0, 3, 1, 2], [0, 1, 2, 3])
    """
    order = _ORDER.get(mode, (0,))
    return _ordered(numbers, GATES[mode], [order.index(gate) for gate in range(len(order))])


def _ordered(numbers: Tensor, gates: int, order: Sequence[int]) -> Tensor:
    return numbers.unflatten(0, (gates, -1))[list(order)].flatten(0, 1)
