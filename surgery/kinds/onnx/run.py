"""Run an ONNX model in parts, between which values are seen and replaced; and find shapes in one run.

onnxruntime runs each part as a model of its own. A part ends where the output of a call is to be replaced. Inputs of
operators that are only seen are outputs of their part.

    watch conv_1, tap conv_2     ->     part 1: input .. conv_2, with the input of conv_1 as an output
                                        part 2: what follows conv_2
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from surgery.algebra import Shape
from surgery.errors import InputError
from surgery.kinds.inputs import Inputs, normalise_inputs
from surgery.kinds.observed import Added, Norm, Observed, OutputChange, See
from surgery.kinds.onnx.proto import write_proto
from surgery.kinds.onnx.read import Reader
from surgery.kinds.onnx.session import array_of, feed, open_session
from surgery.sites import Call, Flow
from surgery.text import first_line

__all__ = ["ObservedOnnx", "OnnxModule", "Shapes", "arrays_of", "serialise"]

_MOST_BYTES = 2**31 - 2**24  # of one protobuf message
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulInteger", "ConvInteger", "LSTM", "GRU", "RNN")
_Array = npt.NDArray[Any]


def serialise(model: ir.Model) -> bytes:
    """Return a model as the bytes of one file, with all weights inside.

    Raises:
        InputError: it would take more than 2 GiB.
    """
    if any(isinstance(tensor, ir.ExternalTensor) for tensor in _tensors(model)):
        model = model.clone()
        for graph in model.graphs():
            for value in graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    tensor = value.const_value
                    value.const_value = ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name)
    size = sum(tensor.nbytes for tensor in _tensors(model))
    if size > _MOST_BYTES:
        what = f"the weights take {size / 2**30:.1f} GiB"
        raise InputError(what, allowed="ONNX models below 2 GiB", next_step="take the model from before its export")
    found: bytes = write_proto(model).SerializeToString()
    return found


def _tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield all initializers of a model, also those of bodies."""
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)


def arrays_of(reader: Reader, inputs: Inputs) -> dict[str, _Array]:
    """Return inputs by the names of the graph's, as arrays.

    Raises:
        InputError: their number or names are others than those of the graph.
    """
    args, kwargs = inputs
    names = [value.name or "" for value in reader.inputs]
    given = dict(zip(names, args, strict=False)) | kwargs
    if len(args) > len(names) or set(given) != set(names):
        what = f"the inputs are {', '.join(given) or 'none'}"
        raise InputError(what, allowed=", ".join(names) or "none", next_step="give example_inputs")
    return {name: array_of(torch.as_tensor(given[name]), name) for name in names}


class OnnxModule(nn.Module):
    """An ONNX model as a module, which onnxruntime runs in ``session``; metrics get such a module.

    It is called with tensors or NumPy arrays, in the order of the graph's inputs or by their names, and returns a tuple
    of tensors in the order of the graph's outputs, also of one output.
    """

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self.session = open_session(serialise(model))

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run the model on inputs in order or by name.

        Raises:
            InputError: other inputs than those of the graph.
        """
        feeds = feed(self.session, normalise_inputs((args, kwargs)))
        return tuple(map(_as_tensor, self.session.run(None, feeds)))


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if hasattr(value, "dtype") and value.dtype != object else value


class _Part:
    """The nodes from one place in the graph to another, as a model; ``reads`` and ``gives`` are names of values."""

    def __init__(self, whole: onnx.ModelProto, nodes: range, reads: Sequence[str], gives: Sequence[str]) -> None:
        self._whole, self._nodes, self._reads, self.gives = whole, nodes, reads, list(gives)
        self._session: Any = None

    def run(self, known: Mapping[str, _Array]) -> dict[str, _Array]:
        """Return the values that the part gives, from those that it reads."""
        feeds = {name: known[name] for name in self._reads}
        if self._session is None:
            self._session = open_session(self._model(feeds))
        return dict(zip(self.gives, self._session.run(self.gives, feeds), strict=True))

    def _model(self, feeds: Mapping[str, _Array]) -> bytes:
        graph = self._whole.graph
        # an input of any shape but the type that came: a later batch may be smaller
        inputs = [_declared(name, array) for name, array in feeds.items()]
        outputs = [onnx.helper.make_empty_tensor_value_info(name) for name in self.gives]
        nodes = graph.node[self._nodes.start : self._nodes.stop]
        used = set(_names_read(nodes)) | set(self.gives)
        weights = [tensor for tensor in graph.initializer if tensor.name in used]
        sparse = [tensor for tensor in graph.sparse_initializer if tensor.values.name in used]
        part = onnx.helper.make_graph(nodes, "part", inputs, outputs, weights, sparse_initializer=sparse)
        whole = self._whole
        about = {"opset_imports": whole.opset_import, "ir_version": whole.ir_version, "functions": whole.functions}
        found: bytes = onnx.helper.make_model(part, **about).SerializeToString()
        return found


def _declared(name: str, array: _Array) -> onnx.ValueInfoProto:
    kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
    return onnx.helper.make_tensor_value_info(name, kind, [None] * array.ndim)


def _names_read(nodes: Iterable[onnx.NodeProto]) -> Iterator[str]:
    """Yield the names of all values that nodes read, also inside of their bodies."""
    for node in nodes:
        yield from (name for name in node.input if name)
        for attribute in node.attribute:
            for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _names_read(graph.node)
                yield from (output.name for output in graph.output)


class _Parts:
    """A model in parts; each but the last ends with a value that is ``cut``; ``seen`` are given as well."""

    def __init__(self, whole: onnx.ModelProto, cut: Sequence[str], seen: Iterable[str]) -> None:
        graph = whole.graph
        inside = {tensor.name for tensor in graph.initializer} | {s.values.name for s in graph.sparse_initializer}
        self.inputs = [value.name for value in graph.input if value.name not in inside]
        self.outputs = [value.name for value in graph.output]
        places = {name: at for at, node in enumerate(graph.node) for name in node.output}
        ends = [*sorted({places[name] for name in cut}), len(graph.node) - 1]
        asked = {*cut, *seen, *self.outputs}
        reads = [list(dict.fromkeys(_names_read([node]))) for node in graph.node]
        self.parts: list[_Part] = []
        start = 0
        for end in dict.fromkeys(ends):
            own = range(start, end + 1)
            made = {name for at in own for name in graph.node[at].output if name}
            later = {name for at in range(end + 1, len(graph.node)) for name in reads[at]}
            needed = dict.fromkeys(name for at in own for name in reads[at])
            before = [n for n in needed if n not in made and n not in inside and (n in places or n in self.inputs)]
            gives = [name for name in made if name in later or name in asked]
            if gives:
                self.parts.append(_Part(whole, own, before, sorted(gives, key=places.__getitem__)))
            start = end + 1

    def run(self, known: dict[str, _Array], see: Callable[[str, _Array], _Array]) -> dict[str, _Array]:
        """Run all parts from the inputs; ``see`` gets each value that a part gives, and returns what stands for it."""
        for part in self.parts:
            for name, array in part.run(known).items():
                known[name] = see(name, array)
        return known


class ObservedOnnx(Observed):
    """An ONNX model that runs in parts. It has no gradients, and nothing is known of what is added to an output."""

    def __init__(self, model: ir.Model, reader: Reader, flow: Callable[[], Flow]) -> None:
        super().__init__(flow)
        self._model, self._reader = model, reader
        self.forget()

    def forget(self) -> None:
        """Remove everything that watches, taps or follows a call."""
        self._sees: dict[str, list[tuple[str, See]]] = defaultdict(list)  # by the call's value: source, observer
        self._taps: dict[str, OutputChange] = {}
        self._parts: _Parts | None = None

    @cached_property
    def _whole(self) -> onnx.ModelProto:
        return onnx.ModelProto.FromString(serialise(self._model))

    def _name(self, number: int) -> str:
        return self._reader.values[number - self._reader.start].name or ""

    def watch(self, call: Call, see: See) -> None:
        """Call ``see`` with the input of a call."""
        self._sees[self._name(call.value)].append((self._name(call.source), see))
        self._parts = None

    def tap(self, call: Call, change: OutputChange) -> None:
        """Replace the output of a call by what ``change`` returns for it."""
        self._taps[self._name(call.value)] = change
        self._parts = None

    def follow(self, call: Call, see: Callable[[Tensor], Added], spoiled: Callable[[], None]) -> None:
        """Show the output of a call; what is added to it afterwards is not followed."""

        def pass_on(y: Tensor) -> Tensor:
            see(y)
            return y

        self.tap(call, pass_on)
        spoiled()

    @property
    def differentiable(self) -> bool:
        """Return False: onnxruntime computes no gradients."""
        return False

    def norms(self) -> Sequence[Norm]:
        """Return nothing: the statistics of batch norms stay as they are."""
        return ()

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """Return nothing: onnxruntime holds the weights."""
        return ()

    def execute(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Run the model, and return its outputs."""
        if self._parts is None:
            sources = {source for row in self._sees.values() for source, _ in row}
            self._parts = _Parts(self._whole, list(self._taps), [*sources, *self._sees])
        known = arrays_of(self._reader, inputs)
        values = self._parts.run(known, lambda name, array: self._show(name, array, known))
        return tuple(_as_tensor(values[name]) for name in self._parts.outputs)

    def _show(self, name: str, array: _Array, known: Mapping[str, _Array]) -> _Array:
        for source, see in self._sees.get(name, ()):
            see(torch.from_numpy(known[source]))
        change = self._taps.get(name)
        if change is None:
            return array
        found: _Array = change(torch.from_numpy(array)).detach().contiguous().numpy()
        return found


class Shapes:
    """The shapes of values, and the costs of products, from one run on the example inputs."""

    def __init__(self, model: ir.Model, reader: Reader, inputs: Inputs) -> None:
        self._model, self._reader, self._inputs = model, reader, inputs
        self._seen: dict[int, Shape] | None = None

    def of(self, number: int) -> Shape:
        """Return the shape of a value.

        Raises:
            InputError: it is not known without example inputs, or the model does not run on them.
        """
        if number == self._reader.end:
            return ()
        if self._seen is None:
            self._seen = self._run()
        return self._seen.get(number, ())

    def of_input(self, call: Call) -> Shape:
        """Return the shape of what a call reads.

        Raises:
            InputError: it does not run on the example inputs; or as for ``of``.
        """
        found = self.of(call.source)
        assert self._seen is not None
        if call.source not in self._seen:
            raise InputError("it is in a branch that does not run on the example inputs")
        return found

    def _run(self) -> dict[int, Shape]:
        if self._reader.inputs and not any(self._inputs):
            raise InputError("sites have no costs without input shapes", next_step="give example_inputs")
        wanted = sorted(self._wanted())
        names = {number: self._reader.values[number - self._reader.start].name or "" for number in wanted}
        known = arrays_of(self._reader, self._inputs)
        whole = onnx.ModelProto.FromString(serialise(self._model))
        try:
            values = _Parts(whole, (), names.values()).run(known, lambda name, array: array)
        except InputError:
            raise
        except Exception as error:  # onnxruntime's exceptions share no other base
            what = f"the model does not run on these inputs: {first_line(error)}"
            raise InputError(what, next_step="give example_inputs (on the command line --input-shape)") from error
        return {number: tuple(values[name].shape) for number, name in names.items() if name in values}

    def _wanted(self) -> set[int]:
        """Return the values whose shapes may be asked for: inputs and outputs of products."""
        reader = self._reader
        numbers = set(range(reader.start, reader.start + len(reader.inputs)))
        for element in reader.elements:
            if isinstance(element, Call):
                more = () if element.computed_bias is None else (element.computed_bias,)
                numbers |= {element.source, element.value, *more}
        for node in reader.nodes:
            if node.op_type in _PRODUCTS:
                ends = (*node.inputs[:1], *node.outputs[:1])
                numbers |= {reader.numbers[value] for value in ends if value in reader.numbers}
        return numbers

    def macs(self, number: int) -> int:
        """Return the multiply-accumulates of the node that gives a value; 0 if they are not known."""
        if number == self._reader.end:
            return 0
        node = self._reader.values[number - self._reader.start].producer()
        if node is None or node.op_type not in _PRODUCTS or not node.inputs:
            return 0
        found = [self._reader.weight(value) for value in node.inputs[1:3]]
        called = node in self._reader.gates and isinstance(self._reader.call(node), Call)
        weights = [weight for weight in found[called:] if weight is not None and len(weight.shape) > 1]
        source = None if node.inputs[0] is None else self._reader.numbers.get(node.inputs[0])
        if not weights or source is None:
            return 0
        reads, gives = self.of(source), self.of(self._reader.number(node))
        if node.op_type in ("LSTM", "GRU", "RNN"):
            return math.prod(reads[:2]) * sum(math.prod(weight.shape) for weight in weights)  # in each step
        size = math.prod(weights[0].shape)
        if node.op_type == "ConvTranspose":
            return math.prod(reads) // max(1, weights[0].shape[0]) * size
        if node.op_type in ("Conv", "ConvInteger"):
            return math.prod(gives) // max(1, weights[0].shape[0]) * size
        return math.prod(gives) * (reads[-1] if reads else 0)
