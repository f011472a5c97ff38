"""Run an open graph node by node while observers see its values.

The graph runs as it is while it is open, so packed attention is unpacked. The calls in an outline are not run; hooks on
their modules take the place of these nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.kinds.fx.graph import OpenGraph
from surgery.kinds.fx.nodes import in_outline, norm_buffers
from surgery.kinds.fx.recurrence import Recurrence
from surgery.kinds.inputs import Inputs
from surgery.kinds.layers.modules import buffers_of, is_tracked_norm
from surgery.kinds.layers.untouched import evaluation
from surgery.kinds.observed import Hooks, Norm, Observed, OutputChange, See
from surgery.sites import Call

__all__ = ["ObservedGraph", "bind_graph", "leaves_of"]


class ObservedGraph(Observed):
    """An open graph that is interpreted.

    ``bind`` returns the values of placeholders for some inputs; ``buffer`` returns the buffer that a node provides.
    """

    def __init__(
        self,
        kind: OpenGraph,
        module: GraphModule,
        bind: Callable[[Inputs], Mapping[Node, Any]],
        buffer: Callable[[Node], tuple[str, Tensor]],
    ) -> None:
        super().__init__(lambda: kind.flow)
        self.graph, self.module = kind, module
        self._bind, self._buffer = bind, buffer
        self._watchers: dict[Node, list[tuple[Node, See]]] = defaultdict(list)
        self._taps: dict[Node, OutputChange] = {}
        self._hooks = Hooks(self._additions)

    def watch(self, call: Call, see: See) -> None:
        """Call ``see`` with the input of a call."""
        if in_outline(self.graph.node(call.value)):
            self._hooks.watch(str(call.path), see)
        else:
            self.watch_node(self.graph.node(call.values[0]), self.graph.node(call.source), see)

    def watch_node(self, node: Node, source: Node, see: See) -> None:
        """Call ``see`` with the value of ``source``, an input of ``node``, just before ``node`` runs."""

        def show(value: Tensor) -> None:
            with self._additions.paused():
                see(value)

        self._watchers[node].append((source, show))

    def tap(self, call: Call, change: OutputChange) -> None:
        """Replace the output of a call by what ``change`` returns."""
        node = self.graph.node(call.value)
        if in_outline(node):
            self._hooks.taps[str(call.path)] = change
        else:
            self._taps[node] = change

    def forget(self) -> None:
        """Remove all observers and taps."""
        self._watchers.clear()
        self._taps.clear()
        self._hooks, self._follows = Hooks(self._additions), False

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters of the graph's module; those of a program come as tensors that need no gradients."""
        return self.module.parameters()

    def norms(self) -> list[Norm]:
        """Return the batch norms that the graph calls, as modules or functions: one for each pair of buffers."""
        found: dict[str, Norm] = {}
        places: dict[str, list[Node]] = defaultdict(list)
        for node in self.module.graph.nodes:
            norm = self._norm(node, places)
            if norm is not None:
                places[norm.name].append(node)
                # a norm that is called twice has one pair of buffers, and all its inputs count
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
        taps: Mapping[Node, OutputChange],
        layers: Sequence[Recurrence],
    ) -> None:
        # the module of a layer runs when its first output is asked for, and needs inputs that the interpreter would
        # free
        super().__init__(module, garbage_collect_values=not layers)
        self._watchers, self._taps = watchers, taps
        self._layers = {node: layer for layer in layers for node in layer.inside}
        self._found: dict[str, tuple[Tensor, ...]] = {}

    def run_node(self, n: Node) -> Any:
        # nothing reads an outline, and its values would be wrong
        if in_outline(n):
            return None
        if n in self._layers:
            return self._of_layer(self._layers[n], n)
        for source, see in self._watchers.get(n, ()):
            see(self.env[source])
        value = super().run_node(n)
        return self._taps[n](value) if n in self._taps else value

    def _of_layer(self, layer: Recurrence, node: Node) -> Tensor | None:
        """Return the output of a recurrent layer that a node gives; the layer's module runs once for all outputs."""
        if node not in layer.outputs:
            return None
        if layer.path not in self._found:
            self._found[layer.path] = layer.run(self.env[layer.source], [self.env[state] for state in layer.states])
        return self._found[layer.path][layer.outputs.index(node)]


def bind_graph(graph: Graph, inputs: Inputs) -> dict[Node, Any]:
    """Return the inputs by placeholder: flattened if the graph was exported with a tree, else by position and name.

    Raises:
        InputError: a placeholder has neither a value nor a default, or there are inputs that no placeholder takes.
    """
    nodes = list(graph.find_nodes(op="placeholder"))
    if hasattr(graph._codegen, "pytree_info"):
        return dict(zip(nodes, leaves_of(inputs, graph._codegen.pytree_info.in_spec), strict=True))
    args, kwargs = list(inputs[0]), dict(inputs[1])
    values: dict[Node, Any] = {}
    for node in nodes:
        name = str(node.target)
        if name.startswith("*"):
            what = f"the graph takes any number of inputs as {name}"
            raise InputError(what, next_step="export the model with torch.export, which counts them")
        if args:
            values[node] = args.pop(0)
        elif name in kwargs:
            values[node] = kwargs.pop(name)
        elif node.args:
            values[node] = node.args[0]
        else:
            raise InputError(f"no value is given for the input {name}")
    if args or kwargs:
        what = f"{len(args)} more inputs than the graph takes" if args else f"an input {next(iter(kwargs))}"
        raise InputError(what, allowed=", ".join(str(node.target) for node in nodes))
    return values


def leaves_of(inputs: Inputs, spec: Any) -> list[Any]:
    """Return the inputs as a flat list; inputs by name come in the order of the specification."""
    args, kwargs = inputs
    order = spec.child(1).context or []
    if set(order) == set(kwargs):
        kwargs = {name: kwargs[name] for name in order}
    return pytree.tree_leaves((args, kwargs))
