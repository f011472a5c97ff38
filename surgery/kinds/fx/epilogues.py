"""Nodes that a runtime computes in one kernel with the operator before them: batch norms and activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from surgery.kinds.layers.modules import is_tracked_norm
from surgery.sites.epilogue import Activation, BatchNorm, Epilogue

__all__ = ["epilogue_of", "is_norm", "norm_buffers"]

aten = torch.ops.aten

# target -> positions of the running mean and of the running variance among its arguments
_BATCH_NORMS: dict[Any, tuple[int, int]] = {
    F.batch_norm: (1, 2),
    torch.batch_norm: (3, 4),
    aten.batch_norm.default: (3, 4),
    aten.native_batch_norm.default: (3, 4),
    aten._native_batch_norm_legit_no_training.default: (3, 4),
}

_MODULES: dict[type[nn.Module], str] = {nn.ReLU: "Relu", nn.ReLU6: "Clip", nn.Sigmoid: "Sigmoid", nn.Tanh: "Tanh"}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, aten.relu.default, aten.relu_.default), "Relu"),
    **dict.fromkeys((F.relu6, aten.relu6.default), "Clip"),
    **dict.fromkeys((torch.sigmoid, F.sigmoid, aten.sigmoid.default, aten.sigmoid_.default), "Sigmoid"),
    **dict.fromkeys((torch.tanh, F.tanh, aten.tanh.default, aten.tanh_.default), "Tanh"),
}
# torch.export writes ReLU6 as a hardtanh between 0 and 6
_HARDTANH = (aten.hardtanh.default, aten.hardtanh_.default)  # what ReLU6 is exported as
_METHODS = {"relu": "Relu", "relu_": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def epilogue_of(node: Node, module: Callable[[str], nn.Module] | None) -> Epilogue | None:
    """Return the epilogue that a node is for the operator before it: a batch norm or an activation; else None."""
    if is_norm(node, module):
        return BatchNorm()
    kind = _activation(node, module)
    return None if kind is None else Activation(kind)


def is_norm(node: Node, module: Callable[[str], nn.Module] | None) -> bool:
    """Whether a node is a batch norm with running statistics, as a module or as a function."""
    if node.op == "call_module" and module is not None:
        return is_tracked_norm(module(str(node.target)))
    return norm_buffers(node) is not None


def norm_buffers(node: Node) -> tuple[Node, Node] | None:
    """Return the nodes of the running mean and variance of a batch norm's function call; None for any other node."""
    places = _BATCH_NORMS.get(node.target) if node.op == "call_function" else None
    if places is None:
        return None
    mean, variance = (
        node.args[place] if place < len(node.args) else node.kwargs.get(leaf)
        for place, leaf in zip(places, ("running_mean", "running_var"), strict=True)
    )
    return (mean, variance) if isinstance(mean, Node) and isinstance(variance, Node) else None


def _activation(node: Node, module: Callable[[str], nn.Module] | None) -> str | None:
    if node.op == "call_module" and module is not None:
        return _MODULES.get(type(module(str(node.target))))
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op == "call_function" and node.target in _HARDTANH:
        return "Clip" if tuple(node.args[1:]) == (0, 6) else None
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None
