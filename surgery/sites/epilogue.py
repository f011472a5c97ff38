"""Epilogues: what a runtime computes in one kernel with an operator.

Runtimes fold batch norms into an operator, fuse activations with it, and run recurrent loops as single kernels. So the
latency of an operator or a chain is always measured with its epilogue. Epilogues are timed; they are never written into
a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.algebra.operators import Shape
from surgery.algebra.steps import Link

__all__ = ["Activation", "BatchNorm", "Loop", "Epilogue"]


@dataclass(frozen=True)
class Epilogue(Link):
    """Base of the steps that follow an operator; they keep the shape unless they say otherwise."""

    def out_shape(self, shape: Shape) -> Shape:
        """Return the input shape unchanged."""
        return shape


@dataclass(frozen=True)
class BatchNorm(Epilogue):
    """A batch norm in evaluation mode, over axis 1."""


@dataclass(frozen=True)
class Activation(Epilogue):
    """An activation, by the name of its ONNX operator: Relu, Sigmoid, Tanh, or Clip (which stands for ReLU6)."""

    kind: str


@dataclass(frozen=True)
class Loop(Epilogue):
    """The loop of a recurrent layer: in each step, the operator maps the hidden state to the gates.

    ``mode`` is the mode of torch's module: LSTM, GRU, RNN_TANH or RNN_RELU. The input shape covers all T steps:
    (T, N, H), or (N, T, H) where ``batch_first``, or (T, H).
    """

    mode: str
    batch_first: bool

    @property
    def gates(self) -> int:
        """Number of gates: the operator has this many outputs for each feature of the hidden state."""
        return {"LSTM": 4, "GRU": 3}.get(self.mode, 1)

    def steps(self, shape: Shape) -> int:
        """Return the number of steps for an input of this shape; each step runs the operator once."""
        return shape[1] if self.batch_first and len(shape) == 3 else shape[0]

    def out_shape(self, shape: Shape) -> Shape:
        """Return the shape of the hidden states for the shape of the gates."""
        return (*shape[:-1], shape[-1] // self.gates)
