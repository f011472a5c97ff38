"""Cut an ONNX model into stages, each a model of its own.

The operations are the nodes of the main graph. A node with bodies is one operation, which reads also what its bodies
read from outside. Constants are no operations: initializers, Constant nodes, and nodes that compute from these alone,
such as the Cast of an int8 weight, lie in each stage that reads them. An initializer that is an output of the model is
given by an operation without a node, so that one stage gives it.

    x, W -> MatMul -> a -> Relu -> z   cut after MatMul:   stage 0: x, W -> MatMul -> a    stage 1: a -> Relu -> z

Each stage has the opsets of the model, its metadata, and the functions that it uses; values keep their names. Under
onnxruntime without graph optimizations, the stages in a row give the same bits as the whole. With them it may fuse in
the whole what a cut parts, and floats may differ by rounding: of 50 cuts of 25 files into up to four stages, one
did so, by 7e-7 of the output's norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from surgery.errors import InputError
from surgery.kinds.base import Cuttable, Piece, Pieces
from surgery.kinds.inputs import Inputs
from surgery.kinds.onnx.ends import Seen, declare, infer, observe
from surgery.kinds.onnx.graph import RECORD
from surgery.kinds.onnx.interpret import RANDOM
from surgery.kinds.onnx.join import Place, detached, frame_of
from surgery.kinds.onnx.layout import note_layout
from surgery.kinds.onnx.left import inside
from surgery.kinds.onnx.one_node import bodies_of, captured_by
from surgery.kinds.onnx.origin import configured
from surgery.kinds.onnx.proto import keep_part
from surgery.kinds.onnx.read import Reader
from surgery.kinds.onnx.run import Shapes
from surgery.kinds.onnx.weights import is_plain
from surgery.sites.network import Network, Operation, Value

__all__ = ["CuttableOnnx"]

_DRAWS = (*RANDOM, "Dropout")


@dataclass(frozen=True, eq=False)
class _Step:
    """An operation: its node by its place in the graph, None for an output that is an initializer, and its values."""

    place: int | None
    reads: tuple[ir.Value, ...]
    gives: tuple[ir.Value, ...]
    holds: tuple[ir.Value, ...]  # constants: initializers, what is computed from them, and all that this reads
    inner: int = 0  # bytes of the tensors in its bodies


class CuttableOnnx(Cuttable):
    """An ONNX model that is open to be cut; the model stays as it is."""

    def __init__(self, model: ir.Model, inputs: Inputs) -> None:
        note_layout(model)
        self._model, self._inputs = model, inputs
        try:
            self._copy = model.clone()
        except Exception as error:  # of onnx_ir, for nodes that are not in order or read what nothing gives
            raise InputError("the graph cannot be copied", next_step="export the model again") from error
        self._places = {node: place for place, node in enumerate(self._copy.graph)}
        self._constants: dict[
            ir.Value, tuple[ir.Value, ...]
        ] = {}  # what nodes compute from constants, and all it needs
        self._steps = tuple(self._read())

    def _read(self) -> Iterator[_Step]:
        graph = self._copy.graph
        for value in dict.fromkeys(graph.outputs):
            if value.is_initializer():
                yield _Step(None, (), (value,), (value,))
        for node in graph:
            found = (*(value for value in node.inputs if value is not None and value.name), *captured_by(node))
            every = tuple(dict.fromkeys(found))
            constant = [value for value in every if value.is_initializer() or value in self._constants]
            holds = tuple(
                dict.fromkeys(each for value in constant for each in (*self._constants.get(value, ()), value))
            )
            if len(constant) == len(every) and _is_fixed(node):
                self._constants |= dict.fromkeys(node.outputs, (*holds, *node.outputs))
                continue
            gives = tuple(value for value in node.outputs if value.name)
            reads = tuple(value for value in every if value not in constant)
            yield _Step(self._places[node], reads, gives, holds, _inner_bytes(node))

    @cached_property
    def _seen(self) -> dict[ir.Value, Seen]:
        return observe(self._copy, self._reader, self._inputs)

    @cached_property
    def _reader(self) -> Reader:
        return Reader(self._copy)

    @cached_property
    def _values(self) -> tuple[ir.Value, ...]:
        """The values of the network: inputs, then what operations give."""
        inputs = [value for value in self._copy.graph.inputs if not value.is_initializer()]
        return (*inputs, *(value for step in self._steps for value in step.gives))

    @cached_property
    def network(self) -> Network:
        """The operations of the model, in the order of its graph."""
        seen, macs = self._seen, self._macs()
        numbers = {value: number for number, value in enumerate(self._values)}
        by_place = {place: node for node, place in self._places.items()}
        bytes_of: dict[str, int] = {}
        operations = []
        for step in self._steps:
            held = {value.name or "": size for value in step.holds if (size := _bytes_of(value)) is not None}
            if step.inner:
                held[f"bodies of {step.gives[0].name}"] = step.inner
            bytes_of |= held
            node = None if step.place is None else by_place[step.place]
            name = step.gives[0].name if step.gives else ""
            operations.append(
                Operation(
                    (name if node is None else node.name or name) or "",
                    "initializer" if node is None else ".".join(filter(None, (node.domain, node.op_type))),
                    tuple(numbers[value] for value in step.reads),
                    tuple(numbers[value] for value in step.gives),
                    tuple(held),
                    0 if node is None else macs.get(node, 0),
                )
            )
        sizes = [seen[value].bytes if value in seen else 0 for value in self._values]
        values = tuple(Value(value.name or "", size) for value, size in zip(self._values, sizes, strict=True))
        ends = (
            tuple(range(len(values) - sum(len(step.gives) for step in self._steps))),
            tuple(numbers[value] for value in self._copy.graph.outputs),
        )
        return Network(tuple(operations), values, *ends, bytes_of, {name: name for name in bytes_of}, self._together())

    def _together(self) -> tuple[frozenset[int], ...]:
        """Return the operations that give and read a value that cannot be sent, for each such value."""
        found = []
        for value in self._values:
            if value in self._seen and self._seen[value].type is None:
                group = [number for number, step in enumerate(self._steps) if value in (*step.reads, *step.gives)]
                found += [frozenset(group)] if len(group) > 1 else []
        return tuple(found)

    def _macs(self) -> dict[ir.Node, int]:
        """Return the multiply-accumulates of nodes with those in their branches; of loops none are known."""
        reader, seen = self._reader, self._seen
        shapes = {reader.numbers[value]: each.shape for value, each in seen.items() if value in reader.numbers}
        known = Shapes(self._copy, reader, self._inputs, shapes)
        own = {node: known.macs(reader.number(node)) for node in reader.nodes if reader.number(node) in shapes}
        return {node: own.get(node, 0) + sum(own.get(each, 0) for each in inside(node)) for node in self._places}

    # -- cut ----------------------------------------------------------------------------------------------------------

    def cut(self, stage_of: Sequence[int]) -> Pieces:
        """Return the stages, each of which declares the types and shapes of its ends.

        Raises:
            InputError: a value would go to an earlier stage, a stage has no operation, or a value cannot be sent.
        """
        count = self._check(stage_of)
        parts = [[step for step, of in zip(self._steps, stage_of, strict=True) if of == at] for at in range(count)]
        needs = [{value for step in part for value in step.reads} for part in parts]
        gives = [{value for step in part for value in step.gives} for part in parts]
        holds = [{value.name for step in part for value in step.holds} for part in parts]
        used = set().union(*holds)
        graph = self._copy.graph
        # What nothing reads goes to stage 0, so that ``join`` finds all of it again.
        holds[0] |= {name for name in graph.initializers if name not in used}
        holds[0] |= {value.name for value in self._constants if value.name not in used}
        inferred = infer(self._copy)
        pieces = []
        for at, part in enumerate(parts):
            later = set().union(*needs[at + 1 :]) | set(graph.outputs)
            takes = [value for value in self._values if value in needs[at] - gives[at]]
            sends = [value for value in self._values if value in gives[at] & later]
            for value in (*takes, *sends):
                if value.producer() is not None:
                    declare(value, inferred, self._seen.get(value))
            stage = self._stage([step.place for step in part], holds[at], takes, sends)
            pieces.append(Piece(stage, tuple(v.name or "" for v in takes), tuple(v.name or "" for v in sends)))
        self._share_functions([piece.model for piece in pieces])
        inputs = [value.name or "" for value in graph.inputs if not value.is_initializer()]
        frame = frame_of(self._model, self._row(stage_of))
        return Pieces(tuple(pieces), tuple(inputs), tuple(value.name or "" for value in graph.outputs), frame)

    def _check(self, stage_of: Sequence[int]) -> int:
        if len(stage_of) != len(self._steps) or not stage_of:
            raise InputError(f"stages of {len(stage_of)} operations", allowed=f"of {len(self._steps)}")
        count = max(stage_of) + 1
        if set(stage_of) != set(range(count)):
            raise InputError("a stage has no operation", allowed="stages 0, 1, ... with operations each")
        given = {value: of for step, of in zip(self._steps, stage_of, strict=True) for value in step.gives}
        for step, of in zip(self._steps, stage_of, strict=True):
            for value in step.reads:
                if given.get(value, -1) > of:
                    raise InputError(f"{value.name} would go from stage {given[value]} to stage {of}")
                if given.get(value, of) != of and (seen := self._seen.get(value)) and seen.type is None:
                    raise InputError(f"{value.name} is no tensor of numbers, and cannot be sent to another stage")
        return count

    @cached_property
    def _fixed(self) -> dict[str, int]:
        """The places of the nodes that compute constants, by the names of their first outputs."""
        nodes = dict.fromkeys(node for value in self._constants if (node := value.producer()) is not None)
        return {node.outputs[0].name or "": self._places[node] for node in nodes}

    def _row(self, stage_of: Sequence[int]) -> list[Place]:
        """Return where each node of the graph lies."""
        row: dict[int, Place] = {place: name for name, place in self._fixed.items()}
        for step, of in zip(self._steps, stage_of, strict=True):
            if step.place is not None:
                row[step.place] = of
        return [row[place] for place in range(len(row))]

    def _stage(
        self, places: Sequence[int | None], holds: set[str | None], takes: Sequence[ir.Value], sends: Sequence[ir.Value]
    ) -> ir.Model:
        """Return a model of the nodes at these places, and of the constants that the stage holds."""
        model = self._model.clone()
        graph = model.graph
        nodes = list(graph)
        chosen = {nodes[place] for place in places if place is not None}
        chosen |= {nodes[place] for name, place in self._fixed.items() if name in holds}
        values = {value.name: value for value in graph.inputs} | dict(graph.initializers)
        values |= {value.name: value for node in nodes for value in node.outputs if value.name}
        graph.outputs.clear()
        with configured(chosen):
            inputs = [self._input(values[value.name], value) for value in takes]
        inputs += [value for value in graph.inputs if value.is_initializer() and value.name in holds]
        graph.inputs.clear()
        graph.remove(detached(node for node in nodes if node not in chosen))
        for name in [name for name in graph.initializers if name not in holds]:
            del graph.initializers[name]
        graph.inputs.extend(inputs)
        for value in sends:
            values[value.name].type, values[value.name].shape = value.type, value.shape
            graph.outputs.append(values[value.name])
        model.metadata_props.pop(RECORD, None)
        keep_part(model)
        return model

    def _input(self, value: ir.Value, like: ir.Value) -> ir.Value:
        """Return the input of a stage that stands for a value of the whole."""
        if value.producer() is None:
            return value
        found = ir.Value(name=value.name, type=like.type, shape=like.shape, doc_string=value.doc_string)
        found.metadata_props.update(value.metadata_props)
        value.replace_all_uses_with(found)
        return found

    def _share_functions(self, stages: Sequence[ir.Model]) -> None:
        """Leave each stage the functions that it uses; the first has those that none uses as well."""
        used = [_used(stage) for stage in stages]
        unused = self._model.functions.keys() - set().union(*used)
        for at, stage in enumerate(stages):
            for key in stage.functions.keys() - used[at] - (unused if at == 0 else set()):
                del stage.functions[key]


def _is_fixed(node: ir.Node) -> bool:
    """Whether a node that reads constants alone gives the same at each run, and to nodes alone."""
    if not is_plain(node) or node.op_type in _DRAWS or bodies_of(node):
        return False
    return bool(node.outputs[0].name) and not any(value.is_graph_output() for value in node.outputs)


def _bytes_of(value: ir.Value) -> int | None:
    """Return the bytes of an initializer or of a Constant node; None for what other nodes compute."""
    node = value.producer()
    if node is None:
        return 0 if value.const_value is None else value.const_value.nbytes
    return sum(map(_size, node.attributes.values())) if node.op_type == "Constant" else None


def _used(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Return the functions that the nodes of a graph call, and those that these call."""
    found: set[ir.OperatorIdentifier] = set()
    waiting = [*model.graph.all_nodes()]
    while waiting:
        key = waiting.pop().op_identifier()
        if key in model.functions and key not in found:
            found.add(key)
            waiting += model.functions[key].all_nodes()
    return found


def _size(attribute: ir.Attr) -> int:
    """Return the bytes of the numbers in an attribute."""
    if attribute.is_ref():
        return 0
    if attribute.type == ir.AttributeType.TENSOR:
        return int(attribute.value.nbytes)
    if attribute.type == ir.AttributeType.TENSORS:
        return sum(int(tensor.nbytes) for tensor in attribute.value)
    return 8 * len(attribute.value) if isinstance(attribute.value, list | tuple) else 0


def _inner_bytes(node: ir.Node) -> int:
    """Return the bytes of the tensors in the bodies of a node."""
    nodes = list(inside(node))
    graphs = {each.graph for each in nodes if isinstance(each.graph, ir.Graph)}
    tensors = (value.const_value for graph in graphs for value in graph.initializers.values())
    held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
    return held + sum(_size(attribute) for each in nodes for attribute in each.attributes.values())
