"""The multiply-accumulates of places that are no sites, so that the totals are the whole model's.

Only products with weights count, as for sites: convolutions, linear layers, recurrent kernels. A product of two
activations, as in attention, is no layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from surgery.algebra.operators import Shape
from surgery.errors import SurgeryError
from surgery.kinds.fx.shapes import evaluation, untouched
from surgery.kinds.fx.unhandled import function_name
from surgery.kinds.fx.view import Call, View
from surgery.kinds.layers.modules import called_shape
from surgery.sites.site import Skip

__all__ = ["with_costs"]

_PRODUCTS = {"linear": 0, "matmul": 0, "mm": 0, "bmm": 0, "__matmul__": 0, "addmm": 1, "baddbmm": 1}  # first factor
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_COUNTED = ("convolution", "mm", "addmm", "_convolution")
ShapeOf = Callable[[Node], Shape]


def with_costs(skips: Sequence[Skip], view: View, shape: ShapeOf) -> list[Skip]:
    """Return the skips with the multiply-accumulates of their nodes, where they say none; each node counts once."""
    done: set[Node] = set()
    found = []
    for skip in skips:
        own = [node for node in view.skipped.get(skip.name, ()) if node not in done]
        done.update(own)
        macs = skip.macs or sum(_macs(node, view, shape) for node in own)
        found.append(replace(skip, macs=macs))
    return found


def _macs(node: Node, view: View, shape: ShapeOf) -> int:
    try:
        if node in view.given:
            return _of_call(view.given[node], view, shape)
        if node.op == "call_module" and view.module is not None:
            return _of_module(view.module(str(node.target)), [shape(n) for n in node.all_input_nodes])
        return _of_function(node, shape)
    except (SurgeryError, LookupError, TypeError, AttributeError):  # a node without a shape has no known cost
        return 0


def _of_call(call: Call, view: View, shape: ShapeOf) -> int:
    assert view.module is not None  # calls that are given are those of modules
    return call.operator.macs(called_shape(view.module(str(call.path)), shape(call.source)))


def _of_function(node: Node, shape: ShapeOf) -> int:
    name = function_name(node)
    args = [arg for arg in node.args if isinstance(arg, Node)]
    if "conv" in name:
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
    """Count what a module multiplies in one run on fake tensors."""
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
    except Exception:  # a module may need other inputs than these; its cost is not known then
        return 0
    counts = counter.get_flop_counts().get("Global", {})
    return sum(flops for op, flops in counts.items() if str(op).rpartition(".")[2] in _COUNTED) // 2
