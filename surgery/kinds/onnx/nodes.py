"""Write operators and reshapes as ONNX nodes, one after another.

- A convolution is Conv or ConvTranspose.
- A linear layer is Gemm on (rows, features), or MatMul, then Add, on any number of axes.
- An embedding is Gather. Reshapes are Reshape, Unsqueeze, Squeeze and Transpose; shifts and sums are Add.

All nodes have the same meaning in opset 7 and in those after it; Unsqueeze and Squeeze read their axes since opset 13.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from torch import Tensor

from surgery.algebra import Conv, Embedding, Linear, Shift

__all__ = [
    "NodeWriter",
    "pads_of",
    "write_conv",
    "write_embedding",
    "write_linear",
    "write_ones",
    "write_reshape",
    "write_shift",
    "write_transpose",
]

_AXES_AS_INPUT = 13  # the first opset in which Unsqueeze and Squeeze read their axes


@dataclass
class NodeWriter:
    """The nodes and constants so far, and the value that the next node reads; ``prefix`` starts all new names."""

    value: str = "input"
    prefix: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, array: npt.NDArray[Any]) -> str:
        """Return the name of a new constant."""
        name = f"{self.prefix}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weight(self, tensor: Tensor, *, turned: bool = False) -> str:
        """Return the name of the value with the numbers of an operator's tensor; ``turned`` is its transpose."""
        array = tensor.detach().cpu().numpy()
        return self.constant(array.T if turned else array)

    def apply(self, op_type: str, *inputs: str, **attributes: Any) -> None:
        """Append a node on the current value and other values by name; its output is current."""
        output = f"{self.prefix}value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, [self.value, *inputs], [output], **attributes))
        self.value = output

    def add(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Append a node on values by name, and return the names of its outputs; the current value stays the same."""
        names = [f"{self.prefix}{op_type}_{len(self.nodes)}_{at}" for at in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, **attributes))
        return names


def _bias(graph: NodeWriter, bias: Tensor | None) -> list[str]:
    return [] if bias is None else [graph.weight(bias)]


def write_linear(graph: NodeWriter, operator: Linear, *, gemm: bool, turned: bool = False) -> None:
    """Append a linear layer: as Gemm, whose input has two axes, or as MatMul and Add.

    MatMul reads the transpose of the weight. Gemm may read either, and reads the transpose if ``turned``.
    """
    if gemm:
        weight = graph.weight(operator.weight, turned=turned)
        graph.apply("Gemm", weight, *_bias(graph, operator.bias), **({} if turned else {"transB": 1}))
        return
    graph.apply("MatMul", graph.weight(operator.weight, turned=True))
    if operator.bias is not None:
        graph.apply("Add", graph.weight(operator.bias))


def write_embedding(graph: NodeWriter, operator: Embedding) -> None:
    """Append an embedding."""
    [graph.value] = graph.add("Gather", graph.weight(operator.weight), graph.value)


def write_conv(
    graph: NodeWriter, operator: Conv, *, padding: tuple[tuple[int, int], ...] | None = None, **attributes: Any
) -> None:
    """Append a convolution that pads with zeros; ``padding`` is that of the geometry unless it is given."""
    geometry = operator.geometry
    padding = geometry.padding if padding is None else padding
    if geometry.transposed and any(geometry.output_padding):
        attributes["output_padding"] = list(geometry.output_padding)
    graph.apply(
        "ConvTranspose" if geometry.transposed else "Conv",
        graph.weight(operator.weight),
        *_bias(graph, operator.bias),
        kernel_shape=list(operator.kernel_size),
        strides=list(geometry.stride),
        dilations=list(geometry.dilation),
        pads=pads_of(padding),
        group=operator.groups,
        **attributes,
    )


def pads_of(padding: Sequence[tuple[int, int]]) -> list[int]:
    """Return ONNX's ``pads``: those before each axis, then those after each.

    >>> pads_of([(1, 2), (3, 4)])
    [1, 3, 2, 4]
    """
    return [pair[side] for side in (0, 1) for pair in padding]


def write_reshape(graph: NodeWriter, sizes: Sequence[int]) -> None:
    """Append a reshape; a size of 0 is that of the same axis of the input, and one size may be -1."""
    graph.apply("Reshape", graph.constant(np.array(sizes, dtype=np.int64)))


def write_ones(graph: NodeWriter, op_type: str, axes: Sequence[int], opset: int) -> None:
    """Append Unsqueeze, which adds axes of size 1, or Squeeze, which removes them."""
    if opset < _AXES_AS_INPUT:
        graph.apply(op_type, axes=list(axes))
    else:
        graph.apply(op_type, graph.constant(np.array(axes, dtype=np.int64)))


def write_transpose(graph: NodeWriter, axes: int, first: int, second: int) -> None:
    """Append the exchange of two axes, both negative, of a value of ``axes`` axes."""
    order = list(range(axes))
    order[first], order[second] = order[second], order[first]
    graph.apply("Transpose", perm=order)


def write_shift(graph: NodeWriter, step: Shift) -> None:
    """Append the addition of a bias to the last axis."""
    graph.apply("Add", graph.weight(step.bias))
