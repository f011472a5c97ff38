"""Which batch norm and which activation stand behind the calls of a site, as far as a runtime makes one with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import Node

from surgery.kinds.fx.view import Spot, View
from surgery.sites.epilogue import Activation, BatchNorm, Neighbour

__all__ = ["behind", "is_norm", "is_tracked_norm", "norm_buffers"]

aten = torch.ops.aten

# target -> places of the running mean and of the running variance among its arguments
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
_HARDTANH = (aten.hardtanh.default, aten.hardtanh_.default)  # what ReLU6 is exported as
_METHODS = {"relu": "Relu", "relu_": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}


def is_tracked_norm(module: nn.Module) -> bool:
    """Whether a module is a batch norm with running statistics."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None


def behind(view: View, spot: Spot) -> tuple[Neighbour, ...]:
    """Return a batch norm, an activation, or one after the other, if nothing else reads what a site's calls put out."""
    found = {tuple(_behind(view, call.node)) for call in spot.calls}
    return found.pop() if len(found) == 1 else ()


def _behind(view: View, node: Node) -> Iterable[Neighbour]:
    user = _only_user(node)
    if user is not None and is_norm(view, user):
        yield BatchNorm()
        user = _only_user(user)
    if user is not None and (kind := _activation(view, user)) is not None:
        yield Activation(kind)


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def is_norm(view: View, node: Node) -> bool:
    """Whether a node is a batch norm with running statistics, as a module or as a function."""
    if node.op == "call_module" and view.module is not None:
        return is_tracked_norm(view.module(str(node.target)))
    return norm_buffers(node) is not None


def norm_buffers(node: Node) -> tuple[Node, Node] | None:
    """Return the nodes of running mean and variance of a batch norm's call; None for any other node."""
    places = _BATCH_NORMS.get(node.target) if node.op == "call_function" else None
    if places is None:
        return None
    mean, variance = (
        node.args[place] if place < len(node.args) else node.kwargs.get(leaf)
        for place, leaf in zip(places, ("running_mean", "running_var"), strict=True)
    )
    return (mean, variance) if isinstance(mean, Node) and isinstance(variance, Node) else None


def _activation(view: View, node: Node) -> str | None:
    if node.op == "call_module" and view.module is not None:
        return _MODULES.get(type(view.module(str(node.target))))
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op == "call_function" and node.target in _HARDTANH:
        return "Clip" if tuple(node.args[1:]) == (0, 6) else None
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None
