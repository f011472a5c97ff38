"""An ONNX graph that grows node by node."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor

__all__ = ["OnnxGraph", "numbers"]


@dataclass
class OnnxGraph:
    """The nodes and constants so far, and the value that the next node reads; ``prefix`` starts all new names."""

    value: str = "input"
    prefix: str = ""
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, array: np.ndarray) -> str:
        """Return the name of a new constant."""
        name = f"{self.prefix}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def apply(
        self,
        op_type: str,
        constants: Iterable[np.ndarray | None] = (),
        others: Sequence[str] = (),
        **attributes: Any,
    ) -> None:
        """Append a node on the current value, other values and constants (None is left out); its output is current."""
        names = [*others, *(self.constant(array) for array in constants if array is not None)]
        output = f"{self.prefix}value_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, [self.value, *names], [output], **attributes))
        self.value = output

    def add(self, op_type: str, *inputs: str, outputs: int = 1, **attributes: Any) -> list[str]:
        """Append a node on values by name, and return the names of its outputs; the current value stays the same."""
        names = [f"{self.prefix}{op_type}_{len(self.nodes)}_{at}" for at in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, **attributes))
        return names


def numbers(tensor: Tensor | None) -> np.ndarray | None:
    """Return float32 numbers; for the meta device random ones, scaled so that activations keep their size."""
    if tensor is None:
        return None
    if not tensor.is_meta:
        return tensor.detach().to("cpu", torch.float32).numpy()
    scale = math.prod(tensor.shape[1:]) ** -0.5
    return np.random.default_rng(0).standard_normal(tuple(tensor.shape), dtype=np.float32) * np.float32(scale)
