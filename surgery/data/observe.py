"""Run a model of any graph kind on calibration inputs, and show the values that something is called on.

An nn.Module runs as it is, and hooks see what its submodules get. Graphs are interpreted node by node, on the
parameters that the graph kind holds, with packed attention taken apart as the kind has it, and hooks for what an
outline stands for. Always in evaluation mode and without gradients. The model itself is not changed.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from surgery.data.added import Added, Additions
from surgery.data.inputs import Inputs
from surgery.errors import InputError
from surgery.kinds.base import Kind
from surgery.kinds.fx.graph import GraphKind
from surgery.kinds.fx.kind import GraphModuleKind
from surgery.kinds.fx.outline import in_outline
from surgery.kinds.fx.recurrence import Recurrence
from surgery.kinds.layers.around import watching
from surgery.kinds.layers.copying import copy_module
from surgery.kinds.layers.unpacking import has_packed, unpack_all
from surgery.kinds.layers.untouched import evaluation
from surgery.kinds.layers.within import Within, within_of
from surgery.kinds.program.kind import ProgramKind
from surgery.kinds.registry import Model, open_graph
from surgery.sites.flow import Call
from surgery.text import first_line

__all__ = ["Change", "Observed", "ObservedGraph", "ObservedModule", "See", "observe"]

See = Callable[[Tensor], None]
Change = Callable[[Tensor], Tensor]


class Observed(ABC):
    """A model that can be run while something watches its calls; ``batch`` is what it runs on, or has run on last."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self._additions = Additions()
        self._follows = False
        self.batch: Inputs = (), {}

    @abstractmethod
    def watch(self, call: Call, see: See) -> None:
        """Show ``see`` the input of an operator's call, each time just before it is used."""

    @abstractmethod
    def tap(self, call: Call, change: Change) -> None:
        """Put what ``change`` returns in the place of each output of an operator's call."""

    def follow(self, call: Call, see: Callable[[Tensor], Added], spoiled: Callable[[], None]) -> None:
        """Call ``see`` with each output of a call; what ``see`` returns is called with what is added to that output.

        It is also told whether that is the output of a call that is followed, too.
        ``spoiled`` is called if anything but the addition reads the output. Takes the place of a tap.
        """

        def pass_on(y: Tensor) -> Tensor:
            with self._additions.paused():
                added = see(y)
            self._additions.follow(y, added, spoiled)
            return y

        self._follows = True
        self.tap(call, pass_on)

    @abstractmethod
    def forget(self) -> None:
        """Let nothing watch, tap or follow a call any more."""

    @abstractmethod
    def execute(self, inputs: Inputs) -> Any:
        """Run the model once; whatever it raises comes through."""

    @property
    @abstractmethod
    def parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that it runs on."""

    def run(self, inputs: Inputs, *, gradients: bool = False) -> Any:
        """Run the model once, and return its outputs; ``gradients`` are those of what is tapped, not of parameters.

        Raises:
            InputError: the model does not take these inputs.
        """
        self.batch = inputs
        try:
            with torch.set_grad_enabled(gradients), _frozen(self.parameters), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of torch about itself
                with self._additions if self._follows else nullcontext():
                    output = self.execute(inputs)
                self._additions.give(output)
                return output
        except InputError:
            raise
        except Exception as error:  # a model may raise anything on inputs that do not fit
            what = f"the model does not run on the calibration inputs: {first_line(error)}"
            raise InputError(what, next_step="check their number, shapes and dtypes") from error


@contextmanager
def _frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Let no parameter ask for a gradient."""
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()


def observe(model: Model, inputs: Inputs) -> Observed:
    """Return a model to be watched; ``inputs`` are one batch, to trace it with.

    Raises:
        InputError, CaptureError: as ``open_graph``.
    """
    if isinstance(model, ExportedProgram):
        return ObservedGraph(ProgramKind(model, *inputs), lambda kind, given: _bind_program(model, kind, given))
    if isinstance(model, GraphModule):
        return ObservedGraph(GraphModuleKind(model, *inputs, copies=False, inplace=False), _bind_graph)
    return ObservedModule(model, open_graph(model, *inputs, copies=False))


class ObservedModule(Observed):
    """An nn.Module whose submodules have hooks while it runs."""

    def __init__(self, model: nn.Module, kind: Kind) -> None:
        super().__init__(kind)
        packed = has_packed(model)
        holder = nn.ModuleList([copy_module(model) if packed else model])
        if packed:
            unpack_all(holder)
        self.root = holder[0]
        self._hooks = _Hooks(self._additions)

    def watch(self, call: Call, see: See) -> None:
        """Show the input of a module; one hook sees all its calls, so it is added once however many there are."""
        self._hooks.watch(str(call.path), see)

    def watch_module(self, path: str, see: See) -> None:
        """Show ``see`` the first input of a submodule."""
        self._hooks.watch(path, see)

    def tap(self, call: Call, change: Change) -> None:
        """Change the output of a module."""
        self._hooks.taps[str(call.path)] = change

    def forget(self) -> None:
        """Have no hooks."""
        self._hooks, self._follows = _Hooks(self._additions), False

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """The module's own."""
        return self.root.parameters()

    def execute(self, inputs: Inputs) -> Any:
        """Run with hooks, which are gone afterwards."""
        args, kwargs = inputs
        with self._hooks.on(self.root), evaluation(self.root):
            return self.root(*args, **kwargs)


class _Hooks:
    """What is to be shown of submodules and changed in them, by path; additions do not see who it is shown to."""

    def __init__(self, additions: Additions) -> None:
        self._additions = additions
        self.watchers: dict[str, list[See]] = defaultdict(list)
        self.taps: dict[str, Change] = {}

    def watch(self, path: str, see: See) -> None:
        if see not in self.watchers[path]:
            self.watchers[path].append(see)

    @contextmanager
    def on(self, root: nn.Module) -> Iterator[None]:
        """Have the hooks on a module for a while."""
        with ExitStack() as stack:
            for path in {**self.watchers, **self.taps}:
                layer, sees, change = root.get_submodule(path), self.watchers.get(path, []), self.taps.get(path)
                within = within_of(layer)
                if isinstance(within, Within):
                    stack.enter_context(watching(layer, within, partial(self._show, sees), change))
                    continue
                if sees:
                    hook = layer.register_forward_pre_hook(self._hook(sees), with_kwargs=True)
                    stack.callback(hook.remove)
                if change is not None:
                    hook = layer.register_forward_hook(_output_hook(change), prepend=True)  # before those of the user
                    stack.callback(hook.remove)
            yield

    def _hook(self, sees: Iterable[See]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def show(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._show(sees, args[0] if args else kwargs["input"])

        return show

    def _show(self, sees: Iterable[See], value: Tensor) -> None:
        with self._additions.paused():
            for see in sees:
                see(value)


def _output_hook(change: Change) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    return lambda module, args, output: change(output)


class ObservedGraph(Observed):
    """A graph that is interpreted; ``bind`` gives the value of each placeholder."""

    def __init__(self, kind: GraphKind, bind: Callable[[GraphKind, Inputs], Mapping[Node, Any]]) -> None:
        super().__init__(kind)
        self.graph = kind
        self._bind = bind
        self._watchers: dict[Node, list[tuple[Node, See]]] = defaultdict(list)
        self._taps: dict[Node, Change] = {}
        self._hooks = _Hooks(self._additions)

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
        self._hooks, self._follows = _Hooks(self._additions), False

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """Those of the graph's module; a program's come as tensors without gradients."""
        return self.module.parameters()

    @property
    def module(self) -> GraphModule:
        """The module of the graph."""
        module = self.graph.graph.owning_module
        assert module is not None  # each kind keeps the module of its graph
        return module

    def execute(self, inputs: Inputs) -> Any:
        """Interpret the graph."""
        with self._hooks.on(self.module), evaluation(self.module):
            interpreter = _Interpreter(self.module, self._watchers, self._taps, self.graph.recurrences)
            return interpreter.run(initial_env=dict(self._bind(self.graph, inputs)), enable_io_processing=False)


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


def _bind_program(program: ExportedProgram, kind: GraphKind, inputs: Inputs) -> dict[Node, Any]:
    """Return the inputs, the parameters (as the kind has them), buffers and constants by placeholder."""
    given = iter(_leaves(inputs, program.call_spec.in_spec))
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
    values: dict[Node, Any] = {}
    for node in kind.graph.find_nodes(op="placeholder"):
        spec = specs.get(node.name)
        if node in kind.reader.providers:
            values[node] = kind.reader.parameters[kind.reader.providers[node]].detach()
        elif spec is None or spec.kind is InputKind.USER_INPUT:
            values[node] = next(given)
        else:
            state = program.state_dict if spec.target in program.state_dict else program.constants
            value = state[str(spec.target)]
            values[node] = value.detach() if isinstance(value, nn.Parameter) else value
    return values


def _bind_graph(kind: GraphKind, inputs: Inputs) -> dict[Node, Any]:
    """Return the inputs by placeholder: flattened if the graph was exported with a tree, else by place and by name."""
    graph = kind.graph
    nodes = list(graph.find_nodes(op="placeholder"))
    if hasattr(graph._codegen, "pytree_info"):
        return dict(zip(nodes, _leaves(inputs, graph._codegen.pytree_info.in_spec), strict=True))
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


def _leaves(inputs: Inputs, spec: Any) -> list[Any]:
    """Return the inputs as a flat list, those by name in the order of the specification."""
    args, kwargs = inputs
    order = spec.child(1).context or []
    if set(order) == set(kwargs):
        kwargs = {name: kwargs[name] for name in order}
    return pytree.tree_leaves((args, kwargs))
