"""ONNX graphs that run in torch: each operator as onnxruntime has it, bodies, functions, gradients, batch norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import surgery
from surgery.algebra import relative_error
from surgery.data.batch_norm import reestimate_batch_norm
from surgery.data.collect import collect, with_sensitivity
from surgery.data.samples import read_calibration
from surgery.kinds.inputs import Inputs
from surgery.kinds.observed import Observed
from surgery.kinds.onnx.checked import agree, check
from surgery.kinds.onnx.interpret import Interpreter, Observers
from surgery.kinds.onnx.ops.table import OPS
from surgery.kinds.onnx.read import Reader
from surgery.kinds.onnx.run import feeds_of
from surgery.kinds.onnx.session import open_model, open_session
from surgery.kinds.registry import kind_of, observe
from surgery.runtime.compare import run_model
from surgery.sites import Call
from tests.covering import ALL
from tests.tolerances import tolerance
from tests.zoo import graph

OPSET = 20


@dataclass(frozen=True)
class Node:
    """One node on some inputs: arrays, or None for one that is left out."""

    op: str
    inputs: Sequence[Any]
    said: dict[str, Any] = field(default_factory=dict)
    opset: int = OPSET
    outputs: int = 1
    dtype: Any = np.float32
    note: str = ""

    @property
    def name(self) -> str:
        said = ",".join(f"{key}={value}" for key, value in self.said.items() if not isinstance(value, onnx.TensorProto))
        return f"{self.op}-{self.opset}{'-' + said if said else ''}{'-' + self.note if self.note else ''}".replace(
            " ", ""
        )

    @property
    def arrays(self) -> dict[str, Any]:
        return {f"x{at}": np.asarray(x) for at, x in enumerate(self.inputs) if x is not None}

    def proto(self, *, outputs: int | None = None) -> onnx.ModelProto:
        domain, _, op = self.op.rpartition(".")
        reads = ["" if x is None else f"x{at}" for at, x in enumerate(self.inputs)]
        gives = [f"y{at}" for at in range(self.outputs)]
        node = helper.make_node(op, reads, gives, domain=domain, **self.said)
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(x.dtype), list(x.shape))
            for name, x in self.arrays.items()
        ]
        infos = [helper.make_empty_tensor_value_info(name) for name in gives]
        opsets = [helper.make_opsetid("", self.opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
        graph = helper.make_graph([node], "node", inputs, infos)
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def x(*shape: int, seed: int = 0, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def whole(*values: Any) -> Any:
    return np.array(values, dtype=np.int64)


def positive(*shape: int, seed: int = 0) -> Any:
    return np.abs(x(*shape, seed=seed)) + np.float32(0.5)


def yes(*shape: int, seed: int = 0) -> Any:
    return x(*shape, seed=seed) > 0


A, B, ROW = x(2, 3, 4), x(2, 3, 4, seed=1), x(4, seed=2)
EIGHT, IMAGE, LINE = x(1, 4, 7, 8), x(2, 3, 8, 7), x(2, 3, 9)
UNARY = (
    *("Abs", "Atan", "Ceil", "Cos", "Cosh", "Asinh", "Erf", "Exp", "Floor", "HardSigmoid", "HardSwish", "Identity"),
    *("LeakyRelu", "Mish", "Neg", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh", "Softplus", "Softsign"),
    *("Tan", "Tanh", "ThresholdedRelu", "Elu", "Celu", "Gelu", "IsNaN", "IsInf", "Shrink"),
)
PLAIN = [
    *(Node(op, [A]) for op in UNARY),
    *(Node(op, [np.tanh(A)]) for op in ("Acos", "Asin", "Atanh")),
    *(Node(op, [positive(2, 3)]) for op in ("Log", "Sqrt", "Reciprocal")),
    Node("Acosh", [positive(2, 3) + 1]),
    *(Node(op, [A, ROW]) for op in ("Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean", "PRelu")),
    *(Node(op, [A, ROW, B]) for op in ("Max", "Min", "Sum", "Mean")),
    *(Node(op, [A, ROW]) for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")),
    *(Node(op, [yes(2, 3), yes(3, seed=1)]) for op in ("And", "Or", "Xor")),
    *(Node(op, [whole(6, 5), whole(3, 4)]) for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "Equal", "Add")),
    *(
        Node("BitShift", [np.array([5, 9], np.uint8), np.array([1, 2], np.uint8)], {"direction": way})
        for way in ("LEFT", "RIGHT")
    ),
    Node("BitwiseNot", [whole(6, 5)]),
    Node("Not", [yes(2, 3)]),
    Node("Div", [whole(7, -7, 8), whole(2, 2, -3)], note="ints"),
    Node("Mod", [whole(7, -7, 8), whole(2, 2, -3)]),
    Node("Mod", [A, ROW], {"fmod": 1}),
    Node("Pow", [positive(2, 3), x(3)]),
    Node("Pow", [A, np.float32(2.0)]),
    Node("Pow", [A, whole(3)], note="ints"),
    Node("LeakyRelu", [A], {"alpha": 0.3}),
    Node("HardSigmoid", [A], {"alpha": 0.3, "beta": 0.4}),
    Node("Elu", [A], {"alpha": 0.7}),
    Node("Gelu", [A], {"approximate": "tanh"}),
    Node("Clip", [A, np.float32(-0.5), np.float32(0.5)]),
    Node("Clip", [A, None, np.float32(0.5)], note="open"),
    Node("Clip", [A], {"min": -0.5, "max": 0.25}, 6),
    Node("Clip", [A], {"max": 0.25}, 6),
    Node("Cast", [A * 3], {"to": TensorProto.INT64}),
    Node("Cast", [A * 3], {"to": TensorProto.DOUBLE}),
    Node("Cast", [A * 3], {"to": TensorProto.BOOL}),
    Node("Cast", [A * 3], {"to": TensorProto.INT8}),
    Node("CastLike", [A * 3, whole(1)]),
    Node("Dropout", [A], outputs=1),
    Node("Dropout", [A], {"ratio": 0.3}, 7),
    Node("Where", [yes(2, 3, 1), A, B]),
    *(Node(op, [A], opset=12) for op in ("Softmax", "LogSoftmax")),
    *(
        Node(op, [A], {"axis": axis}, opset)
        for op in ("Softmax", "LogSoftmax")
        for axis in (1, -1)
        for opset in (11, 13)
    ),
    Node("com.microsoft.BiasGelu", [A, ROW]),
    Node("com.microsoft.FastGelu", [A, ROW]),
    Node("com.microsoft.Gelu", [A]),
    Node("com.microsoft.QuickGelu", [A]),
    Node("com.microsoft.FusedMatMul", [x(3, 4), x(2, 4)], {"transB": 1, "alpha": 0.5}),
    Node("com.microsoft.SkipLayerNormalization", [A, B, ROW, ROW, ROW]),
    Node("com.microsoft.SkipSimplifiedLayerNormalization", [A, B, ROW]),
]
MOVED = [
    Node("Shape", [A]),
    Node("Shape", [A], {"start": 1, "end": -1}),
    Node("Size", [A]),
    Node("Reshape", [A, whole(0, -1)]),
    Node("Reshape", [x(0, 3), whole(3, 0)], {"allowzero": 1}),
    *(Node("Flatten", [A], {"axis": axis}) for axis in (0, 1, 2, -1)),
    Node("Squeeze", [x(1, 3, 1)]),
    Node("Squeeze", [x(1, 3, 1), whole(-1)]),
    Node("Squeeze", [x(1, 3, 1)], {"axes": [0]}, 11),
    Node("Unsqueeze", [x(3, 4), whole(0, -1)]),
    Node("Unsqueeze", [x(3, 4)], {"axes": [1, 3]}, 11),
    Node("Transpose", [A]),
    Node("Transpose", [A], {"perm": [1, 2, 0]}),
    Node("Concat", [A, B], {"axis": -2}),
    Node("Split", [x(2, 6)], {"axis": 1}, 11, outputs=3),
    Node("Split", [x(2, 6)], {"axis": 1, "split": [1, 5]}, 11, outputs=2),
    Node("Split", [x(2, 6), whole(2, 4)], {"axis": 1}, outputs=2),
    Node("Split", [x(2, 7)], {"axis": 1, "num_outputs": 3}, outputs=3),
    Node("Slice", [A], {"starts": [0, 1], "ends": [2, 99], "axes": [0, 2]}, 9),
    Node("Slice", [A, whole(-1, 3), whole(-99, 0), whole(1, 2), whole(-1, -2)]),
    Node("Slice", [A, whole(1), whole(3), whole(-1)]),
    Node("Slice", [A, whole(0, 1), whole(2, 2)]),
    Node("Slice", [A, whole(3), whole(1), whole(-1)], note="empty"),
    Node("Pad", [A, whole(0, 1, 2, 1, 0, 1)]),
    Node("Pad", [A, whole(0, 1, -1, 1, 0, 1), np.float32(0.5)], {"mode": "constant"}),
    *(Node("Pad", [A, whole(0, 1, 2, 1, 0, 1)], {"mode": mode}) for mode in ("reflect", "edge", "wrap")),
    Node("Pad", [A, whole(1, 2), np.float32(1), whole(-1)], note="axes"),
    Node("Pad", [A], {"pads": [0, 1, 2, 1, 0, 1], "value": 2.0}, 10),
    Node("Pad", [whole(1, 2), whole(1, 1), np.int64(7)], note="ints"),
    Node("Expand", [x(3, 1), whole(2, 1, 4)]),
    Node("Tile", [A, whole(1, 2, 3)]),
    Node("Range", [np.int64(1), np.int64(9), np.int64(3)]),
    Node("Range", [np.float32(1), np.float32(-1), np.float32(-0.5)], note="floats"),
    Node("ConstantOfShape", [whole(2, 3)]),
    Node("ConstantOfShape", [whole(2)], {"value": numpy_helper.from_array(whole(7))}, note="seven"),
    Node("EyeLike", [x(2, 3)]),
    *(Node("Trilu", [A, np.int64(k)], {"upper": upper}, note=str(k)) for k in (-1, 1) for upper in (0, 1)),
    *(Node("DepthToSpace", [x(1, 8, 2, 3)], {"blocksize": 2, "mode": mode}) for mode in ("DCR", "CRD")),
    Node("SpaceToDepth", [x(1, 2, 4, 6)], {"blocksize": 2}),
    Node("Gather", [A, whole(-1, 0)], {"axis": 1}),
    Node("Gather", [A, np.int64(2)], {"axis": 2}, note="number"),
    Node("Gather", [x(5, 3), whole([1, -1], [0, 4])]),
    Node("Gather", [whole(3, 4), np.int64(-1)], note="number of a row"),
    Node("GatherElements", [A, np.random.default_rng(0).integers(-4, 4, (2, 3, 2))], {"axis": 2}),
    Node("GatherND", [A, whole([0, 1], [1, -1])]),
    Node("GatherND", [A, whole([[0], [1]], [[2], [-1]])], {"batch_dims": 1}),
    *(
        Node("ScatterElements", [x(3, 4), whole([1, -1]), x(1, 2, seed=3)], {"axis": 1, "reduction": how})
        for how in ("none", "add", "mul", "max", "min")
    ),
    Node("Scatter", [x(3, 4), whole([1, 2]), x(1, 2, seed=3)], {"axis": 1}, 9),
    *(
        Node("ScatterND", [x(4, 3), whole([1], [1], [-1]), x(3, 3, seed=3)], {"reduction": how})
        for how in ("add", "mul", "max", "min")
    ),
    Node("ScatterND", [A, whole([0, 1], [1, 2]), x(2, 4, seed=3)]),
    Node("OneHot", [whole(0, -1, 5, 2), np.int64(4), x(2)]),
    Node("OneHot", [whole(0, 3), np.int64(4), x(2)], {"axis": 0}),
    Node("NonZero", [yes(3, 4)]),
    Node("TopK", [A, whole(2)], outputs=2),
    Node("TopK", [A, whole(2)], {"axis": 1, "largest": 0}, outputs=2),
    Node("TopK", [A], {"k": 3}, 9, outputs=2),
    *(
        Node(op, [A.round()], {"axis": 2, "keepdims": 0, "select_last_index": last})
        for op in ("ArgMax", "ArgMin")
        for last in (0, 1)
    ),
    *(Node("CumSum", [A, np.int64(1)], {"exclusive": e, "reverse": r}) for e in (0, 1) for r in (0, 1)),
    Node("Compress", [A, np.array([True, False, True])], {"axis": 1}),
    Node("Compress", [A, np.array([True, False, True])]),
]
REDUCED = [
    *(
        Node(op, [positive(2, 3, 4), whole(0, -1)], {"keepdims": keep}, 18)
        for op in sorted(OPS)
        if op.startswith("Reduce")
        for keep in (0, 1)
    ),
    *(Node(op, [positive(2, 3, 4)], {"axes": [1], "keepdims": 0}, 11) for op in sorted(OPS) if op.startswith("Reduce")),
    Node("ReduceSum", [A, whole(1)], opset=13),
    Node("ReduceSum", [A], {"noop_with_empty_axes": 1}, 13),
    Node("ReduceMean", [A], opset=13),
    Node("ReduceSum", [whole(1, 2)], note="ints"),
    Node("BatchNormalization", [IMAGE, x(3), x(3, seed=1), x(3, seed=2), positive(3)]),
    Node("BatchNormalization", [IMAGE, x(3), x(3, seed=1), x(3, seed=2), positive(3)], {"epsilon": 0.1}, 9),
    Node("InstanceNormalization", [IMAGE, x(3), x(3, seed=1)]),
    Node("LayerNormalization", [A, ROW, ROW]),
    Node("LayerNormalization", [A, x(3, 4)], {"axis": 1, "epsilon": 0.01}, outputs=3),
    Node("GroupNormalization", [EIGHT, x(4), x(4, seed=1)], {"num_groups": 2}, 21),
    Node("GroupNormalization", [EIGHT, x(2), x(2, seed=1)], {"num_groups": 2}, 18),
    Node("RMSNormalization", [A, ROW], opset=23),
    Node("SimplifiedLayerNormalization", [A, ROW], {"axis": -1, "epsilon": 1e-5}),
    *(Node("LpNormalization", [A], {"axis": 1, "p": p}) for p in (1, 2)),
    Node("MeanVarianceNormalization", [IMAGE]),
    Node("LRN", [IMAGE], {"size": 3, "alpha": 0.1}),
]
AUTO = ("SAME_UPPER", "SAME_LOWER", "VALID")
W = {1: x(6, 3, 3), 2: x(6, 3, 3, 2), 3: x(6, 3, 1, 3, 2)}
SIZED = {1: LINE, 2: IMAGE, 3: x(1, 3, 4, 6, 5)}
LINEAR = [
    Node("MatMul", [A, x(4, 5)]),
    Node("MatMul", [ROW, x(2, 4, 5)]),
    Node("Gemm", [x(3, 4), x(4, 5), x(5)]),
    Node("Gemm", [x(4, 3), x(5, 4), x(3, 1)], {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}),
    Node("Gemm", [x(3, 4), x(4, 5)], {"alpha": 0.5}),
    Node("Einsum", [A, x(4, 5)], {"equation": "bij,jk->bik"}),
    Node("Einsum", [x(2, 3, 3)], {"equation": "...ii->...i"}),
    *(Node("Conv", [SIZED[n], W[n], x(6)], {"pads": [1] * 2 * n, "strides": [2] * n}) for n in (1, 2, 3)),
    Node("Conv", [IMAGE, W[2]], {"pads": [0, 1, 2, 1], "dilations": [2, 1]}),
    *(Node("Conv", [IMAGE, W[2]], {"auto_pad": auto, "strides": [2, 1]}) for auto in AUTO),
    Node("Conv", [EIGHT, x(4, 2, 3, 3)], {"group": 2}),
    *(Node("ConvTranspose", [SIZED[n], W[n].swapaxes(0, 1).copy()], {"strides": [2] * n}) for n in (1, 2, 3)),
    Node("ConvTranspose", [LINE, x(3, 4, 3), x(4)], {"pads": [1, 1], "strides": [2], "output_padding": [1]}),
    Node("ConvTranspose", [LINE, x(3, 4, 3), x(4)], {"pads": [0, 1], "strides": [2], "output_padding": [1]}),
    Node("ConvTranspose", [EIGHT, x(4, 3, 2, 3)], {"group": 2, "dilations": [2, 1], "pads": [1, 0, 0, 1]}),
    Node("Attention", [x(1, 2, 3, 4), x(1, 2, 5, 4), x(1, 2, 5, 4)], opset=23),
    Node("Attention", [x(1, 4, 8), x(1, 4, 4), x(1, 4, 4)], {"q_num_heads": 4, "kv_num_heads": 2, "is_causal": 1}, 23),
    Node("Attention", [x(1, 2, 3, 4), x(1, 2, 5, 4), x(1, 2, 5, 4), x(3, 5)], {"scale": 0.3}, 23),
]
POOLED = [
    Node("GlobalAveragePool", [IMAGE]),
    Node("GlobalMaxPool", [LINE]),
    *(Node(op, [SIZED[n]], {"kernel_shape": [3, 2, 2][:n]}) for op in ("MaxPool", "AveragePool") for n in (1, 2, 3)),
    *(
        Node(op, [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": pads, "ceil_mode": ceil}, 19)
        for op in ("MaxPool", "AveragePool")
        for pads in ([1, 1, 1, 1], [0, 1, 1, 0])
        for ceil in (0, 1)
    ),
    *(
        Node(op, [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 2], "auto_pad": auto})
        for op in ("MaxPool", "AveragePool")
        for auto in AUTO
    ),
    *(
        Node(
            "AveragePool",
            [IMAGE],
            {"kernel_shape": [3, 3], "strides": [2, 2], "count_include_pad": 1, "pads": pads, "ceil_mode": ceil},
            19,
        )
        for pads in ([1, 1, 1, 1], [0, 1, 1, 0])
        for ceil in (0, 1)
    ),
    Node("MaxPool", [LINE], {"kernel_shape": [2], "dilations": [3]}),
    *(
        Node(
            "Resize",
            [x(1, 2, 4, 5), None, np.array([1, 1, *by], np.float32)],
            {"mode": mode, "coordinate_transformation_mode": where},
        )
        for mode in ("nearest", "linear", "cubic")
        for by in ([2, 3], [0.6, 1.4])
        for where in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    ),
    *(
        Node(
            "Resize",
            [x(1, 2, 4, 5), None, np.array([1, 1, 2, 0.6], np.float32)],
            {"mode": "nearest", "nearest_mode": how, "coordinate_transformation_mode": "asymmetric"},
        )
        for how in ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil")
    ),
    Node("Resize", [x(1, 2, 4, 5), None, None, whole(1, 2, 7, 3)], {"mode": "linear"}, 13),
    Node("Resize", [x(1, 2, 4, 5), None, None, whole(7, 3)], {"mode": "linear", "axes": [2, 3]}, 18),
    Node("Resize", [x(1, 2, 4, 5), None, np.array([1, 1, 2, 2], np.float32)], {"mode": "cubic", "exclude_outside": 1}),
    *(
        Node("Resize", [x(1, 2, 4, 6), np.array([1, 1, 2, 0.5], np.float32)], {"mode": mode}, 10)
        for mode in ("nearest", "linear")
    ),
    *(
        Node("Upsample", [x(1, 2, 4, 5), np.array([1, 1, 2, 3], np.float32)], {"mode": mode}, 9)
        for mode in ("nearest", "linear")
    ),
    *(
        Node("GridSample", [x(1, 2, 4, 5), np.tanh(x(1, 3, 3, 2)) * 1.3], {"mode": mode, "padding_mode": pads}, 16)
        for mode in ("bilinear", "nearest")
        for pads in ("zeros", "border", "reflection")
    ),
]


def recurrent(op: str, gates: int, directions: int = 1, *, states: int = 0, **said: Any) -> Node:
    """A recurrent layer of 4 steps, batch 2, 3 inputs, and 5 hidden numbers; ``states`` is how many it starts from."""
    more = [x(directions, 2, 5, seed=3 + at) for at in range(states)]
    inputs = [
        x(4, 2, 3),
        x(directions, gates * 5, 3),
        x(directions, gates * 5, 5),
        x(directions, 2 * gates * 5),
        None,
        *more,
    ]
    return Node(op, inputs, {"hidden_size": 5, **said}, outputs=3 if op == "LSTM" else 2, note=f"{states}")


PEEPHOLES = Node("LSTM", [*recurrent("LSTM", 4, states=2).inputs, x(1, 15)], {"hidden_size": 5}, outputs=3)
LAYERS = [
    *(
        recurrent(op, gates, 1 + (way == "bidirectional"), direction=way, states=states)
        for op, gates, states in (("LSTM", 4, 2), ("LSTM", 4, 0), ("GRU", 3, 1), ("RNN", 1, 0))
        for way in ("forward", "reverse", "bidirectional")
    ),
    recurrent("GRU", 3, 2, direction="bidirectional", linear_before_reset=1),
    PEEPHOLES,
    Node("LSTM", [*recurrent("LSTM", 4).inputs[:4], np.array([4, 4], np.int32)], {"hidden_size": 5}, outputs=3),
]
NODES = [*PLAIN, *MOVED, *REDUCED, *LINEAR, *POOLED, *LAYERS]


def interpreted(
    proto: onnx.ModelProto, arrays: dict[str, Any], observers: Observers | None = None
) -> tuple[Any, Interpreter]:
    model = ir.serde.deserialize_model(proto)
    interpreter = Interpreter(model, {})
    feeds = feeds_of(Reader(model), ((), {name: torch.from_numpy(a) for name, a in arrays.items()}))
    with torch.no_grad():
        return interpreter.run(feeds, observers), interpreter


def by_onnxruntime(proto: onnx.ModelProto, arrays: dict[str, Any]) -> list[Any]:
    return list(open_session(proto.SerializeToString()).run(None, arrays))


def assert_same(found: Any, expected: Any, *, steps: int = 64) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, map(torch.from_numpy, expected), strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        if a.is_floating_point():
            assert relative_error(a, b) <= tolerance(a.dtype, length=4, steps=steps)
        else:
            assert torch.equal(a, b)


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.name)
def test_each_operator_is_that_of_onnxruntime(node: Node) -> None:
    proto = node.proto()
    found, interpreter = interpreted(proto, node.arrays)
    assert not interpreter.elsewhere
    assert_same(found, by_onnxruntime(proto, node.arrays))


def test_each_operator_of_the_table_has_a_case() -> None:
    sequences = {op for op in OPS if "Sequence" in op or "Optional" in op}
    assert set(OPS) - sequences - {"Swish"} == {node.op for node in NODES}


@pytest.mark.parametrize("op", ["Conv", "MatMul", "LayerNormalization", "LSTM", "GRU", "Resize", "AveragePool", "Pad"])
def test_gradients_are_those_of_differences(op: str) -> None:
    node = next(node for node in NODES if node.op == op)
    model = ir.serde.deserialize_model(node.proto())
    interpreter = Interpreter(model, {})
    given = {name: torch.from_numpy(array) for name, array in node.arrays.items()}
    [first, *rest] = model.graph.inputs
    fixed = {v: given[v.name or ""] for v in rest}
    fixed = {v: t.double() if t.is_floating_point() and op != "Resize" else t for v, t in fixed.items()}
    wanted = given[first.name or ""].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: interpreter.run({first: t, **fixed})[0], (wanted,))
    assert not interpreter.elsewhere


def test_optimisers_may_transpose_weights_that_stay_in_memory() -> None:
    """onnxruntime moves the two Transposes past Mul, and then its weight has another layout and the same name."""
    nodes = [
        helper.make_node("Conv", ["x", "c"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 3, 1]),
        helper.make_node("Mul", ["b", "w"], ["d"]),
        helper.make_node("Transpose", ["d"], ["e"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["e", "c"], ["y"]),
    ]
    sizes, value = [1, 32, 16, 32], x(1, 32, 16, 32, seed=2)
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes) for name in "xy")
    weights = [numpy_helper.from_array(x(1, 16, 32, 32), "w"), numpy_helper.from_array(x(32, 32, 1, 1, seed=1), "c")]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", [given], [made], weights),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    expected = by_onnxruntime(proto, {"x": value})
    for small in (False, True):
        session = open_model(ir.from_proto(proto), small=small)
        assert np.array_equal(session.run(None, {"x": value})[0], expected[0]), small


def parsed(text: str, *, opset: int = 17, more: str = "", **arrays: Any) -> onnx.ModelProto:
    """A model in onnx's own text form; ``arrays`` become initializers."""
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{more}]>\n{text}')
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    return model


IF = """g (bool c, float[2, 3] x) => (float[2, 4] z) {
    y = MatMul(x, w)
    z = If (c) <then_branch = t () => (float[2, 4] a) { a = Relu(y) }, else_branch = e () => (float[2, 4] b)
        { two = Constant<value = float {2.0}>() b = Mul(y, two) }>
}"""
LOOP = """g (int64 n, float[2, 3] x) => (float[2, 3] z, float[k, 2, 3] rows) {
    yes = Constant<value = bool {1}>()
    z, rows = Loop (n, yes, x) <body = b (int64 i, bool go, float[2, 3] s)
        => (bool on, float[2, 3] t, float[2, 3] row) {
        m = MatMul(s, w) u = Tanh(m) f = Cast<to = 1>(i) t = Add(u, f) row = Mul(t, x) on = Identity(go) }>
}"""
SCAN = """g (float[2, 3] h, float[4, 2, 3] x) => (float[2, 3] last, float[2, 4, 3] all) {
    last, all = Scan <num_scan_inputs = 1, scan_input_directions = [1], scan_output_axes = [1],
        body = b (float[2, 3] s, float[2, 3] e) => (float[2, 3] t, float[2, 3] o)
        { m = MatMul(s, w) n = Add(m, e) t = Tanh(n) o = Identity(t) }> (h, x)
}"""
FUNCTION = """g (float[2, 3] x) => (float[2, 3] z) { y = own.twice <by = 3.0> (x) z = own.twice (y) }
<opset_import: ["" : 17], domain: "own"> twice <by: float = 2.0> (a) => (c) {
    f = Constant <value_float: float = @by> () b = Mul(a, f) c = Add(b, a) }"""
BODIES = {
    "if": (IF, {"c": np.array(True), "x": x(2, 3)}, {"w": x(3, 4)}, ""),
    "else": (IF, {"c": np.array(False), "x": x(2, 3)}, {"w": x(3, 4)}, ""),
    "loop": (LOOP, {"n": np.array(3), "x": x(2, 3)}, {"w": x(3, 3)}, ""),
    "no turn": (LOOP, {"n": np.array(0), "x": x(2, 3)}, {"w": x(3, 3)}, ""),
    "scan": (SCAN, {"h": x(2, 3), "x": x(4, 2, 3)}, {"w": x(3, 3)}, ""),
    "function": (FUNCTION, {"x": x(2, 3)}, {}, ', "own" : 1'),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_and_functions_run_in_torch(name: str) -> None:
    text, arrays, weights, more = BODIES[name]
    proto = parsed(text, more=more, **weights)
    found, interpreter = interpreted(proto, arrays)
    assert not interpreter.elsewhere
    assert_same(found, by_onnxruntime(proto, arrays))


def test_values_in_bodies_are_seen_and_replaced() -> None:
    proto = parsed(LOOP, w=x(3, 3))
    model = ir.serde.deserialize_model(proto)
    loop = next(node for node in model.graph if node.op_type == "Loop")
    product = next(node for node in loop.attributes["body"].as_graph() if node.op_type == "MatMul")
    observers, seen = Observers(), list[Tensor]()
    [read] = [value for value in product.inputs[:1] if value is not None]
    observers.before[product].append((read, seen.append))
    observers.after[product.outputs[0]] = torch.zeros_like
    n, start = model.graph.inputs
    last, _ = Interpreter(model, {}).run({n: torch.tensor(2), start: torch.ones(2, 3)}, observers)
    assert [value.unique().tolist() for value in seen] == [[1.0], [0.0]]
    assert last.unique().tolist() == [1.0]


def test_the_products_of_a_recurrent_layer_are_seen_and_replaced() -> None:
    node = next(node for node in NODES if node.op == "LSTM" and node.said.get("direction") == "bidirectional")
    model = ir.serde.deserialize_model(node.proto())
    [lstm] = model.graph
    feeds = {value: torch.from_numpy(node.arrays[value.name or ""]) for value in model.graph.inputs}
    observers, seen, gates = Observers(), [], ir.Value(name="gates")

    def change(made: Tensor) -> Tensor:
        seen.append(made.shape)
        return torch.zeros_like(made)

    observers.after[gates] = change
    found = Interpreter(model, {lstm: gates}).run(feeds, observers)
    assert seen == [(4, 2, 40)]
    expected = by_onnxruntime(node.proto(), {**node.arrays, "x1": np.zeros_like(node.arrays["x1"])})
    assert_same(found, expected)


SEQUENCES = """g (float[2, 3] x) => (float[4, 3] z, int64 n) {
    s = SequenceConstruct(x, x) at = Constant<value = int64 {0}>() y = Relu(x) t = SequenceInsert(s, y, at)
    u = SequenceErase(t, at) z = ConcatFromSequence<axis = 0>(u) n = SequenceLength(t)
}"""


def test_sequences_are_lists() -> None:
    proto = parsed(SEQUENCES)
    found, interpreter = interpreted(proto, {"x": x(2, 3)})
    assert not interpreter.elsewhere
    assert_same(found, by_onnxruntime(proto, {"x": x(2, 3)}))


# -- observed -------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch's exporter to itself
@pytest.mark.parametrize("name", ["cnn-1d", "convnext", "attention", "recurrent", "called-twice", *["hf-vit"] * ALL])
def test_sensitivities_are_those_of_the_module(name: str, tmp_path: Path) -> None:
    module, inputs = graph(name, "module")
    program, _ = graph(name, "program")
    surgery.export_onnx(program, tmp_path / "m.onnx", inputs)
    model = surgery.load(tmp_path / "m.onnx")
    assert isinstance(inputs, tuple)
    assert observe(model, (inputs, {})).differentiable
    samples = read_calibration(inputs[0], module, (inputs, {}))
    ours, theirs = (with_sensitivity(m, samples, collect(m, samples)) for m in (model, module))
    assert ours.keys() == theirs.keys()
    for site in ours:
        assert ours[site].count == theirs[site].count
        assert relative_error(ours[site].second, theirs[site].second) <= tolerance(torch.float32, steps=64)
        found, wanted = ours[site].sensitivity, theirs[site].sensitivity
        assert found is not None
        assert wanted is not None
        assert relative_error(found, wanted) <= tolerance(torch.float32, steps=64)


def observed_of(proto: onnx.ModelProto, **arrays: Any) -> Observed:
    return observe(ir.serde.deserialize_model(proto), ((), {name: torch.from_numpy(a) for name, a in arrays.items()}))


def test_gradients_end_at_an_operator_that_torch_does_not_have() -> None:
    said = '<activation = "Relu">'
    text = f"g (float[2, 3] x) => (float[2, 4] z) {{ y = MatMul(x, w) z = com.microsoft.FusedGemm {said} (y, v) }}"
    fused = parsed(text, more=', "com.microsoft" : 1', w=x(3, 5), v=x(5, 4))
    assert not observed_of(fused, x=x(2, 3)).differentiable
    found, interpreter = interpreted(fused, {"x": x(2, 3)})
    assert [node.op_type for node in interpreter.elsewhere] == ["FusedGemm"]
    assert_same(found, by_onnxruntime(fused, {"x": x(2, 3)}))
    # what comes before all calls needs no gradient
    text = f"g (float[2, 3] x) => (float[2, 4] z) {{ y = com.microsoft.FusedGemm {said} (x, v) z = MatMul(y, w) }}"
    before = parsed(text, more=', "com.microsoft" : 1', w=x(5, 4), v=x(3, 5))
    assert observed_of(before, x=x(2, 3)).differentiable


def test_gradients_that_end_in_a_later_batch_give_way_to_noise() -> None:
    """The example takes a branch that torch runs; another batch takes one that only onnxruntime runs."""
    fused = 'com.microsoft.FusedGemm <activation = "Relu"> (y, v)'
    text = f"""g (float[2, 3] x) => (float[2, 5] z) {{
        y = MatMul(x, w) s = ReduceSum <keepdims = 0> (x) c = Greater(s, zero)
        z = If (c) <then_branch = a () => (float[2, 5] p) {{ p = Relu(y) }},
                    else_branch = b () => (float[2, 5] q) {{ q = {fused} }}> }}"""
    model = parsed(text, more=', "com.microsoft" : 1', w=x(3, 5), v=x(5, 5), zero=np.float32(0))
    held = ir.serde.deserialize_model(model)
    positive = torch.rand(2, 3) + 1
    assert observe(held, ((positive,), {})).differentiable
    samples = read_calibration([positive, -positive], held)
    [found] = with_sensitivity(held, samples, collect(held, samples)).values()
    assert found.sensitivity is not None
    assert found.sensitivity.shape == (1, 5)  # a diagonal, as noise gives it: the same for all outputs
    assert len(found.sensitivity.unique()) == 1


def test_quantized_activations_have_no_gradients() -> None:
    text = """g (float[2, 3] x) => (float[2, 5] z) {
        y = MatMul(x, w) q = QuantizeLinear(y, scale, zero) z = DequantizeLinear(q, scale, zero) }"""
    model = parsed(text, w=x(3, 5), scale=np.float32(0.02), zero=np.uint8(128))
    assert not observed_of(model, x=x(2, 3)).differentiable


def test_random_numbers_differ_and_their_graph_is_differentiable() -> None:
    text = """g (float[2, 3] x) => (float[2, 5] z) { n = RandomNormalLike(x) m = Add(x, n) z = MatMul(m, w) }"""
    observed = observed_of(parsed(text, w=x(3, 5)), x=x(2, 3))
    assert observed.differentiable
    inputs: Inputs = (torch.ones(2, 3),), {}
    assert not torch.equal(observed.run(inputs)[0], observed.run(inputs)[0])


RESIDUAL = """g (float[n, 4] x) => (float[n, 4] z) {
    a = MatMul(x, A) b = Add(a, p) c = Add(b, x) d = Relu(c) e = MatMul(d, B) f = Relu(e) z = Add(f, d) }"""


def test_what_is_added_to_an_output_is_followed() -> None:
    observed = observed_of(parsed(RESIDUAL, A=x(4, 4), B=x(4, 4, seed=1), p=x(4)), x=x(2, 4))
    calls = {placement.site.name: placement.calls[0] for placement in observed.find().placements}
    added: dict[str, Tensor] = {}
    spoiled: list[str] = []

    def follow(name: str, call: Call) -> None:
        observed.follow(call, lambda y: lambda r, is_site: added.update({name: r}), lambda: spoiled.append(name))

    for name, call in calls.items():
        follow(name, call)
    given = torch.from_numpy(x(2, 4, seed=5))
    observed.run(((given,), {}))
    assert list(added) == ["A"]
    assert torch.equal(added["A"], given)
    assert spoiled == ["B"]


def test_taps_and_watchers_are_those_of_one_run_and_are_forgotten() -> None:
    observed = observed_of(parsed(RESIDUAL, A=x(4, 4), B=x(4, 4, seed=1), p=x(4)), x=x(2, 4))
    calls = {placement.site.name: placement.calls[0] for placement in observed.find().placements}
    seen: list[Tensor] = []
    observed.watch(calls["B"], seen.append)
    observed.tap(calls["A"], torch.zeros_like)
    given: Inputs = (torch.ones(3, 4),), {}
    changed = observed.run(given)[0]
    assert torch.equal(seen[0], torch.ones(3, 4))  # the added input is what is left
    observed.forget()
    assert not torch.equal(observed.run(given)[0], changed)
    assert len(seen) == 1


NORMED = """g (float[n, 3, 8, 8] x) => (float[n, 6, 8, 8] z) {
    a = Conv <pads = [1, 1, 1, 1]> (x, w) b = BatchNormalization (a, s, t, m, v) c = Relu(b)
    d = Conv <pads = [1, 1, 1, 1]> (c, u) z = BatchNormalization (d, s2, t2, m2, v2) }"""
IMAGES = torch.nn.functional.avg_pool2d(
    torch.randn(40, 3, 11, 11, generator=torch.Generator().manual_seed(0)), 4, stride=1, padding=0
)


def normed() -> tuple[onnx.ModelProto, nn.Module]:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
    ]
    module = nn.Sequential(*layers)
    for _ in range(4):
        module(2 * IMAGES + 1)
    arrays = [t.detach().numpy().copy() for t in module.state_dict().values() if t.is_floating_point()]
    names = ["w", "s", "t", "m", "v", "u", "s2", "t2", "m2", "v2"]
    return parsed(NORMED, **dict(zip(names, arrays, strict=True))), module.eval()


def statistics(model: Any) -> dict[str, Tensor]:
    tensors = kind_of(model).tensors(model)
    return {name: torch.as_tensor(tensors[name]).clone() for name in ("m", "v", "m2", "v2")}


@pytest.mark.parametrize("read", [ir.serde.deserialize_model, lambda proto: proto], ids=["ir", "proto"])
def test_batch_norms_are_corrected_as_those_of_a_module(read: Callable[[onnx.ModelProto], Any]) -> None:
    proto, module = normed()
    model = read(proto)
    before = statistics(model)
    samples = read_calibration(IMAGES, module, ((IMAGES[:2],), {}))
    reestimate_batch_norm(model, samples)
    reestimate_batch_norm(module, samples)
    wanted = dict(
        zip(before, (t for m in (module[1], module[4]) for t in (m.running_mean, m.running_var)), strict=True)
    )
    for name, found in statistics(model).items():
        assert relative_error(found, wanted[name]) <= tolerance(torch.float32, steps=64)
        assert relative_error(found, before[name]) > 0.01


def test_a_fit_corrects_the_batch_norms_of_the_result_alone() -> None:
    proto, module = normed()
    model = ir.serde.deserialize_model(proto)
    before = statistics(model)
    made = surgery.decompose(model, IMAGES[:2], ranks={"w": 4, "u": 4}, calibration=IMAGES)
    same = surgery.decompose(module, IMAGES[:2], ranks={"0": 4, "3": 4}, calibration=IMAGES).model
    assert all(torch.equal(found, before[name]) for name, found in statistics(model).items())
    found = statistics(made.model)
    assert relative_error(found["m2"], before["m2"]) > 0.01
    assert relative_error(found["m2"], same[4].running_mean) <= 1e-3
    found = run_model(made.model, ((IMAGES,), {}))[0]
    wanted = module(IMAGES).detach()
    assert relative_error(found, wanted) == pytest.approx(relative_error(same(IMAGES).detach(), wanted), rel=1e-3)


def test_statistics_that_two_batch_norms_share_stay() -> None:
    text = """g (float[2, 3, 4] x) => (float[2, 3, 4] z) {
        a = Conv (x, w) b = BatchNormalization (a, s, t, m, v) z = BatchNormalization (b, s, t, m, v) }"""
    model = parsed(text, w=x(3, 3, 1), s=x(3), t=x(3), m=x(3), v=positive(3))
    assert not observed_of(model, x=x(2, 3, 4)).norms()


def test_a_graph_that_torch_gets_wrong_runs_by_onnxruntime() -> None:
    proto, other = (parsed(RESIDUAL, A=x(4, 4, seed=seed), B=x(4, 4, seed=1), p=x(4)) for seed in (0, 2))
    model = ir.serde.deserialize_model(proto)
    [read] = model.graph.inputs
    products = [node.outputs[0] for node in model.graph if node.op_type == "MatMul"]
    right, wrong = (
        check(Reader(model), model, partial(open_session, p.SerializeToString()), {read: torch.ones(2, 4)}, products)
        for p in (proto, other)
    )
    assert (right.differentiable, wrong.differentiable) == (True, False)
    found = wrong.interpreter.run({read: torch.ones(2, 4)})
    assert len(wrong.interpreter.elsewhere) == 7
    assert_same(found, by_onnxruntime(proto, {"x": np.ones((2, 4), np.float32)}))


@pytest.mark.parametrize(
    ("other", "same"),
    [
        (torch.ones(2, 3), True),
        (torch.ones(3, 2), False),
        (torch.ones(2, 3, dtype=torch.float64), False),
        (torch.full((2, 3), 1.001), False),
        (torch.tensor([[1, 1, 1], [1, 1, float("nan")]]), False),
    ],
)
def test_outputs_agree_to_rounding(other: Tensor, same: bool) -> None:
    assert agree([other], [torch.ones(2, 3)]) is same
    assert agree([[other]], [[torch.ones(2, 3)]]) is same
