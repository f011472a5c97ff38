"""Make the flow of an fx graph from its reader: the calls, reshapes and sums, and the costs of all other nodes.

Shapes of a graph's values, found with fake tensors: without a real forward pass and memory for activations.

The multiply-accumulates of nodes that are not sites, so that the totals cover the whole model.

As for sites, only products with weights count: convolutions, linear layers, recurrent kernels. A product of two
activations, as in attention, does not count.
"""

from __future__ import annotations

import math
import operator as python_operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from surgery.algebra import Shape, Shift
from surgery.errors import InputError, SurgeryError
from surgery.kinds.fx.functional import read_link
from surgery.kinds.fx.nodes import epilogue_of, function_name
from surgery.kinds.fx.read import Reader
from surgery.kinds.layers import steps as layers
from surgery.kinds.layers.around import inner_of_chain
from surgery.kinds.layers.edit import Known
from surgery.kinds.layers.modules import called_shape
from surgery.kinds.layers.steps import read_link_module
from surgery.kinds.layers.untouched import evaluation, kept_buffers, untouched
from surgery.sites import Call, Element, Flow, Layers, ModuleChain, Origin, Other, Reshape, Skip, Sum
from surgery.system.importing import Lazy
from surgery.system.quiet import quiet
from surgery.text import first_line

__all__ = ["ChainCall", "Extras", "fake_shapes", "fake_values", "lazy_shapes", "macs_of", "make_flow"]


class _Values(Interpreter):
    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n] = value = super().run_node(n)
        return value


def lazy_shapes(module: GraphModule, inputs: Callable[[], tuple[Any, ...]]) -> Callable[[Node], Shape]:
    """Return a function from nodes to shapes; its first call runs ``fake_shapes``."""
    found: list[Callable[[Node], Shape]] = []

    def shape(node: Node) -> Shape:
        if not found:
            found.append(fake_shapes(module, inputs()))
        return found[0](node)

    return shape


def fake_shapes(module: GraphModule, inputs: tuple[Any, ...]) -> Callable[[Node], Shape]:
    """Run a graph on fake tensors and return the shape of each node's value; raises as ``fake_values``."""
    values = fake_values(module, inputs)

    def shape(node: Node) -> Shape:
        value = values[node]
        if not isinstance(value, torch.Tensor):
            raise KeyError(node)
        return tuple(int(size) for size in value.shape)

    return shape


def fake_values(module: GraphModule, inputs: tuple[Any, ...]) -> dict[Node, Any]:
    """Run a graph on fake tensors and return each node's value; buffers that it writes to are left as they were.

    Raises:
        InputError: the graph does not accept the inputs, or it has lazy layers, which the run would initialise.
    """
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        raise InputError("the model has lazy layers without weights", next_step="run the model once")
    # all sizes are numbers, but a loop whose number of steps depends on data needs an environment for symbols
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)

    def fake(value: Any) -> Any:
        plain = isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)
        return mode.from_tensor(value) if plain else value

    interpreter = _Values(module)
    try:
        with kept_buffers(module), quiet(), mode, torch.no_grad(), evaluation(module):
            interpreter.run(*torch.utils._pytree.tree_map(fake, inputs))
    except Exception as error:  # the graph may raise anything on inputs that do not fit
        what = f"the model does not accept the inputs: {first_line(error)}"
        raise InputError(what, next_step="check their number, shapes and dtypes") from error
    return interpreter.values


# name of a product -> which of its tensors is the first factor
_PRODUCTS = {"linear": 0, "matmul": 0, "mm": 0, "bmm": 0, "__matmul__": 0, "addmm": 1, "baddbmm": 1}
_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_COUNTED = ("convolution", "mm", "addmm", "_convolution")
ShapeOf = Callable[[Node], Shape]


def macs_of(value: int, node: Node, reader: Reader, shape: ShapeOf) -> int:
    """Return the multiply-accumulates of the node that gives a value; 0 if they are not known."""
    try:
        if value in reader.given_calls:
            return _of_call(reader.given_calls[value], reader, shape)
        if node.op == "call_module" and reader.module is not None:
            return _of_module(reader.module(str(node.target)), [shape(n) for n in node.all_input_nodes])
        return _of_function(node, shape)
    except (SurgeryError, LookupError, TypeError, AttributeError):  # a node without a shape has no known cost
        return 0


def _of_call(call: Call, reader: Reader, shape: ShapeOf) -> int:
    assert reader.module is not None  # the call is that of a module
    return call.operator.macs(called_shape(reader.module(str(call.path)), shape(reader.node(call.source))))


def _of_function(node: Node, shape: ShapeOf) -> int:
    name = function_name(node)
    args = [arg for arg in node.args if isinstance(arg, Node)]
    if "conv" in name:
        # each sample and position of the output (of the input, if transposed) uses each number of the weight once
        source, weight = (shape(arg) for arg in args[:2])
        turned = "transpose" in name or (name == "convolution" and node.args[6] is True)
        place, channels = (source, weight[0]) if turned else (shape(node), weight[0])
        return math.prod(place) // channels * math.prod(weight)
    if name in _PRODUCTS:
        # each number of the output (.., m, n) is a sum of k products, k the last size of the first factor
        return math.prod(shape(node)) * shape(args[_PRODUCTS[name]])[-1]
    if name in _RECURRENT:
        rows = node.args[2]
        weights = [shape(n) for n in (rows if isinstance(rows, Sequence) else ()) if isinstance(n, Node)]
        return math.prod(shape(args[0])[:-1]) * sum(math.prod(w) for w in weights if len(w) > 1)
    return 0


def _of_module(module: nn.Module, shapes: Sequence[Shape]) -> int:
    """Count the multiply-accumulates of a module in one run on fake tensors."""
    if isinstance(module, nn.RNNBase):
        return math.prod(shapes[0][:-1]) * sum(p.numel() for p in module.parameters() if p.dim() > 1)
    like = next((p for p in module.parameters() if p.is_floating_point()), None)
    if like is None or isinstance(module, nn.Embedding | nn.EmbeddingBag) or any(map(is_lazy, module.parameters())):
        return 0
    counter: Any = FlopCounterMode(display=False)
    try:
        with (
            untouched(module),
            torch.no_grad(),
            evaluation(module),
            FakeTensorMode(allow_non_fake_inputs=True),
            counter,
        ):
            module(*(torch.empty(shape, dtype=like.dtype, device=like.device) for shape in shapes))
    except Exception:  # a module may need other inputs than these; then its cost is not known
        return 0
    counts = counter.get_flop_counts().get("Global", {})
    # torch counts a multiplication and an addition as two operations
    return sum(flops for op, flops in counts.items() if str(op).rpartition(".")[2] in _COUNTED) // 2


_ADDITIONS = (torch.add, python_operator.add, torch.ops.aten.add.Tensor)


@dataclass(frozen=True, eq=False)
class ChainCall:
    """One call of the module of a chain: its node, its input and the module's path."""

    node: Node
    source: Node
    path: str


@dataclass(frozen=True, eq=False)
class Extras:
    """What a kind knows of a model in addition to its graph: chains that are modules, layers, and the record."""

    known: Sequence[Known] = ()
    chain_calls: Sequence[ChainCall] = ()
    broken: tuple[Skip, ...] = ()
    layers: Layers = field(default_factory=Layers)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    recorded: frozenset[str] = frozenset()
    proved: bool = True


def make_flow(reader: Reader, shape: Callable[[Node], Shape], extras: Extras) -> Flow:
    """Return the flow of a graph; ``shape`` gives the shape of a node's value, and is called as late as possible."""
    nodes = list(reader.nodes)
    calls = reader.calls
    # A value is one element: the last value of a call is the call; other values of a call, and nodes that an outline
    # stands for, are Other; all other nodes are looked at.
    taken = {value for call in calls.values() for value in call.values}
    elements: list[Element] = []
    for number, node in enumerate(nodes, reader.start):
        plain = number not in taken and node not in reader.outlined
        elements.append(calls.get(number) or (_element(number, node, reader) if plain else Other(number)))
    numbers = dict(reader.numbers)
    every = range(reader.start, reader.start + len(nodes))

    def node_of(value: int) -> Node:
        return nodes[value - reader.start]

    # shapes and costs may need a run on fake tensors, so they are computed only when they are asked for
    shapes = Lazy(every, lambda value: shape(node_of(value)))
    # a chain that stands as a module is one node in the graph, and its input may be padded or reshaped before the
    # factors
    inside = {numbers[call.node]: call for call in extras.chain_calls}
    modules = {path: known.modules[path] for known in extras.known for path in known.modules}

    def input_shape(value: int) -> Shape:
        if value in inside:
            return _shape_in_chain(modules[inside[value].path], shape(inside[value].source))
        return _shape_in_call(calls[value], reader, shapes[calls[value].source])

    return Flow(
        tuple(elements),
        {number: frozenset(numbers[user] for user in node.users) for number, node in enumerate(nodes, reader.start)},
        reader.tensors,
        shapes,
        Lazy(every, input_shape),
        Lazy(every, lambda value: macs_of(value, node_of(value), reader, shape)),
        Lazy(every, lambda value: node_of(value).name),
        reader.left,
        extras.layers,
        tuple(_module_chain(known, extras.chain_calls, numbers, reader) for known in extras.known),
        extras.broken,
        extras.origins,
        extras.recorded,
        extras.proved,
    )


def _element(number: int, node: Node, reader: Reader) -> Element:
    """Return the element for a node that does not call an operator."""
    source = node.args[0] if node.args else None
    if isinstance(source, Node):
        reshape = partial(Reshape, number, reader.numbers[source])
        if node.op == "call_module" and reader.module is not None:
            path = str(node.target)
            module = reader.module(path)
            # the bias of a chain that ends with a reshape is a module of its own
            if type(module) is layers.Shift:
                return reshape(Shift(module.bias.detach()), path, f"{path}.bias")
            if (step := read_link_module(module)) is not None:
                return reshape(step, path)
        elif node.op == "call_function" and node.target in _ADDITIONS:
            return _addition(number, node, source, reader)
        elif (step := read_link(node)) is not None:
            return reshape(step, reader.owner(node))
    return Other(number, epilogue_of(node, reader.module))


def _addition(number: int, node: Node, first: Node, reader: Reader) -> Element:
    """Return the addition of a parameter with one axis as a reshape (a shift), and any other addition as a sum."""
    second: Any = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    if not isinstance(second, Node):
        return Other(number)
    name = reader.providers.get(second)
    # adding a parameter of shape (features,) is the last step of a chain; adding two activations may join branches
    if name is not None and reader.parameters[name].dim() == 1 and first not in reader.providers:
        shift = Shift(reader.parameters[name].detach())
        return Reshape(number, reader.numbers[first], shift, reader.owner(node), name)
    return Sum(number, (reader.numbers[first], reader.numbers[second]))


def _shape_in_call(call: Call, reader: Reader, shape: Shape) -> Shape:
    """Return the shape of the operator's input; a layer that does more than its operator may have another input."""
    module = None if call.path is None or reader.module is None else reader.module(call.path)
    return shape if module is None else called_shape(module, shape)


def _shape_in_chain(module: Any, shape: Shape) -> Shape:
    within = module.surgery_within
    return shape if within is None else inner_of_chain(module, within, shape)


def _module_chain(known: Known, calls: Sequence[ChainCall], numbers: Mapping[Node, int], reader: Reader) -> ModuleChain:
    own = sorted(numbers[call.node] for call in calls if call.path in known.modules)
    first = next((call.path for call in calls if own and numbers[call.node] == own[0]), None)
    chain = known.chain
    return ModuleChain(chain.names, chain.chains, chain.weights, chain.keys, tuple(own), reader.loop(first))
