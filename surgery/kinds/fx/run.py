"""Run a graph node by node while something watches its values.

Graphs run on the parameters that the open kind holds, with packed attention taken apart, and with hooks for what an
outline stands for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.kinds.fx.epilogues import norm_buffers
from surgery.kinds.fx.graph import OpenGraph
from surgery.kinds.fx.outline import in_outline
from surgery.kinds.fx.recurrence import Recurrence
from surgery.kinds.inputs import Inputs
from surgery.kinds.layers.modules import buffers_of, is_tracked_norm
from surgery.kinds.layers.untouched import evaluation
from surgery.kinds.observed import Change, Hooks, Norm, Observed, See
from surgery.sites.flow import Call

__all__ = ["ObservedGraph", "bind_graph", "leaves_of"]


class ObservedGraph(Observed):
    """An open graph that is interpreted; ``bind`` gives the values of placeholders, and ``buffer`` that of a node."""

    def __init__(
        self,
        kind: OpenGraph,
        module: GraphModule,
        bind: Callable[[Inputs], Mapping[Node, Any]],
        buffer: Callable[[Node], tuple[str, Tensor]],
    ) -> None:
        super().__init__(kind.flow)
        self.graph, self.module = kind, module
        self._bind, self._buffer = bind, buffer
        self._watchers: dict[Node, list[tuple[Node, See]]] = defaultdict(list)
        self._taps: dict[Node, Change] = {}
        self._hooks = Hooks(self._additions)

    def watch(self, call: Call, see: See) -> None:
        """Show the input of a call."""
        if in_outline(self.graph.node(call.value)):
            self._hooks.watch(str(call.path), see)
        else:
            self.watch_node(self.graph.node(call.values[0]), self.graph.node(call.source), see)

    def watch_node(self, node: Node, source: Node, see: See) -> None:
        """Show ``see`` the value of one of a node's inputs, just before the node runs."""

        def show(value: Tensor) -> None:
            with self._additions.paused():
                see(value)

        self._watchers[node].append((source, show))

    def tap(self, call: Call, change: Change) -> None:
        """Change the output of a call."""
        node = self.graph.node(call.value)
        if in_outline(node):
            self._hooks.taps[str(call.path)] = change
        else:
            self._taps[node] = change

    def forget(self) -> None:
        """Interpret the graph as it is."""
        self._watchers.clear()
        self._taps.clear()
        self._hooks, self._follows = Hooks(self._additions), False

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of the graph's module; a program's come as tensors without gradients."""
        return self.module.parameters()

    def norms(self) -> list[Norm]:
        """Return the batch norms that the graph calls as modules or as functions, one for each pair of buffers."""
        found: dict[str, Norm] = {}
        places: dict[str, list[Node]] = defaultdict(list)
        for node in self.module.graph.nodes:
            norm = self._norm(node, places)
            if norm is not None:
                places[norm.name].append(node)
                found.setdefault(norm.name, norm)
        return list(found.values())

    def _norm(self, node: Node, places: Mapping[str, list[Node]]) -> Norm | None:
        if node.op == "call_module" and is_tracked_norm(self.module.get_submodule(str(node.target))):
            name = str(node.target)
            mean, variance = buffers_of(self.module, name)
        elif (buffers := norm_buffers(node)) is not None:
            (first, mean), (_, variance) = map(self._buffer, buffers)
            name = first.removesuffix(".running_mean")
        else:
            return None
        return Norm(name, mean, variance, lambda see: self._watch_all(places[name], see))

    def _watch_all(self, nodes: Sequence[Node], see: See) -> None:
        for node in nodes:
            self.watch_node(node, node.all_input_nodes[0], see)

    def execute(self, inputs: Inputs) -> Any:
        """Interpret the graph."""
        with self._hooks.on(self.module), evaluation(self.module):
            interpreter = _Interpreter(self.module, self._watchers, self._taps, self.graph.recurrences)
            return interpreter.run(initial_env=dict(self._bind(inputs)), enable_io_processing=False)


class _Interpreter(Interpreter):
    def __init__(
        self,
        module: GraphModule,
        watchers: Mapping[Node, list[tuple[Node, See]]],
        taps: Mapping[Node, Change],
        layers: Sequence[Recurrence],
    ) -> None:
        super().__init__(module, garbage_collect_values=not layers)
        self._watchers, self._taps = watchers, taps
        self._layers = {node: layer for layer in layers for node in layer.inside}
        self._found: dict[str, tuple[Tensor, ...]] = {}

    def run_node(self, n: Node) -> Any:
        if in_outline(n):
            return None
        if n in self._layers:
            return self._of_layer(self._layers[n], n)
        for source, see in self._watchers.get(n, ()):
            see(self.env[source])
        value = super().run_node(n)
        return self._taps[n](value) if n in self._taps else value

    def _of_layer(self, layer: Recurrence, node: Node) -> Tensor | None:
        """Return what a node has of a recurrent layer's results, by its module, which may be watched."""
        if node not in layer.outputs:
            return None
        if layer.path not in self._found:
            self._found[layer.path] = layer.run(self.env[layer.source], [self.env[state] for state in layer.states])
        return self._found[layer.path][layer.outputs.index(node)]


def bind_graph(graph: Graph, inputs: Inputs) -> dict[Node, Any]:
    """Return the inputs by placeholder: flattened if the graph was exported with a tree, else by place and by name."""
    nodes = list(graph.find_nodes(op="placeholder"))
    if hasattr(graph._codegen, "pytree_info"):
        return dict(zip(nodes, leaves_of(inputs, graph._codegen.pytree_info.in_spec), strict=True))
    args, kwargs = inputs
    values = dict(zip(nodes, args, strict=False))
    for node in nodes[len(args) :]:
        if str(node.target) in kwargs:
            values[node] = kwargs[str(node.target)]
        elif node.args:
            values[node] = node.args[0]
        else:
            raise InputError(f"no value is given for the input {node.target}")
    return values


def leaves_of(inputs: Inputs, spec: Any) -> list[Any]:
    """Return the inputs as a flat list, those by name in the order of the specification."""
    args, kwargs = inputs
    order = spec.child(1).context or []
    if set(order) == set(kwargs):
        kwargs = {name: kwargs[name] for name in order}
    return pytree.tree_leaves((args, kwargs))
