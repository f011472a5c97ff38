"""Single nodes of an fx graph: what they are, why one is left alone, and small helpers for edits.

    lstm = call_module lstm(x)        ih_l0 = call_module lstm.ih_l0(x)    hh_l0 = call_module lstm.hh_l0(...)    ...

The outline exists only while a graph is open, so that the calls of the parts can be found and replaced. Nothing reads
its outputs, and it is never run for its numbers. Each node of it has a mark in its metadata, which a node that replaces
it gets too.

Reasons are given only for nodes that multiply by a matrix, and for nodes that cannot be looked into: regions with a
graph of their own, and functions that are neither torch's nor Python's. A table that is added to activations, such as a
position embedding, is not a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node

from surgery.kinds.fx.functional import transposed_source
from surgery.kinds.fx.trace import trace_outline
from surgery.kinds.layers.modules import is_tracked_norm
from surgery.sites import Activation, BatchNorm, BranchSum, Epilogue, Part

__all__ = [
    "add_outline",
    "added_bias",
    "biases_of",
    "drop_outline",
    "epilogue_of",
    "erase",
    "erase_unused",
    "first_node",
    "function_name",
    "in_outline",
    "is_norm",
    "is_region",
    "is_view",
    "last_place",
    "looked_through",
    "norm_buffers",
    "refuse_use",
    "through_transpose",
]

_SUMS = (torch.add, torch.ops.aten.add.Tensor)


def erase(graph: Graph, nodes: Sequence[Node], *, keep: Node) -> None:
    """Erase nodes from last to first, so that users go before their inputs; ``keep`` is not erased."""
    for node in reversed([node for node in nodes if node is not keep]):
        graph.erase_node(node)


def first_node(graph: Graph, nodes: Collection[Node]) -> Node:
    """Return the node among ``nodes`` that comes first in the graph."""
    return next(node for node in graph.nodes if node in nodes)


def erase_unused(graph: Graph, nodes: Sequence[Node]) -> None:
    """Erase the nodes among ``nodes`` (in graph order) that nothing uses any more; inputs of the graph stay."""
    for node in reversed(nodes):
        if not node.users and node.op != "placeholder":
            graph.erase_node(node)


def added_bias(node: Node) -> tuple[Node, Node] | None:
    """Return the addition after a chain that ends with a reshape, and the computed bias it adds; None if there is none.

    ``node`` is the last node of the chain.
    """
    users = list(node.users)
    if len(users) != 1 or users[0].target not in _SUMS or len(users[0].args) != 2 or users[0].kwargs:
        return None
    first, bias = users[0].args
    value = bias.meta.get("val") if isinstance(bias, Node) else None
    if first is not node or not isinstance(bias, Node) or (value is not None and value.dim() != 1):
        return None
    return users[0], bias


def through_transpose(user: Node, node: Node) -> list[Node]:
    """Return the users of ``user`` if it is a transpose of ``node``; otherwise ``user`` alone."""
    return list(user.users) if transposed_source(user) is node else [user]


def biases_of(part: Part) -> list[str]:
    """Return the names of all biases of a part."""
    biases = [call.bias for call in part.calls] if part.calls else [part.bias]
    return [bias for bias in biases if bias is not None]


def last_place(parts: Sequence[Part]) -> str:
    """Return the place of the last part's bias below its site, provided that the parts are all steps of the chain.

    The place is "2" for the third step, and "2.1.0" for the first call in the second row of a sum of branches there.
    """
    at, last = len(parts) - 1, parts[-1]
    return f"{at}.{len(last.rows) - 1}.{len(last.rows[-1]) - 1}" if isinstance(last, BranchSum) else str(at)


_MARK = "surgery_outline"


def add_outline(root: nn.Module, path: str, source: Any, before: Node) -> list[Node]:
    """Add the outline of the unpacked recurrent layer at ``path`` before a node, and return the new nodes.

    ``source`` is the node of the layer's input.
    """
    made: dict[Node, Any] = {}
    added = []
    with before.graph.inserting_before(before):
        for node in trace_outline(root.get_submodule(path)).nodes:
            if node.op == "placeholder":
                made[node] = source
            elif node.op != "output":
                made[node] = new = before.graph.node_copy(node, made.__getitem__)
                new.meta[_MARK] = True
                new.target = f"{path}.{node.target}" if node.op == "call_module" else node.target
                added.append(new)
    return added


def in_outline(node: Node) -> bool:
    """Whether a node belongs to an outline."""
    return _MARK in node.meta


def drop_outline(graph: Graph) -> None:
    """Remove all outlines from a graph."""
    for node in reversed(list(graph.nodes)):
        if in_outline(node):
            graph.erase_node(node)


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


_KERNEL = (
    "a kernel reads all weights of the recurrent layer; the layer is not taken apart if something else reads its "
    "weights too, or if it is the whole program"
)
_CELL = "a recurrent cell of a single step is not handled"
_BATCH = "a batch of weight matrices is not handled yet"
_PRODUCT = "it is multiplied, but not as the weight of a layer, which is not handled"
_SCAN = "a loop over the steps of a recurrent layer uses it; change the module that the program was exported from"

# name of a function or method -> why the weight matrices that it reads are not sites
_READ_BY: dict[str, str] = {
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _KERNEL),
    **dict.fromkeys(("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"), _CELL),
    **dict.fromkeys(("embedding_bag", "_embedding_bag"), "bags of embeddings are not handled"),
    **dict.fromkeys(("bilinear", "_trilinear"), "bilinear maps are not handled yet"),
    "einsum": "einsum on a weight is not handled yet",
    **dict.fromkeys(("bmm", "baddbmm", "addbmm", "_grouped_mm"), _BATCH),
    **dict.fromkeys(
        ("matmul", "mm", "addmm", "inner", "mv", "addmv", "tensordot", "kron", "linalg_multi_dot"), _PRODUCT
    ),
    "multi_head_attention_forward": "attention as one function is not handled; factor an exported program instead",
}

_FIRST = "factor the module before it is exported"

# name of an operator with a graph inside -> what that graph is, and what to do
_REGIONS: dict[str, tuple[str, str]] = {
    "wrap_with_autocast": ("an autocast region", "export without autocast"),
    "wrap_with_set_grad_enabled": ("a no_grad or enable_grad region", "export without the decorator or context"),
    "cond": ("a branch of cond", _FIRST),
    "map_impl": ("a map over slices", _FIRST),
    "while_loop": ("a while_loop", _FIRST),
    "associative_scan": ("an associative scan", _FIRST),
    "flex_attention": ("a function that is passed to flex attention", "compute what it reads outside of it"),
    "tag_activation_checkpoint": ("activation checkpointing", "export without checkpointing"),
    "wrap_activation_checkpoint": ("activation checkpointing", "export without checkpointing"),
    "invoke_subgraph": ("a nested compiled region", "export without nested_compile_region"),
}

# functions that return a view, a part or a copy of their one input
_TURNS = ("t", "transpose", "permute", "movedim", "adjoint", "mT", "numpy_T", "getattr")
_SHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand")
_PARTS = ("select", "slice", "narrow", "getitem", "__getitem__", "chunk", "split", "split_with_sizes", "unbind")
_COPIES = ("contiguous", "clone", "detach", "alias", "to", "_to_copy", "float", "half", "bfloat16", "double", "type")
_VIEWS = frozenset((*_TURNS, *_SHAPES, *_PARTS, *_COPIES))


def function_name(node: Node) -> str:
    """Return the plain name of the target of a node: ``linear`` for both ``aten.linear.default`` and ``F.linear``."""
    target: Any = node.target
    if isinstance(target, OpOverload):
        return target.overloadpacket.__name__
    return str(getattr(target, "__name__", target))


def is_region(node: Node) -> bool:
    """Whether a node runs a graph of its own: a branch, a loop, or the code under a context manager."""
    return isinstance(node.target, HigherOrderOperator)


def is_view(node: Node) -> bool:
    """Whether a node is a call of a function or method whose result is a view, a part or a copy of its input."""
    return node.op in ("call_function", "call_method") and function_name(node) in _VIEWS


def looked_through(node: Node) -> Node:
    """Return the node that a node is a view, a part or a copy of; for any other node, the node itself.

    >>> from torch.fx import symbolic_trace
    >>> graph = symbolic_trace(lambda x: x.t()[:2] + 1).graph
    >>> [looked_through(node).name for node in graph.nodes if node.op != "output"]
    ['x', 'x', 'x', 'add']
    """
    while is_view(node):
        sources = node.all_input_nodes
        if len(sources) != 1:
            break
        node = sources[0]
    return node


def refuse_use(node: Node) -> str | None:
    """Return why the weight matrices that a node reads are left alone; None for a node that is not a layer."""
    name = function_name(node)
    if node.op == "call_method":
        return _READ_BY.get(name)
    if node.op != "call_function":
        return None
    if is_region(node):
        return _refuse_region(name)
    return f"{name} uses it, which is not handled" if _is_foreign(node.target) else _READ_BY.get(name)


def _refuse_region(name: str) -> str:
    if name == "scan":
        return _SCAN
    where, what_to_do = _REGIONS.get(name, (f"the operator {name}", _FIRST))
    return f"it is used inside of {where}, which is not looked into; {what_to_do}"


def _is_foreign(target: Any) -> bool:
    """Whether a function is neither torch's nor Python's own."""
    if isinstance(target, OpOverload):
        return target.namespace not in ("aten", "prims", "prim")
    module = getattr(target, "__module__", None) or "torch"  # builtin methods of torch have none
    return module.partition(".")[0] not in ("torch", "builtins", "operator", "_operator", "math", "einops")
