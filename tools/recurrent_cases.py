"""Recurrent layers with dense and with factored weights, for `bench_recurrent.py`: as torch modules and as ONNX models.

A step of an LSTM or a GRU is ``gates = W x + R h + b`` with W (G H, I), R (G H, H), G = 4 or 3, in torch's order of
the gates. Either matrix may be a product of two: ``W = U V`` with V (r, I). Each form comes as the runtime's own kernel
(a V stands before it, as one product for all steps; R must be dense) and as a loop over the steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

__all__ = ["Kernel", "Layer", "Loop", "Weights", "composed", "onnx_kernel", "onnx_loop", "random_weights"]


@dataclass(frozen=True)
class Layer:
    """A kind, its sizes, and the sizes of its input."""

    kind: str
    inputs: int
    hidden: int
    steps: int = 64
    batch: int = 8

    @property
    def gates(self) -> int:
        """Number of gates."""
        return 4 if self.kind == "LSTM" else 3

    def __str__(self) -> str:
        return f"{self.kind} {self.inputs} -> {self.hidden}, {self.steps} steps, batch {self.batch}"


@dataclass(frozen=True, eq=False)
class Weights:
    """Products for W and R, to be applied in order (one or two matrices each), and the two biases (G H)."""

    input: tuple[Tensor, ...]
    recurrent: tuple[Tensor, ...]
    input_bias: Tensor
    recurrent_bias: Tensor


def random_weights(layer: Layer, rank: int | None, recurrent_rank: int | None) -> Weights:
    """Return weights scaled so that activations keep their size; None is dense."""
    generator = torch.Generator().manual_seed(0)

    def matrices(columns: int, rank: int | None) -> tuple[Tensor, ...]:
        sizes = (columns, layer.gates * layer.hidden) if rank is None else (columns, rank, layer.gates * layer.hidden)
        pairs = pairwise(sizes)
        return tuple(torch.randn(after, before, generator=generator) * before**-0.5 for before, after in pairs)

    biases = torch.randn(2, layer.gates * layer.hidden, generator=generator) / 4
    return Weights(matrices(layer.inputs, rank), matrices(layer.hidden, recurrent_rank), *biases)


def composed(weights: Weights) -> Weights:
    """Return the same weights as dense matrices."""
    dense = [torch.linalg.multi_dot(m[::-1]) if len(m) > 1 else m[0] for m in (weights.input, weights.recurrent)]
    return replace(weights, input=(dense[0],), recurrent=(dense[1],))


class Kernel(nn.Module):
    """Torch's own LSTM or GRU, behind a linear layer where W has two factors."""

    def __init__(self, layer: Layer, weights: Weights) -> None:
        super().__init__()
        *first, last = weights.input
        self.first = nn.ParameterList(first)
        self.kernel = getattr(nn, layer.kind)(last.shape[1], layer.hidden)
        [recurrent] = weights.recurrent
        state = {"weight_ih_l0": last, "weight_hh_l0": recurrent}
        self.kernel.load_state_dict(state | {"bias_ih_l0": weights.input_bias, "bias_hh_l0": weights.recurrent_bias})

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden states (steps, batch, H) of inputs (steps, batch, I)."""
        for matrix in self.first:
            x = nn.functional.linear(x, matrix)
        out: Tensor = self.kernel(x)[0]
        return out


class Loop(nn.Module):
    """The loop over the steps, with one or two matrices for each product."""

    def __init__(self, layer: Layer, weights: Weights) -> None:
        super().__init__()
        self.hidden, self.step = layer.hidden, _lstm_step if layer.kind == "LSTM" else _gru_step
        self.input, self.recurrent = nn.ParameterList(weights.input), nn.ParameterList(weights.recurrent)
        self.input_bias, self.recurrent_bias = weights.input_bias, weights.recurrent_bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the hidden states (steps, batch, H) of inputs (steps, batch, I)."""
        h = c = x.new_zeros(x.shape[1], self.hidden)
        states = []
        for part in self._product(x, self.input, self.input_bias):
            h, c = self.step(part, self._product(h, self.recurrent, self.recurrent_bias), h, c)
            states.append(h)
        return torch.stack(states)

    @staticmethod
    def _product(x: Tensor, matrices: nn.ParameterList, bias: Tensor) -> Tensor:
        *first, last = matrices
        for matrix in first:
            x = nn.functional.linear(x, matrix)
        return nn.functional.linear(x, last, bias)


def _lstm_step(part: Tensor, recurrent: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (part + recurrent).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_step(part: Tensor, recurrent: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (r, z, n), (rr, zz, nn_) = part.chunk(3, -1), recurrent.chunk(3, -1)
    r, z = (r + rr).sigmoid(), (z + zz).sigmoid()
    n = (n + r * nn_).tanh()
    return n + z * (h - n), c


class Onnx:
    """An ONNX graph built node by node; "x" is (steps, batch, I), and ``prefix`` keeps its names apart from others'."""

    def __init__(self, layer: Layer, prefix: str = "") -> None:
        self.layer, self.prefix = layer, prefix
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, tensor: Tensor | np.ndarray) -> str:
        """Return the name of a new constant."""
        self.constants.append(
            numpy_helper.from_array(np.ascontiguousarray(tensor), f"{self.prefix}constant_{len(self.constants)}")
        )
        return str(self.constants[-1].name)

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Append a node and return the name of its output, or names."""
        names = [f"{self.prefix}{kind}_{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def product(self, value: str, matrices: tuple[Tensor, ...], bias: Tensor | None = None) -> str:
        """Append a product for each matrix, and the bias."""
        for matrix in matrices:
            value = self.add("MatMul", value, self.constant(matrix.T))
        return value if bias is None else self.add("Add", value, self.constant(bias))

    def model(self, output: str) -> bytes:
        """Return the serialised model whose output is this value."""
        self.nodes.append(helper.make_node("Identity", [output], ["y"]))
        layer = self.layer
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [layer.steps, layer.batch, size])
            for name, size in (("x", layer.inputs), ("y", layer.hidden))
        ]
        graph = helper.make_graph(self.nodes, "recurrent", ends[:1], ends[1:], self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return bytes(made.SerializeToString())


def onnx_kernel(layer: Layer, weights: Weights) -> bytes:
    """Return onnxruntime's own LSTM or GRU node, behind a product where W has two factors."""
    graph, order = Onnx(layer), {"LSTM": [0, 3, 1, 2], "GRU": [1, 0, 2]}[layer.kind]  # ONNX: iofc and zrh

    def ordered(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.chunk(layer.gates)[gate] for gate in order])[None]

    *first, last = weights.input
    [recurrent] = weights.recurrent
    x = graph.product("x", tuple(first))
    biases = torch.cat([ordered(weights.input_bias), ordered(weights.recurrent_bias)], 1)
    names = [graph.constant(tensor) for tensor in (ordered(last), ordered(recurrent), biases)]
    kept = {"linear_before_reset": 1} if layer.kind == "GRU" else {}
    y = graph.add(layer.kind, x, *names, hidden_size=layer.hidden, **kept)
    return graph.model(graph.add("Squeeze", y, graph.constant(np.array([1]))))


def onnx_loop(layer: Layer, weights: Weights) -> bytes:
    """Return the same with a Scan over the steps, whose body has the products with R and the gates."""
    graph, body = Onnx(layer), Onnx(layer, "step_")
    parts = graph.product("x", weights.input, weights.input_bias)
    recurrent = body.product("h", weights.recurrent, weights.recurrent_bias)
    h, c = (_onnx_lstm if layer.kind == "LSTM" else _onnx_gru)(body, recurrent)
    for value, name in ((h, "h_next"), (c, "c_next"), (h, "state")):
        body.nodes.append(helper.make_node("Identity", [value], [name]))
    widths = {"h": 1, "c": 1, "part": layer.gates, "h_next": 1, "c_next": 1, "state": 1}
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [layer.batch, n * layer.hidden])
        for name, n in widths.items()
    ]
    inner = helper.make_graph(body.nodes, "step", ends[:3], ends[3:], body.constants)
    zeros = graph.constant(np.zeros((layer.batch, layer.hidden), np.float32))
    *_, states = graph.add("Scan", zeros, zeros, parts, outputs=3, body=inner, num_scan_inputs=1)
    return graph.model(states)


def _onnx_lstm(body: Onnx, recurrent: str) -> tuple[str, str]:
    gates = body.add("Split", body.add("Add", "part", recurrent), outputs=4, axis=-1, num_outputs=4)
    i, f, o = (body.add("Sigmoid", gates[k]) for k in (0, 1, 3))
    c = body.add("Add", body.add("Mul", f, "c"), body.add("Mul", i, body.add("Tanh", gates[2])))
    return body.add("Mul", o, body.add("Tanh", c)), c


def _onnx_gru(body: Onnx, recurrent: str) -> tuple[str, str]:
    parts = body.add("Split", "part", outputs=3, axis=-1, num_outputs=3)
    others = body.add("Split", recurrent, outputs=3, axis=-1, num_outputs=3)
    r, z = (body.add("Sigmoid", body.add("Add", parts[k], others[k])) for k in (0, 1))
    n = body.add("Tanh", body.add("Add", parts[2], body.add("Mul", r, others[2])))
    return body.add("Add", n, body.add("Mul", z, body.add("Sub", "h", n))), "c"
