"""An ONNX graph that is being changed: its numbered values, its weights and names, and its record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from surgery.errors import CheckError, FileError
from surgery.kinds.onnx.left import is_recurrent
from surgery.kinds.onnx.origin import describe
from surgery.kinds.onnx.read import Reader
from surgery.kinds.onnx.tensors import to_ir
from surgery.kinds.onnx.weights import View, held, is_view
from surgery.sites import Call, Part, Record

__all__ = [
    "RECORD",
    "EditedGraph",
    "parameter_of",
    "producer_of",
    "read_metadata",
    "read_record",
    "set_numbers",
]

RECORD = "surgery"  # in metadata_props
_ALL_INPUTS = 4  # before this version of the format, every initializer is an input too


def read_metadata(model: ir.Model) -> Any:
    """Return the JSON values of surgery in the metadata of a model; None if there are none.

    Raises:
        FileError: they are not JSON.
    """
    said = model.metadata_props.get(RECORD)
    try:
        return None if said is None else json.loads(said)
    except (ValueError, RecursionError) as error:
        raise FileError("has a damaged record of factored layers", next_step="get the file again") from error


def read_record(model: ir.Model) -> Record:
    """Return the record that a model carries; an empty record if there is none.

    Raises:
        FileError: the record is damaged.
    """
    value = read_metadata(model)
    return Record() if value is None else Record.from_json(value)


class EditedGraph:
    """A graph with its readings, the last of which is ``reader``, and its record."""

    def __init__(self, model: ir.Model) -> None:
        self.model, self.graph = model, model.graph
        self.record = read_record(model)
        self._place: int | None = None  # among the graph's inputs: where new weights go, if they are inputs
        self.fused: set[ir.Node] = set()  # the nodes that edits have put in the places of chains
        self.home = self.graph  # the graph that gets new weights: that of the weights in whose place they stand
        graphs = (self.graph, *self.graph.subgraphs())
        rows = ((value, at) for graph in graphs for at, value in enumerate(graph.initializers.values()))
        self._order: dict[ir.Value, tuple[int, ...]] = {value: (at,) for value, at in rows}
        self._last = (len(self._order),)  # the place of what stands in no initializer's place
        self._beside: tuple[int, ...] = self._last  # the place of new weights among the initializers
        self.reader = Reader(self.model)
        self._readers = [self.reader]
        self.made: dict[int, tuple[Tensor, ir.Value]] = {}  # the tensors of factors, by identity, and their values
        self._now: dict[ir.Value, ir.Value] = {}  # what stands in the place of a value
        self.names = {value.name for value in _all_values(self.graph)} | set(self.graph.initializers)

    @property
    def opset(self) -> int:
        """The version of ONNX's own operators."""
        imports = self.model.opset_imports
        return imports.get("", imports.get("ai.onnx", 1))

    def tie(self, name: str, other: str) -> None:
        """Record that a factor would have another name as well, since it is that of several sites."""
        if name != other and (name, other) not in self.record.ties:
            self.record = replace(self.record, ties=(*self.record.ties, (name, other)))

    def forget_ties(self, site: str) -> None:
        """Drop what was recorded of the names of a site's factors."""
        ties = (tie for tie in self.record.ties if not any(name.startswith(f"{site}.") for name in tie))
        self.record = replace(self.record, ties=tuple(ties))

    def reread(self) -> None:
        """Read the graph as it is now; the numbers of earlier values stay valid."""
        self._readers.append(Reader(self.model, self.reader.end + 1))
        self.reader = self._readers[-1]

    def value(self, number: int) -> ir.Value:
        """Return the value that has a number, or what stands in its place now."""
        # Each reading begins behind the end of the one before: the last that does not begin behind the number has it.
        reader = next(each for each in reversed(self._readers) if each.start <= number)
        value = reader.values[number - reader.start]
        while value in self._now:
            value = self._now[value]
        return value

    def user(self, call: Call) -> ir.Node:
        """Return the node that reads the weight of a call."""
        return producer_of(self.value(call.user))

    def loop(self, call: Call) -> ir.Node | None:
        """Return the recurrent node of which a call gives the gates; None for any other call."""
        node = self.user(call)
        return node if is_recurrent(node) else None

    def parameter(self, name: str) -> ir.Value:
        """Return the value of a weight or a bias by its name."""
        return self.reader.roots[name]

    def move_to(self, value: ir.Value) -> None:
        """Add new weights to the graph that has a weight, and to its inputs if the weight is one of them."""
        node = value.producer()
        home = value.graph if node is None else node.graph
        assert isinstance(home, ir.Graph)
        self.home, self._beside = home, self._order.get(value, self._last)
        self._place = self.graph.inputs.index(value) if value in self.graph.inputs else None

    def move_to_top(self) -> None:
        """Add new numbers to the outermost graph, behind all others; every node can read them there."""
        self.home, self._beside, self._place = self.graph, self._last, None

    def add_parameter(self, name: str, tensor: Tensor, *, weight: bool = True) -> ir.Value:
        """Add an initializer, a ``weight`` or other numbers."""
        if name in self.names:
            raise CheckError(f"the graph has a value named {name} already", next_step="rename that value")
        value = parameter_of(name, tensor)
        self._order[value] = (*self._beside, len(self._order))
        self.names.add(name)
        self._list(value, weight=weight)
        return value

    def _list(self, value: ir.Value, *, weight: bool = True) -> None:
        """List an initializer, and among the inputs if those in whose place it stands are."""
        self.home.register_initializer(value)
        if weight and self._place is not None:
            self.graph.inputs.insert(self._place, value)
            self._place += 1
        elif self.model.ir_version < _ALL_INPUTS and self.home is self.graph:
            self.graph.inputs.append(value)

    def exchange(self, olds: Sequence[ir.Value], news: Sequence[ir.Value]) -> None:
        """Let new weights stand where others stood; of these, those go that nothing reads any more.

        A new one whose name is taken gets another.
        """
        self.move_to(olds[0])
        for old in olds:
            self.drop_unused(old)
        for new in news:
            new.name = self.note_name(self.new_name(new.name or ""))
            self._order.setdefault(new, (*self._beside, len(self._order)))
            self._list(new)

    def put_back(self, value: ir.Value, *, beside: ir.Value) -> None:
        """Let an initializer that was dropped hold its numbers again, in front of another."""
        self.home.register_initializer(value)
        self.names.add(value.name)
        if beside in self.graph.inputs:
            self.graph.inputs.insert(self.graph.inputs.index(beside), value)

    def sort_initializers(self) -> None:
        """Let new weights be listed where those were in whose place they stand."""
        for graph in (self.graph, *self.graph.subgraphs()):
            known = graph.initializers
            known.data = dict(sorted(known.items(), key=lambda pair: self._order.get(pair[1], self._last)))

    def drop_unused(self, value: ir.Value) -> None:
        """Drop a weight or a bias that nothing reads any more, and the nodes that passed it on."""
        for use in list(value.uses()):
            if is_view(use.node) and use.idx == 0:
                self._drop_view(use.node)
        if list(value.uses()) or value.is_graph_output():
            return
        name = value.name or ""
        self.names.discard(name)
        if value.is_initializer():
            if value in self.graph.inputs:
                self.graph.inputs.remove(value)
            del value.graph.initializers[name]  # type: ignore[union-attr]
        elif (node := value.producer()) is not None:
            node.graph.remove(node, safe=True)  # type: ignore[union-attr]

    def _drop_view(self, node: ir.Node) -> None:
        """Drop a node that passes a weight on, and the views after it, if nothing reads it."""
        passed = node.outputs[0]
        for use in list(passed.uses()):
            if is_view(use.node) and use.idx == 0:
                self._drop_view(use.node)
        if list(passed.uses()) or passed.is_graph_output():
            return
        said = [value for value in node.inputs[1:] if value is not None]
        self.names.discard(passed.name or "")
        node.graph.remove(node, safe=True)  # type: ignore[union-attr]
        for value in said:
            self.drop_unused(value)

    def add_views(self, views: Sequence[View], root: ir.Value, before: ir.Node) -> ir.Value:
        """Insert views of a weight in front of a node, and return the value of the last."""
        value = root
        if before.graph is not self.home:  # a node in a branch; what others read as well stands outside of it
            before = self.home[0]
        for view in views:
            inputs = [value]
            if view.as_input is not None:
                inputs.append(self.sizes(view.as_input, view.said))
            attributes = [] if view.attribute is None else [view.attribute]
            node = ir.Node("", view.op_type, inputs, attributes, num_outputs=1, name=view.name)
            name = view.output if view.output and view.output not in self.names else self.new_name(f"{root.name}.view")
            node.outputs[0].name = self.note_name(name)
            self.home.insert_before(before, node)
            value = node.outputs[0]
        return value

    def sizes(self, name: str, numbers: Sequence[int]) -> ir.Value:
        """Return an initializer with whole numbers, under this name if it is free."""
        found = self.home.initializers.get(name)
        known = None if found is None or found.const_value is None else found.const_value
        if found is not None and known is not None and known.numpy().tolist() == list(numbers):
            return found
        return self.add_parameter(self.new_name(name), torch.tensor(list(numbers), dtype=torch.int64), weight=False)

    def is_read_by_others(self, name: str, parts: Sequence[Part]) -> bool:
        """Whether something besides these calls, or parts of chains, reads a parameter."""
        own = {number for part in parts for number in (*part.values, *(call.user for call in part.calls))}
        return bool(self.reader.uses.get(name, frozenset()) - own)

    def new_name(self, stem: str) -> str:
        """Return a name that no value has."""
        name, number = stem, 1
        while name in self.names:
            name, number = f"{stem}_{number}", number + 1
        return name

    def is_free(self, name: str) -> bool:
        """Whether no value has a name that new weights would see, or would hide; branches do not see each other."""
        if name not in self.names:
            return True
        graphs = (self.graph, *self.graph.subgraphs())
        around = [graph for graph in graphs if graph is self.home or self.home in graph.subgraphs()]
        return not any(name in _own_names(graph) for graph in (*around, *self.home.subgraphs()))

    def note_name(self, name: str) -> str:
        """Return a name; no other value gets it from now on."""
        self.names.add(name)
        return name

    def rename(self, before: str, after: str) -> None:
        """Rename an initializer."""
        value = self.home.initializers[before]
        del self.home.initializers[before]
        value.name = after
        if value.const_value is not None:
            value.const_value.name = after
        self.home.initializers[after] = value
        self.names.discard(before)
        self.names.add(after)

    def stand_in(self, old: ir.Value, new: ir.Value, nodes: Sequence[ir.Node]) -> None:
        """Let one value stand in the place of another, under its name, and remove the nodes that computed that."""
        name, new.type, new.shape = old.name, old.type, old.shape
        describe(new, old)
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self._now[old] = new
        self._now.pop(new, None)  # it may be what stood there before
        if nodes:
            nodes[0].graph.remove(nodes, safe=True)  # type: ignore[union-attr]
        old.name, new.name = None, name


def parameter_of(name: str, tensor: Tensor) -> ir.Value:
    """Return a value with numbers, which no graph lists yet."""
    numbers = to_ir(tensor, name)
    return ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(numbers.dtype), const_value=numbers)


def set_numbers(value: ir.Value, tensor: Tensor) -> None:
    """Give a weight or a bias other numbers; it keeps its notes."""
    numbers = to_ir(tensor, value.name or "")
    before, producer = held(value), value.producer()
    if before is not None:
        describe(numbers, before)
    if producer is None:
        value.const_value = numbers
    else:
        producer.attributes["value"] = ir.AttrTensor("value", numbers)


def producer_of(value: ir.Value) -> ir.Node:
    """Return the node that gives a value."""
    node = value.producer()
    assert node is not None  # a node gives the value of a call
    return node


def _own_names(graph: ir.Graph) -> set[str | None]:
    return {*graph.initializers, *(value.name for value in graph.inputs), *(v.name for n in graph for v in n.outputs)}


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    """Return the values of a graph and of all bodies in it."""
    found = [*graph.inputs]
    for node in graph.all_nodes():
        found += node.outputs
    for inner in graph.subgraphs():
        found += [*inner.inputs, *inner.initializers.values()]
    return found
