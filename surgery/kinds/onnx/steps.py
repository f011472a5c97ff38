"""One step of a recurrent layer as the body of a Scan: written, and recognised whoever wrote it.

    h, c, part  ->  i, f, g, o = part + R h      c' = s(f) c + s(i) tanh(g)      h' = s(o) tanh(c')

The gates are in torch's order, as surgery exports such layers; ``part`` is W x with its bias, and s is the sigmoid. A
body is recognised by what it computes: each output is read as one expression of h, c, part, R h and a bias, in which
slices have moved to the leaves and the terms of sums and products have one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import onnx_ir as ir

from surgery.kinds.onnx.modes import GATES
from surgery.kinds.onnx.weights import held, is_plain
from surgery.sites import Loop

__all__ = ["Layer", "Write", "biases_before", "layer_of", "write_step"]

_FUNCTIONS, _ARITHMETIC = ("Sigmoid", "Tanh", "Relu"), ("Add", "Mul", "Sub")
_NAMES = {
    *("body", "num_scan_inputs", "scan_input_axes", "scan_input_directions"),
    *("scan_output_axes", "scan_output_directions"),
}
_MOST_NODES = 64  # of a body that may be a step
_MOST_TERMS = 256  # of a step; that of an LSTM has 40, and a body that adds a value to itself 60 times has 2 ** 60
_COUNTED_SPLIT = 18  # the first opset in which Split has to be told the number of parts

Write = Callable[..., list[ir.Value]]  # it gets an operator, the values to read, and the number of outputs
_Term = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Layer:
    """A Scan that is a recurrent layer of one direction.

    ``part`` is the value outside over whose rows it runs, and ``states`` are those that it starts from. In the body,
    ``hidden`` is the state that the recurrent weight multiplies, ``product`` is what that gives, and ``bias`` is added.
    """

    scan: ir.Node
    mode: str
    hidden: ir.Value
    product: ir.Value
    bias: ir.Value | None
    backwards: bool

    @property
    def body(self) -> ir.Graph:
        """The graph of one step."""
        found: ir.Graph = self.scan.attributes["body"].as_graph()
        return found

    @property
    def part(self) -> ir.Value:
        """The value whose rows are the steps."""
        value = self.scan.inputs[-1]
        assert value is not None  # of a Scan, no input may be left out
        return value

    @property
    def states(self) -> tuple[ir.Value, ...]:
        """The hidden states, and of an LSTM the cell states, before the first step."""
        return tuple(value for value in self.scan.inputs[:-1] if value is not None)

    @property
    def loop(self) -> Loop:
        """The loop as one that can be timed."""
        return Loop(self.mode, batch_first=False)


# -- write ------------------------------------------------------------------------------------------------------------


def write_step(mode: str, write: Write, inputs: Sequence[ir.Value], product: ir.Value, opset: int) -> list[ir.Value]:
    """Write the nodes of one step on its states and its part; return the states after it."""
    *states, part = inputs
    if mode == "LSTM":
        [both] = write("Add", part, product)
        gates = write("Split", both, outputs=4, **_split(4, opset))
        i, f, o = (write("Sigmoid", gates[at])[0] for at in (0, 1, 3))
        [c] = write("Add", *write("Mul", f, states[1]), *write("Mul", i, *write("Tanh", gates[2])))
        return [*write("Mul", o, *write("Tanh", c)), c]
    if mode == "GRU":
        # n = tanh(part_n + r product_n), h' = n + z (h - n)
        parts, products = (write("Split", x, outputs=3, **_split(3, opset)) for x in (part, product))
        r, z = (write("Sigmoid", *write("Add", parts[at], products[at]))[0] for at in (0, 1))
        [n] = write("Tanh", *write("Add", parts[2], *write("Mul", r, products[2])))
        return write("Add", n, *write("Mul", z, *write("Sub", states[0], n)))
    return write("Tanh" if mode == "RNN_TANH" else "Relu", *write("Add", part, product))


def _split(count: int, opset: int) -> dict[str, int]:
    return {"axis": -1} if opset < _COUNTED_SPLIT else {"axis": -1, "num_outputs": count}


# -- recognise --------------------------------------------------------------------------------------------------------


def layer_of(scan: ir.Node) -> Layer | None:
    """Return the recurrent layer that a node is; None for any other node."""
    known = scan.op_type == "Scan" and is_plain(scan) and _NAMES.issuperset(scan.attributes)
    body = scan.attributes.get("body") if known else None
    if body is None or body.type != ir.AttributeType.GRAPH or body.is_ref() or len(body.value) > _MOST_NODES:
        return None
    said = {name: attribute.value for name, attribute in scan.attributes.items() if name != "body"}
    ways = [tuple(said.get(f"scan_{end}_directions", (0,))) for end in ("input", "output")]
    axes = [axis for end in ("input", "output") for axis in said.get(f"scan_{end}_axes", ())]
    states = len(scan.inputs) - 1
    if said.get("num_scan_inputs") != 1 or any(axes) or states not in (1, 2) or ways[0] != ways[1]:
        return None
    if ways[0] not in ((0,), (1,)) or None in scan.inputs:
        return None
    return _step_in(scan, body.as_graph(), states, backwards=ways[0] == (1,))


def _step_in(scan: ir.Node, body: ir.Graph, states: int, *, backwards: bool) -> Layer | None:
    if len(body.inputs) != states + 1 or len(body.outputs) != states + 1 or len(scan.outputs) != states + 1:
        return None
    for node in body:
        for product in node.outputs:
            for mode in ("LSTM",) if states == 2 else ("GRU", "RNN_TANH", "RNN_RELU"):
                found = _matched(body, mode, product)
                if found is not None:
                    return Layer(scan, mode, body.inputs[0], product, *found, backwards)
    return None


def biases_before(part: ir.Value) -> list[ir.Node]:
    """Return the additions of vectors that end in a value, the first of them first, also behind a Slice."""
    found: list[ir.Node] = []
    value: ir.Value | None = part
    while value is not None and (node := value.producer()) is not None and is_plain(node):
        if node.op_type == "Add" and (value is part or len(value.uses()) == 1):
            vectors = [each for each in node.inputs if (held_by := held(each)) is not None and len(held_by.shape) == 1]
            if len(vectors) != 1:
                break
            found.insert(0, node)
            value = next(each for each in node.inputs if each is not vectors[0])
        elif node.op_type == "Slice" and not found:
            value = node.inputs[0]
        else:
            break
    return found


def _matched(body: ir.Graph, mode: str, product: ir.Value) -> tuple[ir.Value | None] | None:
    """Return the bias if a body is a step of this mode with this recurrent product, as a row of one; else None."""
    reading = _Reading(body, product)
    try:
        found = [reading.term(value) for value in body.outputs]
    except _Unread:
        return None
    wanted = list(_step_of(mode, biased=reading.bias is not None))
    return (reading.bias,) if found == [*wanted, wanted[0]] else None


class _Unread(Exception):
    """Something in a body is no part of a step."""


class _Reading:
    """Reads values of a body as expressions; ``bias`` is the one vector from outside that they read, if any."""

    def __init__(self, body: ir.Graph, product: ir.Value) -> None:
        *states, part = body.inputs
        self._leaves = dict(zip((*states, part, product), (*("h", "c")[: len(states)], "part", "product"), strict=True))
        self._body, self._terms = body, 0
        self.bias: ir.Value | None = None

    def term(self, value: ir.Value | None, start: Fraction = Fraction(0), end: Fraction = Fraction(1)) -> _Term:
        """Return the expression of a value between two places of its last axis, as shares of that axis.

        Example: the second of two halves of tanh(x) is ("Tanh", ("x", 1/2, 1)).
        """
        self._terms += 1
        if self._terms > _MOST_TERMS:
            raise _Unread
        if value in self._leaves:
            return (self._leaves[value], start, end)
        node = None if value is None else value.producer()
        if node is None or node.graph is not self._body:
            return ("bias", *self._outside(value, start, end))
        if not is_plain(node):
            raise _Unread
        if node.op_type == "Identity":
            return self.term(node.inputs[0], start, end)
        if node.op_type in _FUNCTIONS:
            return (node.op_type, self.term(node.inputs[0], start, end))
        if node.op_type in _ARITHMETIC:
            terms = [self.term(each, start, end) for each in node.inputs]
            return (node.op_type, *(terms if node.op_type == "Sub" else sorted(terms, key=repr)))
        first, last = self._share(node, value)
        size = last - first
        return self.term(node.inputs[0], first + start * size, first + end * size)

    def _outside(self, value: ir.Value | None, start: Fraction, end: Fraction) -> tuple[Fraction, Fraction]:
        numbers = held(value)
        if value is None or numbers is None or len(numbers.shape) != 1 or self.bias not in (None, value):
            raise _Unread
        self.bias = value
        return start, end

    def _share(self, node: ir.Node, value: ir.Value | None) -> tuple[Fraction, Fraction]:
        """Return which share of its input's last axis a Split or a Slice gives."""
        said = {name: attribute.value for name, attribute in node.attributes.items()}
        if node.op_type == "Split":
            count = len(node.outputs)
            sizes = said.get("split") or (None if len(node.inputs) < 2 else _numbers(node.inputs[1]))
            if said.get("axis", 0) not in (1, -1) or (sizes is not None and len(set(sizes)) > 1):
                raise _Unread
            at = list(node.outputs).index(value)  # type: ignore[arg-type]  # it is one of them
            return Fraction(at, count), Fraction(at + 1, count)
        width = self._width(node.inputs[0])
        rows = [_numbers(each) for each in node.inputs[1:]] if node.op_type == "Slice" else []
        if width is None or len(rows) < 3 or any(row is None or len(row) != 1 for row in rows):
            raise _Unread
        [start], [end], [axis], [step] = (*rows[:3], rows[3] if len(rows) > 3 else [1])  # type: ignore[misc]
        if axis not in (1, -1) or step != 1 or not 0 <= start < end:
            raise _Unread
        return Fraction(start, width), Fraction(min(end, width), width)

    def _width(self, value: ir.Value | None) -> int | None:
        """Return the size of a value's last axis, as the graph or the nodes before it say."""
        while value is not None:
            if self._leaves.get(value) == "product":
                value = self._body.inputs[-1]  # as wide as the part, with which it is added up
            size = value.shape[-1] if value.shape is not None and len(value.shape) else None
            node = value.producer()
            if isinstance(size, int) or node is None or node.op_type not in (*_FUNCTIONS, *_ARITHMETIC, "Identity"):
                return size if isinstance(size, int) else None
            value = node.inputs[0]
        return None


def _numbers(value: ir.Value | None) -> list[int] | None:
    tensor = held(value)
    return None if tensor is None or len(tensor.shape) != 1 else [int(each) for each in tensor.numpy()]


def _step_of(mode: str, *, biased: bool) -> Iterator[_Term]:
    """Yield the states after a step as expressions."""
    count = GATES[mode]

    def rows(name: str, at: int) -> _Term:
        return (name, Fraction(at, count), Fraction(at + 1, count))

    def product(at: int) -> _Term:
        return _both("Add", rows("product", at), rows("bias", at)) if biased else rows("product", at)

    def gate(at: int) -> _Term:
        return _both("Add", rows("part", at), product(at))

    h, c = (("h", Fraction(0), Fraction(1)), ("c", Fraction(0), Fraction(1)))
    if mode == "LSTM":
        i, f, o = (("Sigmoid", gate(at)) for at in (0, 1, 3))
        after = _both("Add", _both("Mul", f, c), _both("Mul", i, ("Tanh", gate(2))))
        yield _both("Mul", o, ("Tanh", after))
        yield after
    elif mode == "GRU":
        r, z = (("Sigmoid", gate(at)) for at in (0, 1))
        n = ("Tanh", _both("Add", rows("part", 2), _both("Mul", r, product(2))))
        yield _both("Add", n, _both("Mul", z, ("Sub", h, n)))
    else:
        yield ("Tanh" if mode == "RNN_TANH" else "Relu", gate(0))


def _both(op: str, *terms: _Term) -> _Term:
    return (op, *sorted(terms, key=repr))
