"""The ONNX model of operators and chains, built node by node as torch's exporter would emit it.

- Reshapes are Reshape; shifts and sums are Add.
- A convolution is Conv or ConvTranspose. A Pad comes first if torch pads in another mode than with zeros. Unsqueeze and
  Squeeze stand around it if the input has no batch.
- A linear layer is Gemm on (rows, features), and MatMul, then Add, on any other number of dimensions.
- An embedding is Gather.
- An operator in the loop of a recurrent layer comes with that loop (``loop``).

``torch.onnx.export`` makes the same nodes a thousand times more slowly.

Tensors are float32 whatever the operator's dtype, because onnxruntime's CPU convolutions have no other kernel: half
precisions are cast around them, and float64 is refused.

The ONNX nodes of a recurrent layer's loop, so that its recurrent weight, dense or factored, is timed where it runs.

A dense weight is timed as a part of the runtime's own kernel (LSTM, GRU, RNN). A factored one is timed in a Scan over
the steps, whose body has the chain and the gates, as torch exports it. Both read one column of the input through an
input weight (G H, 1), which costs next to nothing. There are no biases.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from surgery.algebra import (
    Branches,
    Chain,
    Conv,
    Embedding,
    Flatten,
    Linear,
    Operator,
    Shape,
    Shift,
    Step,
    Transpose,
    Unflatten,
)
from surgery.errors import InputError
from surgery.kinds.onnx.nodes import (
    NodeWriter,
    pads_of,
    write_conv,
    write_embedding,
    write_linear,
    write_reshape,
    write_shift,
    write_transpose,
)
from surgery.sites import Activation, BatchNorm, Loop
from surgery.text import first_line

__all__ = ["BESIDE", "OPSET", "build_choice", "build_model", "emit_loop", "entries"]


@dataclass
class _Graph(NodeWriter):
    """A graph whose weights are float32, and random where a tensor has no numbers; large ones go to ``beside``."""

    beside: BinaryIO | None = None

    def constant(self, array: npt.NDArray[Any]) -> str:
        """Return the name of a new constant."""
        if self.beside is None or array.nbytes < _LARGE:
            return super().constant(array)
        # Each message that a message is copied into would hold the numbers once more.
        start = -(-self.beside.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self.beside.seek(start)
        self.beside.write(np.ascontiguousarray(array).data)
        name = f"{self.prefix}constant_{len(self.constants)}"
        kind = helper.np_dtype_to_tensor_dtype(array.dtype)
        tensor = onnx.TensorProto(name=name, data_type=kind, dims=array.shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", BESIDE), ("offset", start), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.constants.append(tensor)
        return name

    def weight(self, tensor: Tensor, *, turned: bool = False) -> str:
        """Return the name of a new constant with the numbers of a tensor."""
        array = _numbers(tensor)
        return self.constant(array.T if turned else array)


def _numbers(tensor: Tensor) -> np.ndarray:
    """Return float32 numbers; for the meta device random ones, scaled so that activations keep their size."""
    if not tensor.is_meta:
        return tensor.detach().to("cpu", torch.float32).numpy()
    # A sum of n products of unit variance has variance n.
    scale = math.prod(tensor.shape[1:]) ** -0.5
    return np.random.default_rng(0).standard_normal(tuple(tensor.shape), dtype=np.float32) * np.float32(scale)


_Emit = Callable[[_Graph, Step, Shape], None]
_ATTRIBUTES: dict[str, dict[str, Any]] = {"GRU": {"linear_before_reset": 1}, "RNN_RELU": {"activations": ["Relu"]}}
_ORDER = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}  # of ONNX's gates among torch's
_KERNELS = {"LSTM": "LSTM", "GRU": "GRU", "RNN_TANH": "RNN", "RNN_RELU": "RNN"}


def emit_loop(graph: _Graph, loop: Loop, steps: Sequence[Step], shape: Shape, emit: _Emit) -> None:
    """Append the loop with these steps in it, on an input that holds all time steps; ``emit`` appends one step."""
    out = shape
    for step in steps:
        out = step.out_shape(out)
    hidden = loop.out_shape(out)[-1]
    length = loop.steps(shape)
    batch = int(np.prod(shape[:-1])) // length
    graph.apply("Slice", *(graph.constant(np.array([at], np.int64)) for at in (0, 1, -1)))
    if loop.batch_first and len(shape) == 3:
        graph.apply("Transpose", perm=[1, 0, 2])
    write_reshape(graph, (length, batch, 1))
    if len(steps) == 1 and isinstance(steps[0], Linear):
        _emit_kernel(graph, loop, steps[0], hidden)
    else:
        _emit_scan(graph, loop, steps, (batch, hidden), emit)
    if loop.batch_first and len(shape) == 3:
        graph.apply("Transpose", perm=[1, 0, 2])
    write_reshape(graph, loop.out_shape(out))


def _input_weight(loop: Loop, hidden: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((loop.gates * hidden, 1), dtype=np.float32)


def _emit_kernel(graph: _Graph, loop: Loop, operator: Linear, hidden: int) -> None:
    more = _ATTRIBUTES.get(loop.mode, {})
    order = _ORDER.get(loop.mode, [0])
    # (G H, n) in torch's order of gates to (1, G H, n) in ONNX's. LSTM: torch has i f g o, and ONNX i o f g.
    ordered = [
        np.concatenate([np.split(array, loop.gates)[gate] for gate in order])[None]
        for array in (_input_weight(loop, hidden), _numbers(operator.weight))
    ]
    names = [graph.constant(array) for array in ordered]
    [graph.value, *_] = graph.add(_KERNELS[loop.mode], graph.value, *names, hidden_size=hidden, **more)
    graph.apply("Squeeze", graph.constant(np.array([1], np.int64)))


def _emit_scan(graph: _Graph, loop: Loop, steps: Sequence[Step], state: Shape, emit: _Emit) -> None:
    graph.apply("MatMul", graph.constant(_input_weight(loop, state[1]).T))
    body = _Graph(prefix=f"{graph.prefix}step_", value="h")
    shape = state
    for step in steps:
        emit(body, step, shape)
        shape = step.out_shape(shape)
    h, c = _GATES[loop.mode](body)
    for value, name in ((h, "h_next"), (c, "c_next"), (h, "row")):
        body.nodes.append(helper.make_node("Identity", [value], [name]))
    widths = {"h": 1, "c": 1, "part": loop.gates, "h_next": 1, "c_next": 1, "row": 1}
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [state[0], n * state[1]]) for name, n in widths.items()
    ]
    inner = helper.make_graph(body.nodes, "step", ends[:3], ends[3:], body.constants)
    zeros = graph.constant(np.zeros(state, np.float32))
    *_, graph.value = graph.add("Scan", zeros, zeros, graph.value, outputs=3, body=inner, num_scan_inputs=1)


def _lstm(body: _Graph) -> tuple[str, str]:
    # c' = f c + i g, h' = o tanh(c'), with the gates in torch's order i f g o.
    [both] = body.add("Add", "part", body.value)
    gates = body.add("Split", both, outputs=4, axis=-1, num_outputs=4)
    i, f, o = (body.add("Sigmoid", gates[at])[0] for at in (0, 1, 3))
    [kept], [added] = body.add("Mul", f, "c"), body.add("Mul", i, *body.add("Tanh", gates[2]))
    [c] = body.add("Add", kept, added)
    return body.add("Mul", o, *body.add("Tanh", c))[0], c


def _gru(body: _Graph) -> tuple[str, str]:
    # n = tanh(part_n + r other_n), h' = n + z (h - n), which is (1 - z) n + z h.
    parts, others = (body.add("Split", x, outputs=3, axis=-1, num_outputs=3) for x in ("part", body.value))
    r, z = (body.add("Sigmoid", *body.add("Add", parts[at], others[at]))[0] for at in (0, 1))
    [n] = body.add("Tanh", *body.add("Add", parts[2], *body.add("Mul", r, others[2])))
    return body.add("Add", n, *body.add("Mul", z, *body.add("Sub", "h", n)))[0], "c"


def _rnn(kind: str) -> Callable[[_Graph], tuple[str, str]]:
    return lambda body: (body.add(kind, *body.add("Add", "part", body.value))[0], "c")


_GATES: dict[str, Callable[[_Graph], tuple[str, str]]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": _rnn("Tanh"),
    "RNN_RELU": _rnn("Relu"),
}


BESIDE = "weights"
_LARGE = 2**20  # bytes of a weight that is worth a place in another file
OPSET = 20  # what torch.onnx writes; 19 is the first with Pad's wrap mode
_IR_VERSION = 10
_MAX_BYTES = 2**31 - 2**20  # protobuf's limit for one message, less room for the nodes
_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def build_model(operator: Operator | Chain, shape: Shape, beside: BinaryIO | None = None) -> bytes:
    """Return a serialised ONNX model that maps "input" of this shape as the operator or chain does to "output".

    Weights on the meta device (as ``Factorization.skeleton`` makes them) become seeded random numbers. Large ones are
    written into the file ``beside`` it, which has to be named ``BESIDE``.

    Raises:
        InputError: the operator is of an unknown kind, or its weights take more than 2 GiB.
    """
    graph = _build_branch(operator, shape, beside, output="output")
    return _serialise(graph.nodes, graph.constants, [_input(operator, shape)], operator.out_shape(shape))


def build_choice(
    first: Operator | Chain, second: Operator | Chain, shape: Shape, beside: BinaryIO | None = None
) -> bytes:
    """Return a serialised ONNX model that maps "input" as the first does if "second" is false, else as the second.

    Each is a branch of an If node, and onnxruntime optimises each branch like a model of its own. The node itself takes
    less than a microsecond. Weights, and what is raised, are as in ``build_model``.
    """
    branches = {}
    for attribute, operator in (("else_branch", first), ("then_branch", second)):
        graph = _build_branch(operator, shape, beside, output=attribute)
        output = [_float(attribute, operator.out_shape(shape))]
        branches[attribute] = helper.make_graph(graph.nodes, attribute, [], output, graph.constants)
    node = helper.make_node("If", ["second"], ["output"], **branches)
    inputs = [_input(first, shape), helper.make_tensor_value_info("second", TensorProto.BOOL, [])]
    return _serialise([node], [], inputs, first.out_shape(shape))


def _input(branch: Operator | Chain, shape: Shape) -> onnx.ValueInfoProto:
    kind = TensorProto.INT64 if entries(branch) else TensorProto.FLOAT
    return helper.make_tensor_value_info("input", kind, shape)


def entries(branch: Operator | Chain) -> int:
    """Return the number of entries if the first operator is an embedding; 0 if the input is activations."""
    first = branch.operators[0] if isinstance(branch, Chain) else branch
    return first.in_channels if first.reads_indices else 0


def _float(name: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _serialise(
    nodes: Sequence[onnx.NodeProto],
    constants: Sequence[onnx.TensorProto],
    inputs: Sequence[onnx.ValueInfoProto],
    output: Shape,
) -> bytes:
    graph = helper.make_graph(nodes, "operators", inputs, [_float("output", output)], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=_IR_VERSION)
    try:
        return model.SerializeToString()
    except Exception as error:  # protobuf's exceptions differ between its versions
        raise InputError(
            f"the operators do not fit in an ONNX model: {first_line(error)}", allowed="at most 2 GiB in all"
        ) from error


def _build_branch(branch: Operator | Chain, shape: Shape, beside: BinaryIO | None, *, output: str) -> _Graph:
    size = 4 * branch.parameters
    if size > _MAX_BYTES:
        raise InputError(f"the weights take {size / 2**30:.1f} GiB", allowed="an ONNX model of at most 2 GiB")
    graph = _Graph(beside=beside)
    steps = branch.steps if isinstance(branch, Chain) else (branch,)
    if isinstance(loop := steps[-1], Loop):
        emit_loop(graph, loop, steps[:-1], shape, _emit)
        steps = ()
    for step in steps:
        _emit(graph, step, shape)
        shape = step.out_shape(shape)
    graph.nodes[-1].output[0] = output
    return graph


def _emit(graph: _Graph, step: Step, shape: Shape) -> None:
    emit = _EMITTERS.get(type(step))
    if emit is None:
        allowed = ", ".join(kind.__name__ for kind in _EMITTERS)
        raise InputError(f"there is no known ONNX node for {type(step).__name__}", allowed=allowed)
    emit(graph, step, shape)


def _emit_reshape(graph: _Graph, step: Any, shape: Shape) -> None:
    write_reshape(graph, step.out_shape(shape))


def _emit_transpose(graph: _Graph, step: Any, shape: Shape) -> None:
    write_transpose(graph, len(shape), step.first, step.second)


def _emit_shift(graph: _Graph, step: Any, shape: Shape) -> None:
    write_shift(graph, step)


def _emit_branches(graph: _Graph, step: Any, shape: Shape) -> None:
    source, values = graph.value, []
    for row in step.rows:
        graph.value, at = source, shape
        for operator in row:
            _emit(graph, operator, at)
            at = operator.out_shape(at)
        values.append(graph.value)
    for value in values[:-1]:
        graph.apply("Add", value)


def _emit_linear(graph: _Graph, operator: Any, shape: Shape) -> None:
    write_linear(graph, operator, gemm=len(shape) == 2)


def _emit_embedding(graph: _Graph, operator: Any, shape: Shape) -> None:
    write_embedding(graph, operator)


def _emit_conv(graph: _Graph, operator: Any, shape: Shape) -> None:
    geometry = operator.geometry
    first_axis = [graph.constant(np.array([0], dtype=np.int64))] if len(shape) == geometry.dims + 1 else []
    if first_axis:
        graph.apply("Unsqueeze", *first_axis)
    padding = geometry.padding
    if geometry.padding_mode != "zeros" and geometry.padded:
        amounts = np.array(pads_of([(0, 0), (0, 0), *padding]), dtype=np.int64)
        graph.apply("Pad", graph.constant(amounts), mode=_PAD_MODES[geometry.padding_mode])
        padding = ((0, 0),) * geometry.dims
    write_conv(graph, operator, padding=padding)
    if first_axis:
        graph.apply("Squeeze", *first_axis)


def _emit_batch_norm(graph: _Graph, step: Any, shape: Shape) -> None:
    one = np.ones(shape[1], np.float32)
    graph.apply("BatchNormalization", *map(graph.constant, (one, 0 * one, 0 * one, one)))


def _emit_activation(graph: _Graph, step: Any, shape: Shape) -> None:
    limits = [np.array(value, np.float32) for value in (0, 6)] if step.kind == "Clip" else []
    graph.apply(step.kind, *map(graph.constant, limits))


_EMITTERS: dict[type, Callable[[_Graph, Any, Shape], None]] = {
    Linear: _emit_linear,
    Conv: _emit_conv,
    Embedding: _emit_embedding,
    Unflatten: _emit_reshape,
    Flatten: _emit_reshape,
    Transpose: _emit_transpose,
    Shift: _emit_shift,
    Branches: _emit_branches,
    BatchNorm: _emit_batch_norm,
    Activation: _emit_activation,
}
