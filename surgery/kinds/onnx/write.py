"""An open ONNX model: nodes of operators are replaced by those of chains, and chains by operators.

The factors of site P are named P.0.weight, P.1.weight, ...; a bias keeps its name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import onnx_ir as ir
from torch import Tensor

from surgery.algebra import (
    Branches,
    Chain,
    Conv,
    Embedding,
    Flatten,
    Layout,
    Linear,
    Operator,
    Shape,
    Shift,
    Step,
    Transpose,
    Unflatten,
)
from surgery.errors import CheckError, FileError, InputError
from surgery.kinds.base import OpenModel
from surgery.kinds.inputs import Inputs
from surgery.kinds.observed import Observed
from surgery.kinds.onnx.nodes import (
    NodeWriter,
    write_conv,
    write_embedding,
    write_linear,
    write_reshape,
    write_transpose,
)
from surgery.kinds.onnx.read import MARK, Reader
from surgery.kinds.onnx.run import ObservedOnnx, Shapes
from surgery.kinds.onnx.tensors import numbers_of, to_ir, to_torch
from surgery.sites import (
    Call,
    Edit,
    Entry,
    Flow,
    FusableChain,
    Fuse,
    Key,
    Part,
    Placement,
    Record,
    Replace,
    Tensors,
    calls_of,
)
from surgery.system.importing import Lazy

__all__ = ["RECORD", "OpenOnnx", "read_metadata", "read_record"]

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


class OpenOnnx(OpenModel):
    """An open ONNX model; it edits a copy of the graph, which shares tensors with the model."""

    def __init__(self, model: ir.Model, inputs: Inputs) -> None:
        self.model = model.clone()
        self.graph = self.model.graph
        self.inputs = inputs
        self.record = read_record(model)
        self.reader = Reader(self.graph)
        self._readers = [self.reader]
        self._now: dict[ir.Value, ir.Value] = {}  # what stands in the place of a value
        self._names = {value.name for value in _all_values(self.graph)} | set(self.graph.initializers)

    def observe(self) -> Observed:
        """Return the model, to be run by onnxruntime in parts, between which values are seen."""
        return ObservedOnnx(self.model, self.reader, lambda: self.flow)

    @cached_property
    def flow(self) -> Flow:
        """The graph as it was when it was opened, or last reopened."""
        reader = self.reader
        every = range(reader.start, reader.end + 1)
        shapes = Shapes(self.model, reader, self.inputs)
        known: Lazy[int, Shape] = Lazy(every, shapes.of)
        calls = {element.value: element for element in reader.elements if isinstance(element, Call)}
        return Flow(
            reader.elements,
            reader.users,
            self._tensors(),
            known,
            Lazy(every, lambda value: known[calls[value].source]),
            Lazy(every, shapes.macs),
            Lazy(every, lambda value: reader.label(value)),
            reader.left,
            origins=self.record.origins,
            recorded=frozenset(self.record.sites),
            any_padding=True,
        )

    def _tensors(self) -> Tensors:
        found = self.reader.parameters
        uses: dict[Key, frozenset[int]] = {name: users for name, users in self.reader.uses.items() if name in found}
        return Tensors({name: name for name in found}, {name: numbers_of(t) for name, t in found.items()}, uses)

    def apply(self, edit: Edit) -> None:
        """Carry out an edit at all calls that it concerns."""
        if isinstance(edit, Replace):
            self._replace(edit.placement, edit.chain)
        else:
            assert isinstance(edit.chain, FusableChain)  # in a graph of nodes no chain is a module
            self._fuse(edit.chain)

    # -- values and tensors -------------------------------------------------------------------------------------------

    def _value(self, number: int) -> ir.Value:
        """Return the value that has a number, or what stands in its place now."""
        reader = next(each for each in reversed(self._readers) if each.start <= number)
        value = reader.values[number - reader.start]
        while value in self._now:
            value = self._now[value]
        return value

    def _parameter(self, name: str) -> ir.Value:
        """Return the value of a weight or a bias by its name."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return next(node.outputs[0] for node in self.graph if node.outputs and node.outputs[0].name == name)

    def add_parameter(self, name: str, tensor: Tensor) -> ir.Value:
        """Add an initializer."""
        if name in self._names:
            raise CheckError(f"the graph has a value named {name} already", next_step="rename that value")
        numbers = to_ir(tensor, name)
        value = ir.Value(
            name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(numbers.dtype), const_value=numbers
        )
        self.graph.register_initializer(value)
        self._names.add(name)
        if self.model.ir_version < _ALL_INPUTS:
            self.graph.inputs.append(value)
        return value

    def _drop_unused(self, value: ir.Value) -> None:
        """Drop a weight or a bias that nothing reads any more, and the nodes that passed it on."""
        for use in list(value.uses()):
            passed = use.node.outputs[0]
            if use.node.op_type == "Identity" and not list(passed.uses()) and not passed.is_graph_output():
                self.graph.remove(use.node, safe=True)
        if list(value.uses()) or value.is_graph_output():
            return
        name = value.name or ""
        self._names.discard(name)
        if value.is_initializer():
            if value in self.graph.inputs:
                self.graph.inputs.remove(value)
            del self.graph.initializers[name]
        elif (node := value.producer()) is not None:
            self.graph.remove(node, safe=True)

    def _is_read_by_others(self, name: str, calls: Sequence[Call]) -> bool:
        own = {number for call in calls for number in (call.value, call.user)}
        return bool(self.reader.uses.get(name, frozenset()) - own)

    # -- replace ------------------------------------------------------------------------------------------------------

    def _replace(self, placement: Placement, chain: Chain) -> None:
        site, calls = placement.site, placement.calls
        first = calls[0]
        writer = _ChainWriter(self, turned=first.stored == "in_out")
        for place, part in chain.places:
            if isinstance(part, Operator):
                writer.named[id(part.weight)] = (f"{site.name}.{place}.weight", part.weight)
        weight = self._parameter(first.weight)
        entry = Entry(weight=first.weight, stored=first.stored, origin=chain.origin)
        for call in calls:
            self._replace_call(call, chain, writer, site.operator.bias, calls)
        self._drop_unused(weight)
        self.record = self.record.with_site(site.name, entry)

    def _replace_call(
        self, call: Call, chain: Chain, writer: _ChainWriter, before: Tensor | None, calls: Sequence[Call]
    ) -> None:
        bias = None if call.bias is None else self._parameter(call.bias)
        if bias is not None and not self._is_read_by_others(call.bias or "", calls):
            self._move_bias(bias, before, chain.bias)
        computed = None if call.computed_bias is None else self._value(call.computed_bias)
        old = self._value(call.value)
        gemm = _producer(self._value(call.user)).op_type == "Gemm"
        shape: Shape | None = None
        writer.start(self._value(call.source))
        for number, step in enumerate(chain.steps):
            last = number == len(chain.steps) - 1
            shape = self._write(writer, step, shape, call, gemm=gemm, bias=(bias or computed) if last else None)
        self._put(writer, call, old)

    def _move_bias(self, bias: ir.Value, before: Tensor | None, after: Tensor | None) -> None:
        """Give a bias the numbers that it has after the chain; calls of one site may have biases of their own."""
        if before is None or after is None or before is after or before.is_meta or after.is_meta:
            return
        weight = self.reader.weight(bias)
        assert weight is not None  # it is the bias of a call
        moved = weight.numbers + (after - before).to(weight.numbers)
        self._set(bias, moved.to(weight.numbers))

    def _set(self, value: ir.Value, tensor: Tensor) -> None:
        numbers = to_ir(tensor, value.name or "")
        producer = value.producer()
        if producer is None:
            value.const_value = numbers
        else:
            producer.attributes["value"] = ir.AttrTensor("value", numbers)

    def _write(
        self,
        writer: _ChainWriter,
        step: Step,
        shape: Shape | None,
        call: Call,
        *,
        gemm: bool,
        bias: ir.Value | None,
    ) -> Shape | None:
        """Append the nodes of one step; return the shape of its output if the step needs that of its input."""
        if isinstance(step, Unflatten | Flatten | Transpose):
            shape = self.flow.shapes[call.source] if shape is None else shape
            writer.reshape(step, shape)
            return step.out_shape(shape)
        if isinstance(step, Shift):
            assert bias is not None  # a chain has a shift for the bias of its call
            writer.read("Add", bias)
            return shape
        if isinstance(step, Branches):
            writer.branches(step, gemm=gemm)
        elif isinstance(step, Operator):
            writer.operator(step, gemm=gemm, bias=bias)
        else:
            raise InputError(f"there is no known ONNX node for {type(step).__name__}")
        return None if shape is None else step.out_shape(shape)

    def _put(self, writer: _ChainWriter, part: Call | Sequence[Part], old: ir.Value) -> None:
        """Insert the nodes of a writer, and let their last value stand in the place of ``old``."""
        numbers = part.values if isinstance(part, Call) else [number for each in part for number in each.values]
        values = [self._value(number) for number in numbers]
        nodes = list(dict.fromkeys(_producer(value) for value in values))
        new = writer.finish(before=_producer(old))
        name, new.type, new.shape = old.name, old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self._now[old] = new
        self.graph.remove(nodes, safe=True)
        old.name, new.name = None, name

    def new_name(self, stem: str) -> str:
        """Return a name that no value has."""
        name, number = stem, 1
        while name in self._names:
            name, number = f"{stem}_{number}", number + 1
        return name

    def note_name(self, name: str) -> str:
        """Return a name; no other value gets it from now on."""
        self._names.add(name)
        return name

    # -- fuse ---------------------------------------------------------------------------------------------------------

    def _fuse(self, chain: FusableChain) -> None:
        entry = self.record.sites.get(chain.sites[0], Entry())
        for site in chain.sites:
            self.record = self.record.without(site)
        every = [part for row in chain.rows for part in row]
        calls = calls_of(every)
        stored: Layout = entry.stored or calls[-1].stored
        writer = _ChainWriter(self, turned=stored == "in_out")
        used = dict.fromkeys([*(call.weight for call in calls), *(name for part in every for name in _biases(part))])
        parameters = [self._parameter(name) for name in used]
        weight = chain.operators[0].weight
        own = entry.weight or f"{chain.sites[0]}.weight"
        name = own if own not in self._names or own in used else self.new_name(own)
        # a factor may have the very name that the weight gets; it goes first
        renamed = name if name not in self._names else self.new_name(f"{name}.fused")
        done: dict[str, ir.Value] = {}
        for row, operator in zip(chain.rows, chain.operators, strict=True):
            writer.named[id(operator.weight)] = (renamed, weight)
            self._fuse_row(row, operator, chain.sites[0], writer, done, calls)
        for parameter in parameters:
            self._drop_unused(parameter)
        if renamed != name:
            self._rename(renamed, name)

    def _fuse_row(
        self,
        row: Sequence[Part],
        operator: Operator,
        site: str,
        writer: _ChainWriter,
        done: dict[str, ir.Value],
        calls: Sequence[Call],
    ) -> None:
        old = self._value(row[-1].value)
        own = calls_of(row)
        gemm = _producer(self._value(own[-1].user)).op_type == "Gemm"
        computed = own[-1].computed_bias if row[-1].calls else None
        bias = None if computed is None else self._value(computed)
        if operator.bias is not None:
            bias = self._fused_bias(row, operator.bias, site, done, calls)
        writer.start(self._value(row[0].source))
        writer.operator(operator, gemm=gemm, bias=bias)
        self._put(writer, row, old)

    def _fused_bias(
        self, row: Sequence[Part], numbers: Tensor, site: str, done: dict[str, ir.Value], calls: Sequence[Call]
    ) -> ir.Value:
        """Return the bias of a fused row: that of the chain, which keeps its name, or a new one with its numbers."""
        names = [name for part in row for name in _biases(part)]
        name = names[-1] if names else f"{site}.bias"
        if name in done:
            return done[name]
        if not names:
            done[name] = self.add_parameter(self.new_name(name), numbers)
            return done[name]
        bias = self._parameter(name)
        if len(names) > 1:
            if self._is_read_by_others(name, calls):
                bias = self.add_parameter(self.new_name(f"{site}.bias"), numbers)
            else:
                self._set(bias, numbers)
        done[name] = bias
        return bias

    def _rename(self, before: str, after: str) -> None:
        value = self.graph.initializers[before]
        del self.graph.initializers[before]
        value.name = after
        if value.const_value is not None:
            value.const_value.name = after
        self.graph.initializers[after] = value
        self._names.discard(before)
        self._names.add(after)

    def reopen(self, placements: Sequence[Placement]) -> dict[str, Placement]:
        """Put operators without numbers in the place of chains, and return their new placements by site name."""
        if not placements:
            return {}
        entries = {placement.site.name: self.record.sites[placement.site.name] for placement in placements}
        for placement in placements:
            assert placement.chain is not None  # it is the site of a chain
            self.apply(Fuse(placement.chain))
        self._readers.append(Reader(self.graph, self.reader.end + 1))
        self.reader = self._readers[-1]
        vars(self).pop("flow", None)
        calls = [element for element in self.reader.elements if isinstance(element, Call)]
        names = {site: entry.weight or f"{site}.weight" for site, entry in entries.items()}
        return {
            p.site.name: Placement(p.site, tuple(c for c in calls if c.weight == names[p.site.name]))
            for p in placements
        }

    def finish(self) -> ir.Model:
        """Return the changed model, with its record."""
        if self.record:
            self.model.metadata_props[RECORD] = json.dumps(self.record.to_json())
        else:
            self.model.metadata_props.pop(RECORD, None)
        return self.model

    @property
    def notes(self) -> Mapping[str, str]:
        """Nothing: what is fused is exactly one operator."""
        return {}


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None  # a node gives the value of a call
    return node


def _biases(part: Part) -> list[str]:
    if isinstance(part, Call):
        return [] if part.bias is None else [part.bias]
    return [] if part.bias is None else [part.bias]


def _all_values(graph: ir.Graph) -> list[ir.Value]:
    """Return the values of a graph and of all bodies in it."""
    found = [*graph.inputs]
    for node in graph.all_nodes():
        found += node.outputs
    for inner in graph.subgraphs():
        found += [*inner.inputs, *inner.initializers.values()]
    return found


class _ChainWriter(NodeWriter):
    """Writes the nodes of a chain on values of a graph; each weight becomes one initializer.

    ``named`` has the name of each weight and its numbers, by the identity of the tensor. The weights of linear layers
    are stored transposed if ``turned``.
    """

    def __init__(self, open_: OpenOnnx, *, turned: bool) -> None:
        super().__init__()
        self._open, self.turned = open_, turned
        self.named: dict[int, tuple[str, Tensor]] = {}
        self._made: dict[str, ir.Value] = {}
        self._known: dict[str, ir.Value] = {}
        self._marks: dict[int, str] = {}  # what a reshape does, for the reader

    def start(self, source: ir.Value) -> None:
        """Begin with a value of the graph."""
        self.nodes, self.constants, self._known, self._marks = [], [], {}, {}
        self.value = self._know(source)

    def _know(self, value: ir.Value) -> str:
        name = f"known_{len(self._known)}"
        self._known[name] = value
        return name

    def weight(self, tensor: Tensor, *, turned: bool = False) -> str:
        """Return the name of the initializer of a factor; it is added at its first use."""
        name, numbers = self.named[id(tensor)]
        if name not in self._made:
            self._made[name] = self._open.add_parameter(name, numbers.mT if turned else numbers)
        return self._know(self._made[name])

    def read(self, op_type: str, value: ir.Value) -> None:
        """Append a node on the current value and on a value of the graph."""
        self.apply(op_type, self._know(value))

    def operator(self, operator: Operator, *, gemm: bool, bias: ir.Value | None) -> None:
        """Append an operator; its bias is a value of the graph."""
        plain = operator.with_bias(None)
        if isinstance(plain, Linear):
            write_linear(self, plain, gemm=gemm, turned=self.turned)
            if bias is not None and not gemm:
                self.read("Add", bias)
                return
        elif isinstance(plain, Embedding):
            write_embedding(self, plain)
        elif isinstance(plain, Conv):
            write_conv(self, plain)
        else:
            raise InputError(f"there is no known ONNX node for {type(plain).__name__}")
        if bias is not None:
            self.nodes[-1].input.append(self._know(bias))

    def branches(self, step: Branches, *, gemm: bool) -> None:
        """Append the rows of a sum, and the sum."""
        source, values = self.value, []
        for row in step.rows:
            self.value = source
            for operator in row:
                self.operator(operator, gemm=gemm, bias=None)
            values.append(self.value)
        for value in values[:-1]:
            self.apply("Add", value)

    def reshape(self, step: Unflatten | Flatten | Transpose, shape: Shape) -> None:
        """Append a reshape or a transpose of a value of this shape; the first axes may have any size."""
        if isinstance(step, Transpose):
            write_transpose(self, len(shape), step.first, step.second)
            return
        at = len(shape) + (step.dim if isinstance(step, Unflatten) else step.start)
        out = step.out_shape(shape)
        write_reshape(self, [0] * at + list(out[at:]))
        words: tuple[object, ...] = ("flatten", step.start, step.end) if isinstance(step, Flatten) else ()
        if isinstance(step, Unflatten):
            words = ("unflatten", step.dim, *step.sizes)
        self._marks[len(self.nodes) - 1] = " ".join(map(str, words))

    def finish(self, *, before: ir.Node) -> ir.Value:
        """Insert the nodes in front of a node, and return their last value."""
        for constant in self.constants:
            name = self._open.new_name("surgery.sizes")
            self._known[constant.name] = self._open.add_parameter(name, to_torch(ir.serde.deserialize_tensor(constant)))
        stem = before.outputs[0].name or before.op_type
        last: ir.Value | None = None
        for number, proto in enumerate(self.nodes):
            marks = {MARK: self._marks[number]} if number in self._marks else None
            node = ir.Node(
                "",
                proto.op_type,
                [self._known[name] for name in proto.input],
                [ir.from_proto(attribute) for attribute in proto.attribute],
                num_outputs=len(proto.output),
                metadata_props=marks,
            )
            for name, output in zip(proto.output, node.outputs, strict=True):
                output.name = self._open.note_name(self._open.new_name(f"{stem}.{name}"))
                self._known[name] = output
            before.graph.insert_before(before, node)  # type: ignore[union-attr]
            last = node.outputs[0]
        assert last is not None  # a chain has a step
        return last
