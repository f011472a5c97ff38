"""Which nodes of a graph have to stay together, because one writes into memory that the others use.

A stage gets the values of other stages as they are when they are sent, perhaps as copies. So whoever reads memory
before it is written to for the last time has to be in the stage of the writer. What reads the result of the last
write is free. In this graph the first three nodes stay together, and ``e`` may be elsewhere:

    a = conv(x);  b = a.view(2);  c = relu_(a);  e = linear(c)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from surgery.kinds.fx.nodes import function_name, is_view

__all__ = ["Lookup", "kept_together", "operator_aliases", "operator_writes"]

Lookup = Callable[[Node], Iterable[Node]]
# composite operators that may give back their input itself, though their schemas do not say so
_MAYBE = frozenset(
    (
        *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "rrelu"),
        *("reshape_as", "view_as", "expand_as", "type_as", "ravel", "real", "getattr"),
        *("broadcast_to", "broadcast_tensors", "atleast_1d", "atleast_2d", "atleast_3d"),
    )
)
_COPIES = frozenset(("clone", "_to_copy"))
_STATISTICS = slice(3, 5)  # of batch norms: running mean and variance, which training changes


def kept_together(
    nodes: Sequence[Node], memory: Mapping[Node, Hashable], *, writes: Lookup, aliases: Lookup
) -> list[frozenset[int]]:
    """Return groups of nodes, by number, that have to stay together because of writes into memory that they share.

    ``memory`` has keys of what lies outside: parameters, buffers and constants; equal keys are one memory. ``writes``
    gives the arguments that a node writes to, and ``aliases`` those whose memory its result may share.
    """
    # Invariants: ``home`` leads from a value to the first value that may share its memory; ``last`` has the number of
    # the last node that writes to each home; ``final`` are the values made by or after that write, out of its result.
    home: dict[Any, Any] = {}

    def find(key: Any) -> Any:
        while key in home:
            key = home[key]
        return key

    def own(node: Node) -> Any:
        return find(memory.get(node, node))

    last: dict[Any, int] = {}
    for node in nodes:
        for other in aliases(node):
            if own(other) != own(node):
                home[own(node)] = own(other)
    for number, node in enumerate(nodes):
        for other in writes(node):
            last[own(other)] = number
    final: set[Node] = set()
    groups: dict[Any, set[int]] = {}
    for number, node in enumerate(nodes):
        for key in dict.fromkeys(map(own, (*node.all_input_nodes, node))):
            if key not in last:
                continue
            read = [other for other in node.all_input_nodes if own(other) == key]
            # In the example at the top a, b and c have the home of ``a``, whose last writer is ``relu_``. Its result c
            # is final, so that ``e``, which reads of this memory c alone, is free.
            free = number > last[key] and bool(read) and final.issuperset(read)
            if not free:
                groups.setdefault(key, set()).add(number)
            if (free or number == last[key]) and own(node) == key:
                final.add(node)
    return [frozenset(group) for group in groups.values() if len(group) > 1]


def _schema_arguments(node: Node) -> list[tuple[Any, Any]]:
    """Return the arguments of an operator with their values."""
    assert isinstance(node.target, OpOverload)
    found = []
    for at, argument in enumerate(node.target._schema.arguments):
        value = node.args[at] if at < len(node.args) else node.kwargs.get(argument.name)
        found.append((argument, value))
    return found


def _nodes_in(value: Any) -> list[Node]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Node)]


def operator_writes(node: Node) -> list[Node]:
    """Return the arguments that the operator of a node writes to."""
    if isinstance(node.target, HigherOrderOperator):
        return _region_writes(node)
    if not isinstance(node.target, OpOverload):
        return []
    rows = _schema_arguments(node)
    said = [v for argument, value in rows if _is_written(argument) for v in _nodes_in(value)]
    if function_name(node) in ("batch_norm", "native_batch_norm", "cudnn_batch_norm") and _trains(rows):
        said += [v for _, value in rows[_STATISTICS] for v in _nodes_in(value)]
    return said


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _trains(rows: Sequence[tuple[Any, Any]]) -> bool:
    return any(value is True for argument, value in rows if argument.name in ("training", "train"))


def _region_writes(node: Node) -> list[Node]:
    """Return all inputs of a region in which something is written to, else none."""
    bodies = [n for n in node.all_input_nodes if n.op == "get_attr"]
    owner = node.graph.owning_module
    for body in bodies:
        module = None if owner is None else getattr(owner, str(body.target), None)
        if isinstance(module, GraphModule) and any(operator_writes(inner) for inner in module.graph.nodes):
            return [n for n in node.all_input_nodes if n.op != "get_attr"]
    return []


def operator_aliases(node: Node) -> list[Node]:
    """Return the arguments whose memory the result of a node may share."""
    inputs = [n for n in node.all_input_nodes if n.op != "get_attr" or isinstance(node.target, OpOverload)]
    name = function_name(node)
    if isinstance(node.target, HigherOrderOperator) or (is_view(node) and name not in _COPIES) or name in _MAYBE:
        return inputs
    if not isinstance(node.target, OpOverload):
        return []
    return [v for argument, value in _schema_arguments(node) if argument.alias_info for v in _nodes_in(value)]
