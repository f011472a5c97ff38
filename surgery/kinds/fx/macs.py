"""The multiply-accumulates of nodes that are not sites, so that the totals cover the whole model.

As for sites, only products with weights count: convolutions, linear layers, recurrent kernels. A product of two
activations, as in attention, does not count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from surgery.algebra.operators import Shape
from surgery.errors import SurgeryError
from surgery.kinds.fx.read import Reader
from surgery.kinds.fx.unhandled import function_name
from surgery.kinds.layers.modules import called_shape
from surgery.kinds.layers.untouched import evaluation, untouched
from surgery.sites.flow import Call

__all__ = ["macs_of"]

# name of a product -> which of its tensors is the first factor
_PRODUCTS = {"linear": 0, "matmul": 0, "mm": 0, "bmm": 0, "__matmul__": 0, "addmm": 1, "baddbmm": 1}
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_COUNTED = ("convolution", "mm", "addmm", "_convolution")
ShapeOf = Callable[[Node], Shape]


def macs_of(value: int, node: Node, reader: Reader, shape: ShapeOf) -> int:
    """Return the multiply-accumulates of the node that gives a value; 0 if they are not known."""
    try:
        if value in reader.given_calls:
            return _of_call(reader.given_calls[value], reader, shape)
        if node.op == "call_module" and reader.module is not None:
            return _of_module(reader.module(str(node.target)), [shape(n) for n in node.all_input_nodes])
        return _of_function(node, shape)
    except (SurgeryError, LookupError, TypeError, AttributeError):  # a node without a shape has no known cost
        return 0


def _of_call(call: Call, reader: Reader, shape: ShapeOf) -> int:
    assert reader.module is not None  # the call is that of a module
    return call.operator.macs(called_shape(reader.module(str(call.path)), shape(reader.node(call.source))))


def _of_function(node: Node, shape: ShapeOf) -> int:
    name = function_name(node)
    args = [arg for arg in node.args if isinstance(arg, Node)]
    if "conv" in name:
        # each sample and position of the output (of the input, if transposed) uses each number of the weight once
        source, weight = (shape(arg) for arg in args[:2])
        turned = "transpose" in name or (name == "convolution" and node.args[6] is True)
        place, channels = (source, weight[0]) if turned else (shape(node), weight[0])
        return math.prod(place) // channels * math.prod(weight)
    if name in _PRODUCTS:
        return math.prod(shape(node)) * shape(args[_PRODUCTS[name]])[-1]
    if name in _RECURRENT:
        rows = node.args[2]
        weights = [shape(n) for n in (rows if isinstance(rows, Sequence) else ()) if isinstance(n, Node)]
        return math.prod(shape(args[0])[:-1]) * sum(math.prod(w) for w in weights if len(w) > 1)
    return 0


def _of_module(module: nn.Module, shapes: Sequence[Shape]) -> int:
    """Count the multiply-accumulates of a module in one run on fake tensors."""
    if isinstance(module, nn.RNNBase):
        return math.prod(shapes[0][:-1]) * sum(p.numel() for p in module.parameters() if p.dim() > 1)
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is None or isinstance(module, nn.Embedding | nn.EmbeddingBag) or any(map(is_lazy, module.parameters())):
        return 0
    counter: Any = FlopCounterMode(display=False)
    try:
        with (
            untouched(module),
            torch.no_grad(),
            evaluation(module),
            FakeTensorMode(allow_non_fake_inputs=True),
            counter,
        ):
            module(*(torch.empty(shape, dtype=like.dtype, device=like.device) for shape in shapes))
    except Exception:  # a module may need other inputs than these; then its cost is not known
        return 0
    counts = counter.get_flop_counts().get("Global", {})
    return sum(flops for op, flops in counts.items() if str(op).rpartition(".")[2] in _COUNTED) // 2
