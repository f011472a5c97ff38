"""An open ONNX model: nodes of operators are replaced by those of chains, and chains by operators.

The factors of site P are named P.0.weight, P.1.weight, ...; a bias keeps its name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import onnx_ir as ir
from torch import Tensor

from surgery.algebra import (
    Branches,
    Chain,
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
from surgery.errors import InputError
from surgery.kinds.base import OpenModel
from surgery.kinds.inputs import Inputs
from surgery.kinds.observed import Observed
from surgery.kinds.onnx.chain import ChainWriter
from surgery.kinds.onnx.close import close_loops
from surgery.kinds.onnx.constants import hold_again, note_constants
from surgery.kinds.onnx.directions import join_directions, split_directions
from surgery.kinds.onnx.graph import RECORD, EditedGraph, producer_of, set_numbers
from surgery.kinds.onnx.layout import note_layout
from surgery.kinds.onnx.left import DENSE
from surgery.kinds.onnx.lifted import lift, lower
from surgery.kinds.onnx.loops import open_loops
from surgery.kinds.onnx.marks import SIZED
from surgery.kinds.onnx.norms import NormNode, set_in_model
from surgery.kinds.onnx.origin import Origin
from surgery.kinds.onnx.packed import pack, unpack
from surgery.kinds.onnx.run import ObservedOnnx, Shapes
from surgery.kinds.onnx.tensors import numbers_of
from surgery.kinds.onnx.weights import views_from_json, views_to_json
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
    Replace,
    Tensors,
    calls_of,
)
from surgery.sites.segments import is_factor_of
from surgery.system.importing import Lazy

__all__ = ["OpenOnnx"]

_RESHAPES = (Unflatten, Flatten, Transpose)


class OpenOnnx(EditedGraph, OpenModel):
    """An open ONNX model; it edits a copy of the graph, which shares tensors with the model."""

    def __init__(self, model: ir.Model, inputs: Inputs) -> None:
        super().__init__(model.clone())
        note_layout(self.model)
        self.inputs, self._original = inputs, model
        self._constants = note_constants(self)
        self._unpacked = unpack(self)
        self._lifted = lift(self)
        if self._lifted:
            self.reread()
        self._halves = split_directions(self)
        if self._unpacked or self._halves.nodes:
            self.reread()
        self._loops = open_loops(self)
        if self._loops.nodes:
            self.reread()
        self._refused: dict[str, str] = {}

    def verify(self) -> dict[str, str]:
        """Return why chains were left out, by site name."""
        return self._refused

    def observe(self) -> Observed:
        """Return the model, to be run node by node; corrected batch norms are those of the model that was opened."""
        return ObservedOnnx(self.model, self.reader, lambda: self.flow, self.inputs, self.keep_norm)

    def keep_norm(self, found: NormNode, statistics: tuple[Tensor, Tensor]) -> None:
        """Give a batch norm of the model that was opened other statistics."""
        set_in_model(self._original, found, statistics)

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
            Lazy(every, lambda value: shapes.of_input(calls[value])),
            Lazy(every, shapes.macs),
            Lazy(every, lambda value: reader.label(value)),
            reader.left,
            origins=self.record.origins,
            recorded=frozenset(self.record.sites),
            runs=Lazy(calls, lambda value: shapes.runs(calls[value])),
            any_padding=True,
        )

    def _tensors(self) -> Tensors:
        found = self.reader.parameters
        uses: dict[Key, frozenset[int]] = {name: users for name, users in self.reader.uses.items() if name in found}
        keys: dict[str, Key] = {name: name for name in found}
        keys |= {other: name for name, other in self.record.ties if name in found}
        return Tensors(keys, {name: numbers_of(tensor) for name, tensor in found.items()}, uses)

    def apply(self, edit: Edit) -> None:
        """Carry out an edit at all calls that it concerns."""
        if isinstance(edit, Replace):
            self._replace(edit.placement, edit.chain)
        else:
            assert isinstance(edit.chain, FusableChain)  # in a graph of nodes no chain is a module
            self._fuse(edit.chain)

    # -- replace ------------------------------------------------------------------------------------------------------

    def _replace(self, placement: Placement, chain: Chain) -> None:
        site, calls = placement.site, placement.calls
        first = calls[0]
        writer = ChainWriter(self, turned=first.stored == "in_out")
        for place, part in chain.places:
            if isinstance(part, Operator):
                writer.named[id(part.weight)] = (f"{site.name}.{place}.weight", part.weight)
        weight = self.parameter(first.weight)
        taken = [name for name, _ in writer.named.values() if name in self.names]
        # recompose would take a weight with any number for another factor of this site
        if taken := [*taken, *(name for name in self.reader.parameters if is_factor_of(site.name, name))]:
            self._refused[site.name] = f"the graph has a value named {taken[0]} already, a name of its factors"
            return
        self.move_to(weight)
        node = self.user(first)
        if self.loop(first) is not None and not all(isinstance(step, Linear) for step in chain.steps):
            self._refused[site.name] = f"only svd gives factors that {node.op_type} can read"
            return
        reshapes = any(isinstance(step, _RESHAPES) for step in chain.steps)
        if reshapes and self.flow.running(calls) != calls:
            self._refused[site.name] = "a call of it is in a branch that does not run, of unknown shape to reshape"
            return
        read = self.reader.weight(node.inputs[DENSE[node.op_type]])
        views = () if read is None else read.views
        entry = Entry(weight=first.weight, stored=first.stored, origin=chain.origin, computed=views_to_json(views))
        # a bias moves once, however many calls add it; one that other nodes read as well stays as it is
        for name in dict.fromkeys(call.bias for call in calls if call.bias is not None):
            if not self.is_read_by_others(name, calls):
                self._move_bias(self.parameter(name), site.operator.bias, chain.bias)
        for call in calls:
            self._replace_call(call, chain, writer)
        self.drop_unused(weight)
        self.record = self.record.with_site(site.name, entry)

    def _replace_call(self, call: Call, chain: Chain, writer: ChainWriter) -> None:
        if (loop := self.loop(call)) is not None:
            self._write_gates(loop, self.value(call.source), chain.steps[:-1], chain.steps[-1], writer)
            return
        bias = None if call.bias is None else self.parameter(call.bias)
        computed = None if call.computed_bias is None else self.value(call.computed_bias)
        old = self.value(call.value)
        # Gemm takes two axes; a chain with reshapes has more in between
        plain = not any(isinstance(step, _RESHAPES) for step in chain.steps)
        gemm = plain and self.user(call).op_type == "Gemm"
        shape: Shape | None = None
        writer.start(self.value(call.source), producer_of(old))
        for number, step in enumerate(chain.steps):
            last = number == len(chain.steps) - 1
            shape = self._write(writer, step, shape, call, gemm=gemm, bias=(bias or computed) if last else None)
        if computed is not None and isinstance(chain.steps[-1], _RESHAPES):  # the reshape would reshape it too
            writer.read("Add", computed)
        origin = Origin.of(self._nodes([call]), self.parameter(call.weight))
        self._put(writer, [call], old)
        origin.keep(writer.inserted[-1])

    def _write_gates(
        self, loop: ir.Node, source: ir.Value, steps: Sequence[Step], last: Step, writer: ChainWriter
    ) -> None:
        """Let a recurrent node read the steps on a value, with the last step as its input weight."""
        assert isinstance(last, Linear)
        held = self.reader.weight(loop.inputs[1])
        assert held is not None  # it is the weight of a call
        writer.start(source, loop)
        for step in steps:
            assert isinstance(step, Linear)
            writer.operator(step, gemm=False, bias=None)
        loop.replace_input_with(1, writer.gates(last.weight, held.shape[0]))
        loop.replace_input_with(0, writer.finish() if steps else source)

    def _move_bias(self, bias: ir.Value, before: Tensor | None, after: Tensor | None) -> None:
        """Give a bias the numbers that it has after the chain; calls of one site may have biases of their own."""
        if before is None or after is None or before is after or before.is_meta or after.is_meta:
            return
        weight = self.reader.weight(bias)
        assert weight is not None  # it is the bias of a call
        moved = weight.numbers + (after - before).to(weight.numbers)
        set_numbers(bias, moved.to(weight.numbers))

    def _write(
        self,
        writer: ChainWriter,
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
            writer.shift(bias)
            return shape
        if isinstance(step, Branches):
            writer.branches(step, gemm=gemm, bias=bias)
        elif isinstance(step, Operator):
            writer.operator(step, gemm=gemm, bias=bias)
        else:
            raise InputError(f"there is no known ONNX node for {type(step).__name__}")
        return None if shape is None else step.out_shape(shape)

    def _put(self, writer: ChainWriter, row: Sequence[Part], old: ir.Value) -> None:
        """Insert the nodes of a writer, and let their last value stand in the place of ``old``."""
        nodes = self._nodes(row)
        # the sizes and axes that reshapes read
        sizes = [value for node in nodes if node.op_type in SIZED for value in node.inputs[1:] if value is not None]
        self.stand_in(old, writer.finish(), nodes)
        for value in dict.fromkeys(sizes):
            self.drop_unused(value)

    def _nodes(self, row: Sequence[Part]) -> list[ir.Node]:
        return list(dict.fromkeys(producer_of(self.value(number)) for part in row for number in part.values))

    # -- fuse ---------------------------------------------------------------------------------------------------------

    def _fuse(self, chain: FusableChain) -> None:
        entry = self.record.sites.get(chain.sites[0], Entry())
        for site in chain.sites:
            self.record = self.record.without_site(site)
            self.forget_ties(site)
        every = [part for row in chain.rows for part in row]
        calls = calls_of(every)
        stored: Layout = entry.stored or calls[-1].stored
        writer = ChainWriter(self, turned=stored == "in_out")
        used = dict.fromkeys([*(call.weight for call in calls), *(name for part in every for name in _biases(part))])
        parameters = [self.parameter(name) for name in used]
        self.move_to(parameters[0])
        weight = chain.operators[0].weight
        own = entry.weight or f"{chain.sites[0]}.weight"
        name = own if own in used or self.is_free(own) else self.new_name(own)
        # a factor may have the very name that the weight gets; it goes first
        renamed = name if name not in self.names else self.new_name(f"{name}.fused")
        writer.views[renamed] = views_from_json(entry.computed, self._stored_shape(calls[-1], weight, writer))
        done: dict[str, ir.Value] = {}
        origins = []
        for row, operator in zip(chain.rows, chain.operators, strict=True):
            writer.named[id(operator.weight)] = (renamed, weight)
            origins.append(self._fuse_row(row, operator, chain.sites[0], writer, done, every))
        for parameter in parameters:
            self.drop_unused(parameter)
        if renamed != name:
            self.rename(renamed, name)
        for origin in origins:
            origin.restore_weight(self.home.initializers[name])

    def _stored_shape(self, call: Call, weight: Tensor, writer: ChainWriter) -> Shape:
        """Return the shape in which a node reads the weight of a fused row, as it reads that of the row's last call."""
        if (loop := self.loop(call)) is not None:
            held = self.reader.weight(loop.inputs[1])
            assert held is not None
            return (held.shape[0], len(weight) // held.shape[0], *weight.shape[1:])
        return tuple(weight.mT.shape if writer.turned and isinstance(call.operator, Linear) else weight.shape)

    def _fuse_row(
        self,
        row: Sequence[Part],
        operator: Operator,
        site: str,
        writer: ChainWriter,
        done: dict[str, ir.Value],
        every: Sequence[Part],
    ) -> Origin:
        """Put the operator in the place of a row, and return what the row keeps of the nodes that were there before."""
        own = calls_of(row)
        if (loop := self.loop(own[-1])) is not None:
            nodes = [producer_of(self.value(number)) for part in row[:-1] for number in part.values]
            self._write_gates(loop, self.value(row[0].source), (), operator, writer)
            loop.graph.remove(list(dict.fromkeys(nodes)), safe=True)  # type: ignore[union-attr]
            return Origin()
        old = self.value(row[-1].value)
        # only Gemm reads a weight that is stored as (out, in)
        gemm = not writer.turned or self.user(own[-1]).op_type == "Gemm"
        computed = own[-1].computed_bias if row[-1].calls else None
        bias = None if computed is None else self.value(computed)
        if operator.bias is not None:
            bias = self._fused_bias(row, operator.bias, site, done, every)
        writer.start(self.value(row[0].source), producer_of(old))
        writer.operator(operator, gemm=gemm, bias=bias)
        origin = Origin.read(producer_of(old))
        self._put(writer, row, old)
        self.fused.update(writer.inserted)
        origin.restore_nodes(writer.inserted, self.names)
        return origin

    def _fused_bias(
        self, row: Sequence[Part], numbers: Tensor, site: str, done: dict[str, ir.Value], every: Sequence[Part]
    ) -> ir.Value:
        """Return the bias of a fused row: that of the chain, which keeps its name, or a new one with its numbers."""
        names = [name for part in row for name in _biases(part)]
        name = names[-1] if names else f"{site}.bias"
        if name in done:
            return done[name]
        if not names:
            done[name] = self.add_parameter(self.new_name(name), numbers)
            return done[name]
        bias, own = self.parameter(name), not self.is_read_by_others(name, every)
        if len(names) > 1:
            if own:
                set_numbers(bias, numbers)
            else:
                bias = self.add_parameter(self.new_name(f"{site}.bias"), numbers)
        if own and is_factor_of(site, name) and bias.is_initializer():  # a chain of modules has the bias in a module
            set_numbers(bias, numbers)  # a tensor is renamed with its value, and the given model has the old one too
            self.rename(name, self.new_name(f"{site}.bias"))
        done[name] = bias
        return bias

    def reopen(self, placements: Sequence[Placement]) -> dict[str, Placement]:
        """Put operators without numbers in the place of chains, and return their new placements by site name."""
        if not placements:
            return {}
        entries = {placement.site.name: self.record.sites[placement.site.name] for placement in placements}
        for placement in placements:
            assert placement.chain is not None  # it is the site of a chain
            self.apply(Fuse(placement.chain))
        self.reread()
        vars(self).pop("flow", None)
        calls = [element for element in self.reader.elements if isinstance(element, Call)]
        names = {site: entry.weight or f"{site}.weight" for site, entry in entries.items()}
        return {
            p.site.name: Placement(p.site, tuple(c for c in calls if c.weight == names[p.site.name]))
            for p in placements
        }

    def finish(self) -> Any:
        """Return the changed model, with its record."""
        pack(self, self._unpacked)
        close_loops(self, self._loops)
        join_directions(self, self._halves)
        lower(self, self._lifted)
        hold_again(self, self._constants)
        self.sort_initializers()
        self.made.clear()  # the factors as they were made: the model may have them in another layout
        if self.record:
            self.model.metadata_props[RECORD] = json.dumps(self.record.to_json())
        else:
            self.model.metadata_props.pop(RECORD, None)
        return self.model


def _biases(part: Part) -> list[str]:
    return [] if part.bias is None else [part.bias]
