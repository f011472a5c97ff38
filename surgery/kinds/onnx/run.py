"""Run an ONNX model, as a module or with observers of its values; and find shapes in one run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor, nn

from surgery.algebra import Shape
from surgery.errors import InputError
from surgery.kinds.inputs import Inputs, normalise_inputs
from surgery.kinds.observed import Norm, Observed, OutputChange, See
from surgery.kinds.onnx.checked import Checked, check
from surgery.kinds.onnx.interpret import Interpreter, Observers
from surgery.kinds.onnx.norms import KeepNorm, NormNode, norms_of
from surgery.kinds.onnx.read import Reader
from surgery.kinds.onnx.session import feed, open_model, run_session
from surgery.sites import Call, Flow
from surgery.system.memory import give_back
from surgery.text import first_line

__all__ = ["ObservedOnnx", "OnnxModule", "Shapes", "feeds_of", "interpret", "refuse_empty_batches"]

_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "MatMulInteger", "ConvInteger", "LSTM", "GRU", "RNN")
_ENDING = ("LSTM", "GRU")  # operators of which onnxruntime ends the process on an empty batch
_Array = npt.NDArray[Any]


def feeds_of(reader: Reader, inputs: Inputs) -> dict[ir.Value, Tensor]:
    """Return inputs by the values of the graph.

    Raises:
        InputError: their number or names are others than those of the graph.
    """
    args, kwargs = inputs
    names = [value.name or "" for value in reader.inputs]
    given = dict(zip(names, args, strict=False)) | kwargs
    if len(args) > len(names) or set(given) != set(names):
        what = f"the inputs are {', '.join(given) or 'none'}"
        raise InputError(what, allowed=", ".join(names) or "none", next_step="give example_inputs")
    return {value: torch.as_tensor(given[value.name or ""]).detach().cpu() for value in reader.inputs}


def interpret(
    model: ir.Model, reader: Reader, feeds: Mapping[ir.Value, Tensor], observers: Observers
) -> Mapping[ir.Value, Any]:
    """Run a model for what ``observers`` see, and return the values that do not depend on its inputs.

    Raises:
        InputError: it does not run on these inputs.
    """
    try:
        with torch.no_grad():
            interpreter = Interpreter(model, reader.gates, calls=reader.calling)
            interpreter.run(feeds, observers)
    except InputError:
        raise
    except Exception as error:  # torch and onnxruntime may raise anything on inputs that do not fit
        what = f"the model does not run on the example inputs: {first_line(error)}"
        raise InputError(what, next_step="give others (on the command line --input-shape)") from error
    return interpreter.constants


def refuse_empty_batches(model: ir.Model, inputs: Inputs) -> None:
    """Refuse inputs on which onnxruntime would end the whole process: an LSTM or a GRU reads an empty batch.

    A GRU reads empty sequences no better.

    Raises:
        InputError: it would.
    """
    if not any(0 in getattr(value, "shape", ()) for value in (*inputs[0], *inputs[1].values())):
        return

    def refuse(node: ir.Node, read: Tensor) -> None:
        said = node.attributes.get("layout")
        batch = read.shape[0 if said is not None and said.value else 1]
        if batch == 0 or (node.op_type == "GRU" and 0 in read.shape[:2]):
            what = f"with these inputs, {node.op_type} {node.name or node.outputs[0].name} reads an empty value"
            raise InputError(what, allowed="what onnxruntime can run: a batch of at least 1, and of a GRU a step")

    reader, observers = Reader(model), Observers()
    for node in reader.gates:
        if node.op_type in _ENDING and node.inputs[0] is not None:
            observers.before[node].append((node.inputs[0], partial(refuse, node)))
    if observers.before:
        interpret(model, reader, feeds_of(reader, inputs), observers)


class OnnxModule(nn.Module):
    """An ONNX model as a module, which onnxruntime runs in ``session``; metrics get such a module.

    It is called with tensors or NumPy arrays, in the order of the graph's inputs or by their names, and returns a tuple
    of tensors in the order of the graph's outputs, also of one output.
    """

    def __init__(self, model: ir.Model) -> None:
        super().__init__()
        self._model, self.session = model, open_model(model, small=True)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Run the model on inputs in order or by name.

        Raises:
            InputError: other inputs than those of the graph, or onnxruntime cannot run it on them.
        """
        inputs = normalise_inputs((args, kwargs))
        feeds = feed(self.session, inputs)
        refuse_empty_batches(self._model, inputs)
        return tuple(map(_as_tensor, run_session(self.session, None, feeds)))


def _as_tensor(value: Any) -> Any:
    return torch.from_numpy(value) if hasattr(value, "dtype") and value.dtype != object else value


class ObservedOnnx(Observed):
    """An ONNX model that runs in torch, node by node; onnxruntime runs nodes that torch has no function for.

    What torch computes is compared with onnxruntime's outputs once, on ``inputs``, or else on those of the first run.
    """

    def __init__(
        self, model: ir.Model, reader: Reader, flow: Callable[[], Flow], inputs: Inputs, keep: KeepNorm | None = None
    ) -> None:
        super().__init__(flow)
        self._model, self._reader, self._inputs, self._keep = model, reader, inputs, keep
        self._checked: Checked | None = None
        self.forget()

    def forget(self) -> None:
        """Remove everything that watches, taps or follows a call."""
        self._observers, self._follows = Observers(), False

    def _value(self, number: int) -> ir.Value:
        return self._reader.values[number - self._reader.start]

    def watch(self, call: Call, see: See) -> None:
        """Call ``see`` with the input of a call."""
        self._watch_node(self._reader.node(call.values[0]), self._value(call.source), see)

    def _watch_node(self, node: ir.Node, source: ir.Value, see: See) -> None:
        def show(value: Tensor) -> None:
            with self._additions.paused():
                see(value)

        self._observers.before[node].append((source, show))

    def tap(self, call: Call, change: OutputChange) -> None:
        """Replace the output of a call by what ``change`` returns for it."""
        self._observers.after[self._value(call.value)] = change

    def _ready(self, inputs: Inputs) -> Checked:
        if self._checked is None:
            feeds = feeds_of(self._reader, self._inputs if any(self._inputs) else inputs)
            calls = [self._value(each.value) for each in self._reader.elements if isinstance(each, Call)]
            start = partial(open_model, self._model, small=True)
            with self._additions.paused():
                self._checked = check(self._reader, self._model, start, feeds, calls)
        return self._checked

    @property
    def differentiable(self) -> bool:
        """Whether torch ran all nodes through which gradients had to lead so far, and agrees with onnxruntime."""
        checked = self._ready(self._inputs)
        return checked.differentiable and not checked.interpreter.blocked

    def norms(self) -> Sequence[Norm]:
        """Return the batch norms of the graph whose statistics nothing else reads."""
        return [self._norm(found) for found in norms_of(self._reader)]

    def _norm(self, found: NormNode) -> Norm:
        pair = found.mean.numbers.clone(), found.variance.numbers.clone()
        interpreter = self._ready(self._inputs).interpreter
        interpreter.constants |= {v: t for v, t in zip(found.node.inputs[3:5], pair, strict=True) if v is not None}
        keep = None if self._keep is None else partial(self._keep, found, pair)
        return Norm(found.name, *pair, partial(self._watch_node, found.node, found.source), keep)

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        """Return nothing: the weights are tensors that need no gradients."""
        return ()

    def execute(self, inputs: Inputs) -> tuple[Any, ...]:
        """Run the model, and return its outputs."""
        return self._ready(inputs).interpreter.run(feeds_of(self._reader, inputs), self._observers)


class Shapes:
    """The shapes of values, and the costs of products, from one run on the example inputs.

    Of the branches of an If, only the one that this run takes costs anything.

    ``seen`` are the shapes by value, if there was such a run.
    """

    def __init__(
        self, model: ir.Model, reader: Reader, inputs: Inputs, seen: Mapping[int, Shape] | None = None
    ) -> None:
        self._model, self._reader, self._inputs, self._seen = model, reader, inputs, seen

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

    def runs(self, call: Call) -> bool:
        """Whether the example inputs reach a call.

        Raises:
            InputError: as for ``of``.
        """
        self.of(call.source)
        assert self._seen is not None
        return call.source in self._seen and bool({call.value, call.user} & self._seen.keys())

    def of_input(self, call: Call) -> Shape:
        """Return the shape of what a call reads.

        Raises:
            InputError: it does not run on the example inputs; or as for ``of``.
        """
        found = self.of(call.source)
        steps = self._steps(self._reader.node(call.value))
        if 0 in steps:
            raise InputError("its loop has no steps on the example inputs")
        if not self.runs(call):
            raise InputError("it is in a branch that does not run on the example inputs")
        return (*steps, *found)

    def _steps(self, node: ir.Node) -> Shape:
        """Return the number of steps of the recurrent layer in whose body a node is, as a shape of one axis."""
        layer = None if node.graph is None else self._reader.steps.get(node.graph)
        number = None if layer is None else self._reader.numbers.get(layer.part)
        return () if number is None else self.of(number)[:1]

    def _run(self) -> dict[int, Shape]:
        if self._reader.inputs and not any(self._inputs):
            raise InputError("sites have no costs without input shapes", next_step="give example_inputs")
        wanted = sorted(self._wanted())
        values = {number: self._reader.values[number - self._reader.start] for number in wanted}
        known: dict[ir.Value, Shape] = {}

        def note(value: ir.Value, found: Any) -> Any:
            known[value] = tuple(found.shape) if isinstance(found, Tensor) else ()
            return found

        observers = Observers()
        observers.after = {value: partial(note, value) for value in values.values()}
        feeds = feeds_of(self._reader, self._inputs)
        for value, found in feeds.items():
            note(value, found)
        for value, found in interpret(self._model, self._reader, feeds, observers).items():
            note(value, found)
        give_back()
        return {number: known[value] for number, value in values.items() if value in known}

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
        return numbers | {
            reader.numbers[layer.part] for layer in reader.layers.values() if layer.part in reader.numbers
        }

    def macs(self, number: int) -> int:
        """Return the multiply-accumulates of the node that gives a value; 0 if it does not run or is not known."""
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
        number = self._reader.number(node)
        reads, gives = self.of(source), self.of(number)
        if self._seen is None or number not in self._seen:  # it stands in a branch that does not run
            return 0
        if node.op_type in ("LSTM", "GRU", "RNN"):
            return math.prod(reads[:2]) * sum(math.prod(weight.shape) for weight in weights)  # in each step
        # Each place reads the whole weight once: places of the output in a Conv, of the input in a ConvTranspose.
        # Example of a Conv (8, 3, 3, 3) that gives (1, 8, 10, 10): 800 / 8 * 216 = 21,600.
        size = math.prod(weights[0].shape)
        if node.op_type == "ConvTranspose":
            return math.prod(reads) // max(1, weights[0].shape[0]) * size
        if node.op_type in ("Conv", "ConvInteger"):
            return math.prod(gives) // max(1, weights[0].shape[0]) * size
        return math.prod((*self._steps(node), *gives)) * (reads[-1] if reads else 0)
