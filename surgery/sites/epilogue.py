"""What runs as one with an operator: runtimes fold batch norms into it, fuse activations, and have loops as kernels.

A latency is that of an operator, or of its chain, with these behind it. They are steps that are timed, never spliced.
"""

from __future__ import annotations

from dataclasses import dataclass

from surgery.algebra.operators import Shape
from surgery.algebra.steps import Link

__all__ = ["Activation", "BatchNorm", "Loop", "Neighbour"]


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


@dataclass(frozen=True)
class Loop(Neighbour):
    """The loop of a recurrent layer, in each of whose steps the operator maps the hidden state to the gates.

    ``mode`` is that of torch's modules: LSTM, GRU, RNN_TANH or RNN_RELU. The input shape has all steps at once:
    (T, N, H), or (N, T, H) where ``batch_first``, or (T, H).
    """

    mode: str
    batch_first: bool

    @property
    def gates(self) -> int:
        """How many numbers the operator gives for each one of the state."""
        return {"LSTM": 4, "GRU": 3}.get(self.mode, 1)

    def steps(self, shape: Shape) -> int:
        """Return how often the operator runs for an input of this shape."""
        return shape[1] if self.batch_first and len(shape) == 3 else shape[0]

    def out_shape(self, shape: Shape) -> Shape:
        """Return the shape of the hidden states, for that of the gates."""
        return (*shape[:-1], shape[-1] // self.gates)
