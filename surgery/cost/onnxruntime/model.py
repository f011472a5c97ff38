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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Conv, Embedding, Geometry, Linear, Operator, Shape
from surgery.algebra.steps import Branches, Flatten, Shift, Step, Transpose, Unflatten
from surgery.cost.onnxruntime.graph import OnnxGraph, numbers
from surgery.cost.onnxruntime.loop import emit_loop
from surgery.errors import InputError
from surgery.sites.epilogue import Activation, BatchNorm, Loop
from surgery.text import first_line

__all__ = ["OPSET", "build_choice", "build_model", "entries"]

OPSET = 20  # what torch.onnx writes; 19 is the first with Pad's wrap mode
_IR_VERSION = 10
_MAX_BYTES = 2**31 - 2**20  # protobuf's limit for one message, less room for the nodes
_PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def build_model(operator: Operator | Chain, shape: Shape) -> bytes:
    """Return a serialised ONNX model that maps "input" of this shape as the operator or chain does to "output".

    Weights on the meta device (as ``Factorization.skeleton`` makes them) become seeded random numbers.

    Raises:
        InputError: the operator is of an unknown kind, or its weights take more than 2 GiB.
    """
    graph = _build_branch(operator, shape, output="output")
    return _serialise(graph.nodes, graph.constants, [_input(operator, shape)], operator.out_shape(shape))


def build_choice(first: Operator | Chain, second: Operator | Chain, shape: Shape) -> bytes:
    """Return a serialised ONNX model that maps "input" as the first does if "second" is false, else as the second.

    Each is a branch of an If node, and onnxruntime optimises each branch like a model of its own. The node itself takes
    less than a microsecond. Raises InputError as ``build_model`` does.
    """
    branches = {}
    for attribute, operator in (("else_branch", first), ("then_branch", second)):
        graph = _build_branch(operator, shape, output=attribute)
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


def _build_branch(branch: Operator | Chain, shape: Shape, *, output: str) -> OnnxGraph:
    size = 4 * branch.parameters
    if size > _MAX_BYTES:
        raise InputError(f"the weights take {size / 2**30:.1f} GiB", allowed="an ONNX model of at most 2 GiB")
    graph = OnnxGraph()
    steps = branch.steps if isinstance(branch, Chain) else (branch,)
    if isinstance(loop := steps[-1], Loop):
        emit_loop(graph, loop, steps[:-1], shape, _emit)
        steps = ()
    for step in steps:
        _emit(graph, step, shape)
        shape = step.out_shape(shape)
    graph.nodes[-1].output[0] = output
    return graph


def _emit(graph: OnnxGraph, step: Step, shape: Shape) -> None:
    emit = _EMITTERS.get(type(step))
    if emit is None:
        allowed = ", ".join(kind.__name__ for kind in _EMITTERS)
        raise InputError(f"there is no known ONNX node for {type(step).__name__}", allowed=allowed)
    emit(graph, step, shape)


def _emit_reshape(graph: OnnxGraph, step: Any, shape: Shape) -> None:
    graph.apply("Reshape", [np.array(step.out_shape(shape), dtype=np.int64)])


def _emit_transpose(graph: OnnxGraph, step: Any, shape: Shape) -> None:
    order = list(range(len(shape)))
    order[step.first], order[step.second] = order[step.second], order[step.first]
    graph.apply("Transpose", perm=order)


def _emit_shift(graph: OnnxGraph, step: Any, shape: Shape) -> None:
    graph.apply("Add", [numbers(step.bias)])


def _emit_branches(graph: OnnxGraph, step: Any, shape: Shape) -> None:
    source, values = graph.value, []
    for row in step.rows:
        graph.value, at = source, shape
        for operator in row:
            _emit(graph, operator, at)
            at = operator.out_shape(at)
        values.append(graph.value)
    for value in values[:-1]:
        graph.apply("Add", others=[value])


def _emit_linear(graph: OnnxGraph, operator: Any, shape: Shape) -> None:
    weight, bias = numbers(operator.weight), numbers(operator.bias)
    if len(shape) == 2:
        graph.apply("Gemm", [weight, bias], transB=1)
        return
    graph.apply("MatMul", [None if weight is None else weight.T])
    if bias is not None:
        graph.apply("Add", [bias])


def _emit_embedding(graph: OnnxGraph, operator: Any, shape: Shape) -> None:
    weight, indices = numbers(operator.weight), graph.value
    assert weight is not None  # an embedding has one
    graph.value = graph.constant(weight)
    graph.apply("Gather", others=[indices])


def _emit_conv(graph: OnnxGraph, operator: Any, shape: Shape) -> None:
    geometry = operator.geometry
    unbatched = len(shape) == geometry.dims + 1
    first_axis = np.array([0], dtype=np.int64)
    if unbatched:
        graph.apply("Unsqueeze", [first_axis])
    padding = geometry.padding
    if geometry.padding_mode != "zeros" and geometry.padded:
        amounts = np.array([0, 0, *_pads(padding, 0), 0, 0, *_pads(padding, 1)], dtype=np.int64)
        graph.apply("Pad", [amounts], mode=_PAD_MODES[geometry.padding_mode])
        padding = ((0, 0),) * geometry.dims
    graph.apply(
        "ConvTranspose" if geometry.transposed else "Conv",
        [numbers(operator.weight), numbers(operator.bias)],
        kernel_shape=operator.kernel_size,
        strides=geometry.stride,
        dilations=geometry.dilation,
        pads=[*_pads(padding, 0), *_pads(padding, 1)],
        group=operator.groups,
        **_transposed_attributes(geometry),
    )
    if unbatched:
        graph.apply("Squeeze", [first_axis])


def _pads(padding: tuple[tuple[int, int], ...], side: int) -> list[int]:
    return [pair[side] for pair in padding]


def _transposed_attributes(geometry: Geometry) -> dict[str, Any]:
    return {"output_padding": geometry.output_padding} if geometry.transposed else {}


def _emit_batch_norm(graph: OnnxGraph, step: Any, shape: Shape) -> None:
    one = np.ones(shape[1], np.float32)
    graph.apply("BatchNormalization", [one, 0 * one, 0 * one, one])


def _emit_activation(graph: OnnxGraph, step: Any, shape: Shape) -> None:
    limits = [np.array(value, np.float32) for value in (0, 6)] if step.kind == "Clip" else []
    graph.apply(step.kind, limits)


_EMITTERS: dict[type, Callable[[OnnxGraph, Any, Shape], None]] = {
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
