"""Recurrent layers in graphs: read as modules when a graph is opened, and written again where they changed.

    out, h, c = aten.lstm.input(x, [h0, c0], weights, ...)    the call of a kernel; or, if the recurrent weight is
                                                              factored, the nodes of UnpackedRecurrent's own export:
                                                              linear layers and a scan

Both are a ``Recurrence``: a module with the graph's own parameters, and the nodes that compute the module's outputs.
While the graph is open, it has the module's outline in addition to these nodes. The nodes stay as they are unless a
part of the module was replaced. Then they are replaced by the kernel's call, if all weights are whole, or by the
module's own export.

The record says where a factored layer is. It counts only if the graph has each node of the layer's own export.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Graph, GraphModule, Node

from surgery.algebra import Flatten, Transpose, Unflatten
from surgery.errors import InputError, Refusal
from surgery.kinds.layers.factored import Factored
from surgery.kinds.layers.recurrent import UnpackedRecurrent
from surgery.kinds.layers.recurrent_forms import empty, repack, settings, unpack
from surgery.kinds.layers.steps import build_link, read_link_module
from surgery.kinds.layers.tensors import key_of
from surgery.sites import Origin, Record

__all__ = [
    "Recurrence",
    "describe",
    "export_layer",
    "is_kernel",
    "kernel_values",
    "read_factored",
    "read_kernels",
    "write_kernel",
]

aten = torch.ops.aten

_MODES = {
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.rnn_tanh.input: "RNN_TANH",
    aten.rnn_relu.input: "RNN_RELU",
}
_KERNELS = {mode: target for target, mode in _MODES.items()}
_GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}
_Names = Mapping[str, Tensor]


@dataclass(eq=False)
class Recurrence:
    """A recurrent layer in a graph: its module, its input and initial states, and the nodes that compute it.

    ``outputs`` are the nodes of the hidden states of all steps and of the last states, or None if the graph does not
    use that output. ``inside`` are all nodes that compute the layer, in order. ``names`` are the names that its
    parameters had when the graph was opened. ``parts`` are the submodules at that time.
    """

    path: str
    module: UnpackedRecurrent
    source: Node
    states: tuple[Node, ...]
    outputs: tuple[Node | None, ...]
    inside: tuple[Node, ...]
    names: frozenset[str]
    parts: dict[str, nn.Module] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = dict(self.module.named_children())

    @property
    def changed(self) -> bool:
        """Whether a part of the module was replaced."""
        return dict(self.module.named_children()) != self.parts

    def moved(self, old: Node, new: Node) -> None:
        """Note that a node has replaced another."""
        self.source = new if self.source is old else self.source
        self.states = tuple(new if state is old else state for state in self.states)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the module, by their names in the graph."""
        return dict(self.module.named_parameters(prefix=self.path, remove_duplicate=False))

    def run(self, x: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the values of ``outputs``, computed by the module."""
        out, last = self.module(x, tuple(states) if self.module.mode == "LSTM" else states[0])
        return (out, *last) if isinstance(last, tuple) else (out, last)


def read_kernels(graph: Graph, providers: Mapping[Node, str], parameters: _Names) -> Iterator[Recurrence]:
    """Yield the recurrent layers that are the call of a kernel and whose weights nothing else reads."""
    for node in graph.nodes:
        if node.op == "call_function" and is_kernel(node) and len(node.args) == 9:
            found = _read_kernel(node, providers, parameters)
            if found is not None:
                yield found


def _read_kernel(node: Node, providers: Mapping[Node, str], parameters: _Names) -> Recurrence | None:
    # The arguments tell all settings of torch's module but its sizes, which follow from the first two weights. The
    # module counts only if its parameters have just the names of the kernel's, and if nothing else reads these.
    args: Any = node.args
    x, states, rows, bias, layers, dropout, training, both, batch_first = args
    names = [providers.get(row, "") for row in rows]
    path = names[0].rpartition(".")[0]
    states = tuple(states) if isinstance(states, list | tuple) else (states,)
    target: Any = node.target
    mode = _MODES[target]
    # W is (G H, I) and R is (G H, H), or (G H, P) with a projection. Example of an LSTM from 3
    # to 4: W (16, 3), R (16, 4).
    size, columns = parameters[names[0]].shape if names[0] else (0, 0)
    out = parameters[names[1]].shape[1] if names[1] else 0
    hidden = size // _GATES[mode]
    wanted = {"mode": mode, "input_size": columns, "hidden_size": hidden, "num_layers": layers, "bias": bias}
    wanted |= {"batch_first": batch_first, "dropout": dropout, "bidirectional": both}
    wanted |= {"proj_size": out if out != hidden else 0, "training": training}
    layer = empty(wanted) if path else None
    if layer is None or [f"{path}.{name}" for name in layer._flat_weights_names] != names:
        return None
    if any(set(row.users) != {node} for row in rows) or len({key_of(parameters[n]) for n in names}) < len(names):
        return None
    for name in layer._flat_weights_names:
        layer.register_parameter(name, parameters[f"{path}.{name}"])  # type: ignore[arg-type]
    module = unpack(layer.train(bool(training)))
    # the kernel returns a tuple; each output that the graph uses has one getitem node
    gets: dict[Any, Node] = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if isinstance(module, Refusal) or len(gets) != len(node.users):
        return None
    outputs = tuple(gets.get(i) for i in range(1 + len(states)))
    return Recurrence(path, module, x, states, outputs, (node, *gets.values()), frozenset(names))


def read_factored(
    graph: Graph,
    root: nn.Module,
    nodes: Mapping[str, Node],
    parameters: _Names,
    record: Record,
) -> Iterator[Recurrence]:
    """Yield the factored layers of a record that the graph has as they were written.

    ``nodes`` are the nodes that provide the parameters, by name.
    """
    for path, entry in record.layers.items():
        module = _rebuild(path, entry, parameters, record.origins)
        if module is not None:
            found = _match(path, module, graph, root, nodes)
            if found is not None:
                yield found


def describe(module: UnpackedRecurrent) -> dict[str, Any]:
    """Return the record of a layer as JSON values: its settings, and the steps of each part that is a chain."""
    chains = {name: part.steps for name, part in module.named_children() if isinstance(part, Factored)}
    return {"recurrent": settings(module), "parts": {name: list(map(_row, steps)) for name, steps in chains.items()}}


def _row(step: nn.Module) -> list[Any]:
    if isinstance(step, nn.Linear):
        return ["Linear", step.in_features, step.out_features]
    link: Any = read_link_module(step)
    if isinstance(link, Unflatten):
        return ["Unflatten", link.dim, *link.sizes]
    return ["Flatten", link.start, link.end] if isinstance(link, Flatten) else ["Transpose", link.first, link.second]


_STEPS: dict[str, Callable[..., nn.Module]] = {
    "Linear": lambda columns, rows: nn.Linear(columns, rows, bias=False, device="meta"),
    "Unflatten": lambda dim, *sizes: build_link(Unflatten(dim, sizes)),
    "Flatten": lambda start, end: build_link(Flatten(start, end)),
    "Transpose": lambda first, second: build_link(Transpose(first, second)),
}


def _rebuild(path: str, entry: Any, parameters: _Names, origins: Mapping[str, Origin]) -> UnpackedRecurrent | None:
    """Return the layer that an entry of a record describes, with the graph's parameters; None if they do not fit."""
    layer = empty(entry.get("recurrent")) if isinstance(entry, dict) else None
    parts = entry.get("parts") if isinstance(entry, dict) else None
    if layer is None or not isinstance(parts, dict):
        return None
    module = unpack(layer)
    assert isinstance(module, UnpackedRecurrent)  # it is torch's own
    for name, part in list(module.named_children()):
        if name in parts:
            steps = _read_rows(parts[name])
            if steps is None:
                return None
            factored = Factored(steps, kind=nn.Linear, origin=origins.get(f"{path}.{name}"))
            module.add_module(name, factored.train(part.training))
    for name, own in list(module.named_parameters()):
        known = parameters.get(f"{path}.{name}")
        if known is None or known.shape != own.shape:
            return None
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent).register_parameter(leaf, known)  # type: ignore[arg-type]
    return module


def _read_rows(rows: Any) -> list[nn.Module] | None:
    """Return the modules that the rows of a record describe, without numbers; None if a row does not describe one."""
    try:
        return [_STEPS[kind](*map(operator.index, sizes)) for kind, *sizes in rows]
    except (TypeError, ValueError, KeyError, RuntimeError):
        return None


def export_layer(module: UnpackedRecurrent, x: Tensor, states: Sequence[Tensor]) -> ExportedProgram:
    """Export a layer for inputs like these, which may be fake tensors of a program; dynamic sizes stay dynamic."""
    # sizes with one symbol get one number, sizes with different symbols get different ones, so that export keeps them
    # apart
    symbols: dict[str, int] = {}

    def sizes(fake: Tensor) -> dict[int, Any]:
        return {axis: Dim.DYNAMIC for axis, size in enumerate(fake.shape) if not isinstance(size, int)}

    def like(fake: Tensor) -> Tensor:
        shape = [n if isinstance(n, int) else symbols.setdefault(str(n), 3 + len(symbols)) for n in fake.shape]
        return torch.zeros(shape, dtype=fake.dtype, device=fake.device)

    pair = module.mode == "LSTM"
    dynamic = (sizes(x), tuple(map(sizes, states)) if pair else sizes(states[0]))
    given = (like(x), tuple(map(like, states)) if pair else like(states[0]))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(module, given, dynamic_shapes=dynamic)


def write_kernel(graph: Graph, layer: Recurrence, nodes: Callable[[str], Node], before: Node) -> Node | None:
    """Insert the call of a layer's kernel and return it; None if a weight of the layer is factored."""
    try:
        whole = repack(layer.module)
    except InputError:  # a part is factored
        return None
    weights = [nodes(f"{layer.path}.{name}") for name in whole._flat_weights_names]
    states: Any = list(layer.states) if whole.mode == "LSTM" else layer.states[0]
    rest = (whole.num_layers, whole.dropout, whole.training, whole.bidirectional, whole.batch_first)
    with graph.inserting_before(before):
        return graph.call_function(_KERNELS[whole.mode], (layer.source, states, weights, whole.bias, *rest))


def is_kernel(node: Node) -> bool:
    """Whether a node calls the kernel of a recurrent layer."""
    return node.target in _MODES


def kernel_values(args: Sequence[Any]) -> tuple[Tensor, ...]:
    """Return tensors like a kernel's outputs; torch itself cannot run a kernel on symbolic sizes."""
    x, states, *_, both, _ = args
    last = tuple(states) if isinstance(states, list | tuple) else (states,)
    return (x.new_empty(*x.shape[:2], last[0].shape[-1] * (2 if both else 1)), *map(torch.empty_like, last))


def _match(
    path: str, module: UnpackedRecurrent, graph: Graph, root: nn.Module, nodes: Mapping[str, Node]
) -> Recurrence | None:
    """Return a factored layer if the graph has each node of its export; else None."""
    # The graph does not say which value is the layer's input, and the export depends on its shape. So the layer is
    # exported once for each shape of a value that could be the input, and each export is compared with the graph.
    tried, dtype = set(), next(module.parameters()).dtype
    for node in graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or value.dim() != 3 or value.shape[-1] != module.input_size:
            continue
        if value.dtype == dtype and str(value.shape) not in tried:
            tried.add(str(value.shape))
            try:
                program = export_layer(module, value, module.states_like(value))
            except Exception:  # torch may raise anything, and a record may contain anything
                continue
            found = _Match(program, graph, root, path, nodes).find(module)
            if found is not None:
                return found
    return None


class _Match:
    """Finds the nodes of a layer's own export in a graph."""

    def __init__(
        self, program: ExportedProgram, graph: Graph, root: nn.Module, path: str, nodes: Mapping[str, Node]
    ) -> None:
        self._own, self._graph, self._root, self._path = program.graph_module, graph, root, path
        self._inputs: list[Node] = []
        self._known: dict[Node, Node | None] = {}
        specs = program.graph_signature.input_specs
        for node, spec in zip(program.graph.find_nodes(op="placeholder"), specs, strict=True):
            if spec.kind is InputKind.PARAMETER:
                self._known[node] = nodes.get(f"{path}.{spec.target}")
            else:
                self._inputs.append(node)

    def find(self, module: UnpackedRecurrent) -> Recurrence | None:
        """Return the layer, if each output of the export is computed by a node of the graph in just the same way."""
        # ``bound`` maps nodes of the export to nodes of the graph. Each output is searched among all nodes of the
        # graph, and must agree with what earlier outputs have bound. Nothing but the outputs may be used outside.
        bound: dict[Node, Node] = {}
        outputs: list[Node | None] = []
        [last] = self._own.graph.find_nodes(op="output")
        for wanted in last.args[0]:
            found = None
            for node in self._graph.nodes:
                trial = dict(bound)
                if self._same(wanted, node, trial):
                    bound, found = trial, node
                    break
            outputs.append(found)
        given = [bound.get(node) for node in self._inputs]
        if not any(outputs) or None in given:
            return None
        inner = {node for own, node in bound.items() if own.op != "placeholder"}
        # getitem nodes that nothing reads are in the graph, but not in the export
        inner |= {user for node in inner for user in node.users if user.target is operator.getitem and not user.users}
        if any(set(node.users) - inner for node in inner if node not in outputs):
            return None
        source, *states = given
        inside = tuple(node for node in self._graph.nodes if node in inner)
        assert source is not None
        names = frozenset(f"{self._path}.{name}" for name, _ in module.named_parameters(remove_duplicate=False))
        return Recurrence(self._path, module, source, tuple(states), tuple(outputs), inside, names)  # type: ignore[arg-type]

    def _same(self, own: Node, node: Node, bound: dict[Node, Node]) -> bool:
        """Whether a node computes the same as a node of the export; ``bound`` gets all pairs of nodes that agree."""
        pairs = [(own, node)]
        while pairs:
            own, node = pairs.pop()
            # Placeholders of parameters must be the graph's node of that parameter; other placeholders, the inputs, may
            # be any node, but the same one each time.
            if own in bound or own.op == "placeholder":
                known = self._known.get(own, node)
                if bound.setdefault(own, node) is not node or known is not node:
                    return False
                continue
            bound[own] = node
            if own.op != node.op or (own.op != "get_attr" and own.target != node.target):
                return False
            if own.op == "get_attr":
                bodies = (getattr(graph, str(n.target), None) for graph, n in ((self._own, own), (self._root, node)))
                if not _same_graph(*bodies):
                    return False
            mine, theirs = _flat(own), _flat(node)
            if len(mine) != len(theirs):
                return False
            for a, b in zip(mine, theirs, strict=True):
                if isinstance(a, Node) and isinstance(b, Node):
                    pairs.append((a, b))
                elif type(a) is not type(b) or a != b:
                    return False
        return True


def _same_graph(first: Any, second: Any) -> bool:
    """Whether two graphs are the same except for names."""
    if not isinstance(first, GraphModule) or not isinstance(second, GraphModule):
        return False
    at: dict[Node, int] = {}
    if len(first.graph.nodes) != len(second.graph.nodes):
        return False
    for place, (a, b) in enumerate(zip(first.graph.nodes, second.graph.nodes, strict=True)):
        at[a] = at[b] = place
        if a.op != b.op or (a.op != "placeholder" and a.target != b.target):
            return False
        rows = [[at[leaf] if isinstance(leaf, Node) else (leaf,) for leaf in _flat(node)] for node in (a, b)]
        if rows[0] != rows[1]:
            return False
    return True


def _flat(node: Node) -> list[Any]:
    """Return the arguments of a node as a flat list with brackets; tuples count as lists, as files make them."""
    return list(_leaves((node.args, *sorted(node.kwargs.items()))))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        yield "["
        for part in value:
            yield from _leaves(part)
        yield "]"
    else:
        yield value
