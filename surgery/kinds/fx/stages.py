"""Cut a graph of modules and functions into stages that share its modules and parameters, and put them together again.

Nothing is copied: training the stages trains the whole. So each stage refers to the whole (in its ``meta``), and stages
are joined in the process in which they were cut.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.kinds.base import Cuttable, Piece, Pieces
from surgery.kinds.fx.cut import Facts, borders, check_stages, checks, copy_node, is_operation, make_network
from surgery.kinds.fx.flow import fake_values, macs_of
from surgery.kinds.fx.memory import kept_together, operator_aliases, operator_writes
from surgery.kinds.fx.nodes import function_name
from surgery.kinds.fx.read import Reader
from surgery.kinds.layers.tensors import key_of
from surgery.sites.network import Network

__all__ = ["CutGraph", "Origin", "graph_result", "origin_of", "run_stage", "take_numbers"]

_META = "surgery_whole"
_NUMBER = 8  # bytes of a number


@dataclass(frozen=True, eq=False)
class Origin:
    """What a stage is a part of: the model, its graph, and how the inputs of a call become those of the graph."""

    model: nn.Module
    graph: GraphModule
    bind: Callable[[tuple[Any, ...], dict[str, Any]], Sequence[Any]]


class CutGraph(Cuttable):
    """A graph that is open to be cut."""

    def __init__(self, origin: Origin, values: Sequence[Any]) -> None:
        self._origin, self._root = origin, origin.graph
        nodes = self._root.graph.nodes
        self._values = fake_values(self._root, tuple(values))
        self._inputs = [node for node in nodes if node.op == "placeholder"]
        self._operations = [node for node in nodes if is_operation(node)]
        self._outputs = _outputs(self._root)

    @property
    def network(self) -> Network:
        """The operations of the graph, in its order."""
        return self._made[0]

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        own = dict(self._root.named_parameters(remove_duplicate=False))
        named: dict[str, Tensor] = {**own, **dict(self._root.named_buffers(remove_duplicate=False))}
        for node in self._root.graph.find_nodes(op="get_attr"):
            value = _attribute(self._root, str(node.target))
            if isinstance(value, Tensor):
                named.setdefault(str(node.target), value)
        return named

    def _read(self, node: Node) -> list[str]:
        """Return the names of the parameters, buffers and constants that an operation reads."""
        names = [str(n.target) for n in node.all_input_nodes if n.op == "get_attr" and str(n.target) in self._tensors]
        if node.op == "call_module":
            names += [name for name in self._tensors if name.startswith(f"{node.target}.")]
        return names

    @cached_property
    def _made(self) -> tuple[Network, tuple[Node, ...]]:
        parameters = dict(self._root.named_parameters(remove_duplicate=False))
        reads = {node: str(node.target) for node in self._root.graph.find_nodes(op="get_attr")}
        providers = {node: name for node, name in reads.items() if name in parameters}
        others = frozenset(reads.keys() - providers.keys())
        reader = Reader(self._root.graph, parameters, providers, others, self._root.get_submodule)
        ends = dict.fromkeys(node for node in self._outputs if node.op == "get_attr")
        facts = Facts(
            self._read,
            lambda node: _size(self._values.get(node)),
            lambda node: macs_of(reader.numbers[node], node, reader, self._shape),
            {name: tensor.nbytes for name, tensor in self._tensors.items()},
            {name: key_of(tensor) for name, tensor in self._tensors.items()},
            lambda node: isinstance(self._values.get(node), Tensor | int),
            self._together(),
            {0: tuple(ends)} if ends else {},
            self._root.get_submodule,
        )
        return make_network(self._operations, self._inputs, self._outputs, facts)

    def _shape(self, node: Node) -> tuple[int, ...]:
        return tuple(int(size) for size in self._values[node].shape)

    def _together(self) -> list[frozenset[int]]:
        memory: dict[Node, Hashable] = {
            node: key_of(self._tensors[str(node.target)])
            for node in self._root.graph.find_nodes(op="get_attr")
            if str(node.target) in self._tensors
        }
        groups = kept_together(self._operations, memory, writes=self._writes, aliases=self._aliases)
        changed: dict[Any, set[int]] = {}
        for number, node in enumerate(self._operations):
            if node.op == "call_module" and (module := self._root.get_submodule(str(node.target))).training:
                for buffer in module.buffers():
                    changed.setdefault(key_of(buffer), set()).add(number)
        return [
            *groups,
            *map(frozenset, changed.values()),
            *map(frozenset, (*checks(self._operations), *self._unpacked())),
        ]

    def _unpacked(self) -> Iterator[set[int]]:
        """Yield what is computed of inputs that are no tensors, such as an item of a dict, with its first reader.

        An export has no such operations, so that they make no stage.
        """
        numbers = {node: number for number, node in enumerate(self._operations)}
        plain = {node for node in self._inputs if not isinstance(self._values.get(node), Tensor)}
        for number, node in enumerate(self._operations):
            if node.all_input_nodes and plain.issuperset(node.all_input_nodes):
                plain.add(node)
                yield {number, *[numbers[user] for user in node.users if user in numbers][:1]}

    def _writes(self, node: Node) -> list[Node]:
        """Return the inputs that a node may write to."""
        if node.op == "call_module":
            modules = self._root.get_submodule(str(node.target)).modules()
            return list(node.all_input_nodes) if any(getattr(module, "inplace", False) for module in modules) else []
        name = function_name(node)
        inplace = (name.endswith("_") and not name.endswith("__")) or name in _INPLACE
        if inplace or node.kwargs.get("inplace") is True or "out" in node.kwargs:
            return list(node.all_input_nodes)
        if name == "batch_norm" and node.kwargs.get("training") is True:
            return [other for other in node.all_input_nodes if other.op == "get_attr"]
        return operator_writes(node)

    def _aliases(self, node: Node) -> list[Node]:
        """Return the inputs whose memory the result of a node may share."""
        if node.op != "call_module":
            return operator_aliases(node) or self._writes(node)
        plain = isinstance(self._root.get_submodule(str(node.target)), _SAME)
        return list(node.all_input_nodes) if plain or self._writes(node) else []

    def cut(self, stage_of: Sequence[int]) -> Pieces:
        """Return the stages, given the number of the stage of each operation.

        Raises:
            InputError: these are no stages of this graph.
        """
        network, nodes = self._made
        check_stages(network, stage_of)
        idle = [at for at in network.inputs if at not in network.readers]
        made = []
        for number, border in enumerate(borders(network, stage_of, idle)):
            taken, given = [nodes[at] for at in border.inputs], [nodes[at] for at in border.outputs]
            operations = [n for n, at in zip(self._operations, stage_of, strict=True) if at == number]
            model = self._stage(operations, taken, given)
            made.append(Piece(model, tuple(n.name for n in taken), tuple(n.name for n in given)))
        inputs, outputs = (tuple(n.name for n in row) for row in (self._inputs, self._outputs))
        return Pieces(tuple(made), inputs, outputs, {})

    def _stage(self, operations: Sequence[Node], taken: Sequence[Node], given: Sequence[Node]) -> GraphModule:
        graph = Graph()
        made: dict[Node, Node] = {}
        for node in taken:
            made[node] = graph.placeholder(node.name)
            made[node].name = node.name
            made[node].meta = {key: value for key, value in node.meta.items() if key in ("val", "tensor_meta")}
        for node in (*operations, *given):
            for other in (*node.all_input_nodes, node):
                if other.op == "get_attr" and other not in made:
                    made[other] = copy_node(graph, other, made.__getitem__)
            if node not in made:
                made[node] = copy_node(graph, node, made.__getitem__)
        graph.output(tuple(made[node] for node in given))
        stage = GraphModule(self._root, graph)
        stage.meta[_META] = self._origin
        return stage


_INPLACE = frozenset(f"i{name}" for name in ("add", "sub", "mul", "truediv", "and", "or", "xor")) | {"setitem"}
_SAME = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.Dropout3d, nn.Flatten, nn.Unflatten)


def _attribute(root: nn.Module, path: str) -> Any:
    owner, _, leaf = path.rpartition(".")
    return getattr(root.get_submodule(owner), leaf, None)


def _size(value: Any) -> int:
    leaves = pytree.tree_leaves(value)
    return sum(x.numel() * x.element_size() if isinstance(x, Tensor) else _NUMBER for x in leaves)


def _outputs(root: GraphModule) -> list[Node]:
    found: list[Node] = []
    map_arg(_output(root).args[0], found.append)
    return found


def _output(root: GraphModule) -> Node:
    return next(iter(root.graph.find_nodes(op="output")))


def origin_of(pieces: Pieces) -> Origin:
    """Return what all pieces are stages of.

    Raises:
        InputError: they are not stages that were cut in this process.
    """
    found = [getattr(piece.model, "meta", {}).get(_META) for piece in pieces.stages]
    if not found or not isinstance(found[0], Origin) or any(each is not found[0] for each in found):
        what = "the stages of a module do not belong to one module in memory"
        raise InputError(what, allowed="stages that were cut in this process", next_step="split the model again")
    return found[0]


def take_numbers(origin: Origin, pieces: Pieces) -> None:
    """Copy the numbers of the stages to the whole, where a stage has got other tensors since it was cut."""
    own: dict[str, Tensor] = dict(origin.model.named_parameters(remove_duplicate=False))
    own |= dict(origin.model.named_buffers(remove_duplicate=False))
    for piece in pieces.stages:
        for name, tensor in piece.model.state_dict(keep_vars=True).items():
            if name in own and own[name] is not tensor:
                _take(own[name], tensor, name)


@torch.no_grad()
def _take(own: Tensor, given: Tensor, name: str) -> None:
    if own.shape != given.shape:
        what = f"{name} has the shape {tuple(given.shape)} in a stage"
        raise InputError(what, allowed=f"{tuple(own.shape)}, as in the whole model")
    if own.data_ptr() != given.data_ptr():
        own.copy_(given)


def graph_result(origin: Origin, leaves: Sequence[Any]) -> Any:
    """Return what the whole graph returns, made of its outputs."""
    given: Iterator[Any] = iter(leaves)
    found = map_arg(_output(origin.graph).args[0], lambda node: next(given))
    codegen: Any = origin.graph.graph._codegen
    return codegen.process_outputs(_plain(found))


def _plain(value: Any) -> Any:
    """Return lists and dicts that may be changed, as the model's own are, in the place of those of a graph."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return tuple(map(_plain, value)) if type(value) is tuple else value


def run_stage(stage: GraphModule, values: Sequence[Any]) -> tuple[Any, ...]:
    """Run a stage on its inputs, in order, without GraphModule's own call, which prints a traceback beside an error."""
    found: tuple[Any, ...] = nn.Module.__call__(stage, *values)
    return found
