"""Why a node that reads weight matrices is left alone, if it is not the call of an operator that can be factored.

Reasons are given only for nodes that multiply by a matrix, and for nodes that cannot be looked into: regions with a
graph of their own, and functions that are neither torch's nor Python's. A table that is added to activations, such as a
position embedding, is not a layer.
"""

from __future__ import annotations

from typing import Any

from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Node

__all__ = ["function_name", "is_region", "looked_through", "refuse_use"]

_KERNEL = (
    "a kernel reads all weights of the recurrent layer; the layer is not taken apart if something else reads its "
    "weights too, or if it is the whole program"
)
_CELL = "a recurrent cell of a single step is not handled"
_BATCH = "a batch of weight matrices is not handled yet"
_PRODUCT = "it is multiplied, but not as the weight of a layer, which is not handled"
_SCAN = "a loop over the steps of a recurrent layer uses it; change the module that the program was exported from"

# name of a function or method -> why the weight matrices that it reads are not sites
_FUNCTIONS: dict[str, str] = {
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


def looked_through(node: Node) -> Node:
    """Return the node that a node is a view, a part or a copy of; for any other node, the node itself.

    >>> from torch.fx import symbolic_trace
    >>> graph = symbolic_trace(lambda x: x.t()[:2] + 1).graph
    >>> [looked_through(node).name for node in graph.nodes if node.op != "output"]
    ['x', 'x', 'x', 'add']
    """
    while node.op in ("call_function", "call_method") and function_name(node) in _VIEWS:
        sources = node.all_input_nodes
        if len(sources) != 1:
            break
        node = sources[0]
    return node


def refuse_use(node: Node) -> str | None:
    """Return why the weight matrices that a node reads are left alone; None for a node that is not a layer."""
    name = function_name(node)
    if node.op == "call_method":
        return _FUNCTIONS.get(name)
    if node.op != "call_function":
        return None
    if is_region(node):
        return _refuse_region(name)
    return f"{name} uses it, which is not handled" if _is_foreign(node.target) else _FUNCTIONS.get(name)


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
