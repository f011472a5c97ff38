"""What stands behind an operator and runs as a part of it: runtimes fold batch norms into it, and fuse activations.

A latency is that of an operator, or of its chain, with these behind it. They are steps that are timed, never spliced.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.operators import Shape
from surgery.steps import Link

__all__ = ["Activation", "BatchNorm", "Neighbour"]


@dataclass(frozen=True)
class Neighbour(Link):
    """Base of the steps behind an operator; they change no shape."""

    def out_shape(self, shape: Shape) -> Shape:
        """Return the same shape."""
        return shape


@dataclass(frozen=True)
class BatchNorm(Neighbour):
    """A batch norm in evaluation mode, over axis 1."""


@dataclass(frozen=True)
class Activation(Neighbour):
    """An activation by the name of its ONNX operator: Relu, Sigmoid or Tanh, or Clip, which is ReLU6."""

    kind: str
