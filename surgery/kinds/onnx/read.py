"""Read the flow of an ONNX graph: which nodes call operators, and on which weights.

Values are numbered in graph order: the inputs, then constants that operators are called on, then the outputs of all
nodes, then one value that stands for the outputs of the graph. Nodes in the branches of an If come before the If, whose
value is computed from their ends; so do the nodes of one step of a recurrent layer before its Scan. A MatMul by a
weight and the Add of a bias after it are one call, but for the biases of recurrent layers, which are added to two
products. A recurrent node gives one more value, its gates: the product of its input and its input weight, a call of its
own.

    y = MatMul(x, W)    z = Add(y, b)    ->    Call(value of z, source x, Linear(W^T, b), inside=(value of y,))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import onnx_ir as ir
from torch import Tensor

from surgery.algebra import Conv, Embedding, Linear, Operator, Shift
from surgery.errors import Refusal
from surgery.kinds.onnx.geometry import geometry_of
from surgery.kinds.onnx.left import DENSE, EARLIER, RECURRENT, branches, inside, is_recurrent, left_of
from surgery.kinds.onnx.marks import MARK, SHIFT, link_of
from surgery.kinds.onnx.steps import Layer, biases_before, layer_of
from surgery.kinds.onnx.tensors import FLOATS
from surgery.kinds.onnx.weights import Weight, find_weight, held, is_plain, is_view
from surgery.sites import Activation, BatchNorm, Call, Element, Epilogue, Left, Other, Reshape, Sum, site_name

__all__ = ["Reader", "attributes_of"]

_EPILOGUES: dict[str, Epilogue] = {
    "BatchNormalization": BatchNorm(),
    **{kind: Activation(kind) for kind in ("Relu", "Sigmoid", "Tanh", "Clip")},
}


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """Return the attributes of a node by name; texts as str."""
    return {name: attribute.value for name, attribute in node.attributes.items()}


class Reader:
    """The graph of an ONNX model with numbered values; the first has the number ``start``."""

    def __init__(self, model: ir.Model, start: int = 0) -> None:
        graph = model.graph
        self.graph, self.functions, self.start = graph, model.functions, start
        self._weights: dict[ir.Value, Weight | None] = {}
        self.layers: dict[ir.Node, Layer] = {}  # the recurrent layers, by their Scan
        self.nodes = list(self._in_order(graph))
        self.steps = {layer.body: layer for layer in self.layers.values()}
        self.inputs = [value for value in graph.inputs if not value.is_initializer()]
        self.gates = {node: _gates_of(node) for node in self.nodes if is_recurrent(node)}
        outputs = [value for node in self.nodes for value in (*self._own(node), *node.outputs)]
        carried = [value for body in self.steps for value in body.inputs]
        self.values = [*self.inputs, *self._called_on(), *carried, *outputs]
        self.numbers = {value: number for number, value in enumerate(self.values, start)}
        self.end = start + len(self.values)  # stands for the outputs of the graph
        # a node of a body that may run again and again counts as the node around it
        self.around = {node: node for node in self.nodes}
        for node in self.nodes:
            for inner in inside(node):
                self.around.setdefault(inner, node)
        self.roots: dict[str, ir.Value] = {}  # what holds the numbers of weights; the first of each name
        for value in self._holders():
            self.roots.setdefault(value.name or "", value)

    def _in_order(self, graph: ir.Graph) -> Iterator[ir.Node]:
        """Yield the nodes of a graph and of what runs in it, the inner ones before the node that has them."""
        for node in graph:
            layer = layer_of(node)
            if layer is not None:
                self.layers[node] = layer
            for inner in self._runs(node):
                yield from self._in_order(inner)
            yield node

    def _runs(self, node: ir.Node) -> list[ir.Graph]:
        """Return the branches of an If, and the one step of a recurrent layer."""
        return [self.layers[node].body] if node in self.layers else branches(node)

    def _holders(self) -> Iterator[ir.Value]:
        for graph in dict.fromkeys([self.graph, *(node.graph for node in self.nodes)]):
            if isinstance(graph, ir.Graph):
                yield from graph.initializers.values()
        yield from (node.outputs[0] for node in self.nodes if held(node.outputs[0]) is not None)

    def _called_on(self) -> list[ir.Value]:
        """Return the initializers that stand where nodes with a weight read the value that they multiply."""
        dense = (node for node in self.nodes if node.op_type in DENSE and is_plain(node) and len(node.inputs) > 1)
        read = (n.inputs[1 - DENSE[n.op_type]] for n in dense if self.weight(n.inputs[DENSE[n.op_type]]) is not None)
        return [value for value in dict.fromkeys(read) if value is not None and value.is_initializer()]

    def _own(self, node: ir.Node) -> list[ir.Value]:
        return [self.gates[node]] if node in self.gates else []

    def label(self, value: int) -> str:
        """Return the graph's own name of a value."""
        if value == self.end:
            return "the outputs"
        found = self.values[value - self.start]
        node = found.producer()
        return (node.name if node is not None else None) or found.name or str(value)

    def node(self, number: int) -> ir.Node:
        """Return the node that gives a value."""
        value = self.values[number - self.start]
        return value.producer() or next(node for node, gates in self.gates.items() if gates is value)

    def number(self, node: ir.Node) -> int:
        """Return the number that stands for a node of this graph: that of its first output."""
        return self.numbers[node.outputs[0]]

    def weight(self, value: ir.Value | None) -> Weight | None:
        """Return the weight that a value is; None if it is none."""
        if value is None:
            return None
        if value not in self._weights:
            self._weights[value] = find_weight(value)
        return self._weights[value]

    @cached_property
    def _named(self) -> Mapping[str, ir.Value]:
        """The first weight of each site name."""
        held_by = {name: held(root) for name, root in reversed(self.roots.items())}
        large = [name for name, tensor in held_by.items() if tensor is not None and len(tensor.shape) > 1]
        return {site_name(name): self.roots[name] for name in large}

    def is_named(self, weight: Weight) -> bool:
        """Whether no other weight of the graph had its name, or that of its site, before."""
        first = self._named.get(site_name(weight.name), weight.root)
        return self.roots.get(weight.name, weight.root) is weight.root is first

    def _plain(self, value: ir.Value | None) -> Weight | None:
        """Return the bias that a value is; None if nodes compute it, if only from another shape or type."""
        found = self.weight(value)
        return None if found is None or found.form else found

    @cached_property
    def users(self) -> Mapping[int, frozenset[int]]:
        """The values that are computed from each value."""
        found: dict[int, set[int]] = {number: set() for number in range(self.start, self.end + 1)}
        for number, value in enumerate(self.values, self.start):
            found[number] = {self._user(use.node, use.idx) for use in value.uses() if use.node in self.around}
            found[number] |= self.ends.get(value, set())
        for node, value in self.gates.items():
            found[self.numbers[value]] = {self.number(node)}
        return {number: frozenset(users) for number, users in found.items()}

    def _user(self, node: ir.Node, at: int) -> int:
        """Return the number of what a node computes from its input ``at``; a recurrent node computes gates from X."""
        if node in self.gates and at == 0:
            return self.numbers[self.gates[node]]
        return self.number(self.around[node])

    @cached_property
    def ends(self) -> Mapping[ir.Value, set[int]]:
        """The outputs of the graph, of branches and of steps, and the numbers of what they are the ends of."""
        found: dict[ir.Value, set[int]] = defaultdict(set)
        for value in self.graph.outputs:
            found[value].add(self.end)
        for node in self.nodes:
            for inner in self._runs(node):
                for value in inner.outputs:
                    found[value].add(self.number(node))
        return found

    @cached_property
    def parameters(self) -> Mapping[str, ir.TensorProtocol]:
        """All tensors of numbers that may be weights, by the names of their values."""
        found = {name: (value.is_initializer(), held(value)) for name, value in self.roots.items()}
        return {
            name: tensor
            for name, (initial, tensor) in found.items()
            if tensor is not None and tensor.dtype in FLOATS and (initial or len(tensor.shape))
        }

    @cached_property
    def uses(self) -> Mapping[str, frozenset[int]]:
        """The values that read each parameter, also through views and inside of bodies."""
        found: dict[str, set[int]] = {}
        for name, root in self.roots.items():
            waiting, users = [root], set()
            while waiting:
                value = waiting.pop()
                users |= self.ends.get(value, set())
                for use in value.uses():
                    if is_view(use.node) and use.idx == 0 and self.around.get(use.node) is use.node:
                        waiting.append(use.node.outputs[0])
                    elif use.node in self.around:
                        users.add(self.number(self.around[use.node]))
            found[name] = users
        return {name: frozenset(users) for name, users in found.items()}

    @cached_property
    def elements(self) -> tuple[Element, ...]:
        """One element for each value."""
        found: dict[int, Element] = {number: Other(number) for number in range(self.start, self.end + 1)}
        for node in self.nodes:
            number = self.number(node)
            if isinstance(found[number], Call):  # the Add of a bias, which belongs to the call before it
                continue
            element = self._element(node, number)
            found[element.value] = element
        spans = (element for element in found.values() if isinstance(element, Call | Reshape))
        inside = {value for element in spans for value in element.inside}
        return tuple(element for number, element in sorted(found.items()) if number not in inside)

    def _element(self, node: ir.Node, number: int) -> Element:
        if not is_plain(node):
            return Other(number)
        call = self.call(node)
        if isinstance(call, Call):
            return call
        if node.op_type == "Add":
            return self._sum(node, number)
        if (reshape := self._reshape(node, number)) is not None:
            return reshape
        return Other(number, _EPILOGUES.get(node.op_type))

    def _sum(self, node: ir.Node, number: int) -> Element:
        """Return the addition of a bias as a reshape (a shift), and the addition of two values as a sum."""
        first, second = node.inputs[:2]
        if first in self.numbers and second in self.numbers and self.weight(second) is None:
            return Sum(number, (self.numbers[first], self.numbers[second]))
        bias = self._plain(second)
        # an addition that the file had before stays a node of its own
        own = node.metadata_props.get(MARK) == SHIFT and node not in self._shifts
        if own and bias is not None and len(bias.shape) == 1 and bias.name in self.parameters and first in self.numbers:
            return Reshape(number, self.numbers[first], Shift(bias.numbers), bias=bias.name)
        return Other(number)

    def _reshape(self, node: ir.Node, number: int) -> Reshape | None:
        """Return the reshape or transpose of which a node is the last; None for any other node."""
        found = link_of(node)
        if found is None:
            return None
        step, nodes = found
        source = self.numbers.get(nodes[0].inputs[0])  # type: ignore[arg-type]
        inside = tuple(self.number(each) for each in nodes[:-1])
        return None if source is None else Reshape(number, source, step, inside=inside)

    def call(self, node: ir.Node) -> Call | Refusal | None:
        """Return the call that a node is; a refusal for the call of a weight that is left alone; else None."""
        reads: dict[str, Callable[[ir.Node, Weight], Call | Refusal | None]] = {
            "Conv": self._conv,
            "ConvTranspose": self._conv,
            "Gemm": self._gemm,
            "MatMul": self._matmul,
            "Gather": self._gather,
            **dict.fromkeys(RECURRENT, self._recurrent),
        }
        read = reads.get(node.op_type)
        if read is None:
            return None
        at = DENSE[node.op_type]
        weight = self.weight(node.inputs[at])
        if weight is None or len(weight.shape) < 2:
            return None
        if node.op_type == "Gather" and not (weight.is_float or weight.is_quantized):
            return None  # a table of indices or sizes
        if self.around.get(node) is not node:
            return Refusal("it is inside of a body")
        if not self.is_named(weight):
            return Refusal("another weight of the model has its name")
        if not weight.is_float:
            return Refusal(f"its weight is {weight.tensor.dtype.name}; {EARLIER}")
        if node.inputs[1 - at] not in self.numbers:
            return Refusal("it is computed from constants alone")
        roots = [found.root for value in node.inputs if (found := self.weight(value)) is not None]
        if roots.count(weight.root) > 1:
            return Refusal("its node reads the weight in two places")
        return read(node, weight)

    def _make(self, node: ir.Node, operator: Operator, weight: Weight, bias: str | None = None, **more: Any) -> Call:
        source = node.inputs[1 - DENSE[node.op_type]]
        assert source is not None
        more["loop"] = self.steps[node.graph].loop if node.graph in self.steps else None
        return Call(self.number(node), self.numbers[source], operator, weight.name, bias, view=weight.form, **more)

    def _bias(self, node: ir.Node, out: int) -> tuple[str | None, Tensor | None, int | None] | Refusal:
        """Return the name and the numbers of a node's bias, or the number of the value that is computed as its bias."""
        value = node.inputs[2] if len(node.inputs) > 2 else None
        if value is None:
            return None, None, None
        bias = self._plain(value)
        if bias is None:
            return None, None, self.numbers.get(value)
        if bias.shape != (out,):
            return Refusal(f"its bias has the shape {'x'.join(map(str, bias.shape)) or 'of a number'}, not {out}")
        return bias.name, bias.numbers, None

    def _conv(self, node: ir.Node, weight: Weight) -> Call | Refusal:
        said = attributes_of(node)
        transposed, groups = node.op_type == "ConvTranspose", int(said.get("group", 1))
        if not 1 <= len(weight.shape) - 2 <= 3:
            return Refusal("it is a convolution over more than three axes")
        if tuple(said.get("kernel_shape", weight.shape[2:])) != weight.shape[2:]:
            return Refusal("its weight has another shape than what its kernel_shape says")
        geometry = geometry_of(said, weight.shape[2:], node.inputs[0], transposed=transposed)
        if isinstance(geometry, Refusal):
            return geometry
        out = weight.shape[1] * groups if transposed else weight.shape[0]
        bias = self._bias(node, out)
        if isinstance(bias, Refusal):
            return bias
        name, numbers, computed = bias
        operator = Conv(weight.numbers, geometry, groups, bias=numbers)
        return self._make(node, operator, weight, name, computed_bias=computed)

    def _gemm(self, node: ir.Node, weight: Weight) -> Call | Refusal:
        said = attributes_of(node)
        if said.get("transA", 0) or said.get("alpha", 1.0) != 1.0 or said.get("beta", 1.0) != 1.0:
            return Refusal("it is a Gemm with transA, alpha or beta")
        stored = "out_in" if said.get("transB", 0) else "in_out"
        numbers = weight.numbers if stored == "out_in" else weight.numbers.mT
        bias = self._bias(node, len(numbers))
        if isinstance(bias, Refusal):
            return bias
        name, shift, computed = bias
        return self._make(node, Linear(numbers, bias=shift), weight, name, stored=stored, computed_bias=computed)

    def _matmul(self, node: ir.Node, weight: Weight) -> Call | Refusal:
        if len(weight.shape) != 2:
            return Refusal("its weight is a batch of matrices")
        plain = self._make(node, Linear(weight.numbers.mT), weight, stored="in_out")
        added = self.added(node, weight.shape[1])
        if added is None:
            return plain
        value, bias = added
        operator = Linear(weight.numbers.mT, bias=bias.numbers)
        number = plain.value
        return replace(
            plain, value=self.numbers[value], operator=operator, bias=bias.name, inside=(number,), reader=number
        )

    def added(self, node: ir.Node, out: int) -> tuple[ir.Value, Weight] | None:
        """Return the value and the bias of the one Add that reads a product, if it adds a bias."""
        product = node.outputs[0]
        uses = list(product.uses())
        if len(uses) != 1 or product.is_graph_output() or uses[0].node.op_type != "Add":
            return None
        addition = uses[0].node
        if self.around.get(addition) is not addition or not is_plain(addition) or addition in self._shifts:
            return None
        bias = self._plain(addition.inputs[1 - uses[0].idx])
        known = bias is not None and bias.shape == (out,) and bias.name in self.parameters
        return (addition.outputs[0], bias) if known and bias is not None else None

    @cached_property
    def _shifts(self) -> frozenset[ir.Node]:
        """The additions of the biases of recurrent layers."""
        within = {use.node for layer in self.layers.values() if layer.bias is not None for use in layer.bias.uses()}
        return frozenset(within.union(*(biases_before(layer.part) for layer in self.layers.values())))

    def _gather(self, node: ir.Node, weight: Weight) -> Call | Refusal | None:
        if attributes_of(node).get("axis", 0) not in (0, -2) or len(weight.shape) != 2:
            return None  # not rows of a table
        return self._make(node, Embedding(weight.numbers), weight)

    def _recurrent(self, node: ir.Node, weight: Weight) -> Call | Refusal:
        """Return the product of the input and the input weight (directions, gates, features)."""
        if len(weight.shape) != 3:
            return Refusal(f"its weight has {len(weight.shape)} axes, not 3")
        call = self._make(node, Linear(weight.numbers.flatten(0, 1)), weight)
        return replace(call, value=self.numbers[self.gates[node]], reader=self.number(node))

    @cached_property
    def calling(self) -> frozenset[ir.Node]:
        """The nodes of all calls."""
        return frozenset(self.node(value) for each in self.elements if isinstance(each, Call) for value in each.values)

    @cached_property
    def left(self) -> tuple[Left, ...]:
        """What reads weights, but is not the call of an operator, with reasons."""
        return left_of(self)


def _gates_of(node: ir.Node) -> ir.Value:
    return ir.Value(name=f"{node.name or node.op_type}.gates")
