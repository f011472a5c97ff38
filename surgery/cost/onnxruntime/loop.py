"""The ONNX nodes of a recurrent layer's loop, so that its recurrent weight, dense or factored, is timed where it runs.

A dense weight is timed as a part of the runtime's own kernel (LSTM, GRU, RNN). A factored one is timed in a Scan over
the steps, whose body has the chain and the gates, as torch exports it. Both read one column of the input through an
input weight (G H, 1), which costs next to nothing. There are no biases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from surgery.algebra.operators import Linear, Shape
from surgery.algebra.steps import Step
from surgery.cost.onnxruntime.graph import OnnxGraph, numbers
from surgery.sites.epilogue import Loop

__all__ = ["emit_loop"]

_Emit = Callable[[OnnxGraph, Step, Shape], None]
_ATTRIBUTES: dict[str, dict[str, Any]] = {"GRU": {"linear_before_reset": 1}, "RNN_RELU": {"activations": ["Relu"]}}
_ORDER = {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}  # of ONNX's gates among torch's
_KERNELS = {"LSTM": "LSTM", "GRU": "GRU", "RNN_TANH": "RNN", "RNN_RELU": "RNN"}


def emit_loop(graph: OnnxGraph, loop: Loop, steps: Sequence[Step], shape: Shape, emit: _Emit) -> None:
    """Append the loop with these steps in it, on an input that holds all time steps; ``emit`` appends one step."""
    out = shape
    for step in steps:
        out = step.out_shape(out)
    hidden = loop.out_shape(out)[-1]
    length = loop.steps(shape)
    batch = int(np.prod(shape[:-1])) // length
    graph.apply("Slice", [np.array([at], np.int64) for at in (0, 1, -1)])
    if loop.batch_first and len(shape) == 3:
        graph.apply("Transpose", perm=[1, 0, 2])
    graph.apply("Reshape", [np.array([length, batch, 1], np.int64)])
    if len(steps) == 1 and isinstance(steps[0], Linear):
        _emit_kernel(graph, loop, steps[0], hidden)
    else:
        _emit_scan(graph, loop, steps, (batch, hidden), emit)
    if loop.batch_first and len(shape) == 3:
        graph.apply("Transpose", perm=[1, 0, 2])
    graph.apply("Reshape", [np.array(loop.out_shape(out), np.int64)])


def _input_weight(loop: Loop, hidden: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((loop.gates * hidden, 1), dtype=np.float32)


def _emit_kernel(graph: OnnxGraph, loop: Loop, operator: Linear, hidden: int) -> None:
    more = _ATTRIBUTES.get(loop.mode, {})
    weight = numbers(operator.weight)
    assert weight is not None  # an operator has one
    order = _ORDER.get(loop.mode, [0])
    ordered = [
        np.concatenate([np.split(array, loop.gates)[gate] for gate in order])[None]
        for array in (_input_weight(loop, hidden), weight)
    ]
    names = [graph.constant(array) for array in ordered]
    [graph.value, *_] = graph.add(_KERNELS[loop.mode], graph.value, *names, hidden_size=hidden, **more)
    graph.apply("Squeeze", [np.array([1], np.int64)])


def _emit_scan(graph: OnnxGraph, loop: Loop, steps: Sequence[Step], state: Shape, emit: _Emit) -> None:
    graph.apply("MatMul", [_input_weight(loop, state[1]).T])
    body = OnnxGraph(prefix=f"{graph.prefix}step_", value="h")
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


def _lstm(body: OnnxGraph) -> tuple[str, str]:
    [both] = body.add("Add", "part", body.value)
    gates = body.add("Split", both, outputs=4, axis=-1, num_outputs=4)
    i, f, o = (body.add("Sigmoid", gates[at])[0] for at in (0, 1, 3))
    [kept], [added] = body.add("Mul", f, "c"), body.add("Mul", i, *body.add("Tanh", gates[2]))
    [c] = body.add("Add", kept, added)
    return body.add("Mul", o, *body.add("Tanh", c))[0], c


def _gru(body: OnnxGraph) -> tuple[str, str]:
    parts, others = (body.add("Split", x, outputs=3, axis=-1, num_outputs=3) for x in ("part", body.value))
    r, z = (body.add("Sigmoid", *body.add("Add", parts[at], others[at]))[0] for at in (0, 1))
    [n] = body.add("Tanh", *body.add("Add", parts[2], *body.add("Mul", r, others[2])))
    return body.add("Add", n, *body.add("Mul", z, *body.add("Sub", "h", n)))[0], "c"


def _rnn(kind: str) -> Callable[[OnnxGraph], tuple[str, str]]:
    return lambda body: (body.add(kind, *body.add("Add", "part", body.value))[0], "c")


_GATES: dict[str, Callable[[OnnxGraph], tuple[str, str]]] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN_TANH": _rnn("Tanh"),
    "RNN_RELU": _rnn("Relu"),
}
