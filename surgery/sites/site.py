"""Sites, what a runtime computes in one kernel with each, and edits: values.

Runtimes fold batch norms into an operator, fuse activations with it, and run recurrent loops as single kernels. So the
latency of an operator or a chain is always measured with its epilogue. Epilogues are timed; they are never written into
a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from surgery.algebra import Chain, Link, Operator, Shape
from surgery.errors import CheckError, InputError

__all__ = ["Activation", "BatchNorm", "Epilogue", "FactoredSite", "Loop", "Site", "Skip", "Totals", "select"]


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


@dataclass(frozen=True, eq=False, repr=False)
class Site:
    """One place in one graph where an operator stands.

    ``name`` is the dotted path of its weight without ``.weight``; ``aliases`` are the other names of a tied weight.
    ``input_shapes`` has the shape of the input of each call, the batch included. ``epilogue`` is what a runtime
    computes in one kernel with each call: the batch norm and the activation after it, or the loop of a recurrent layer
    around it. ``surplus`` is for a weight that is computed from parameters: the number of their entries, less that of
    the weight's.
    """

    name: str
    operator: Operator
    input_shapes: tuple[Shape, ...]
    aliases: tuple[str, ...] = ()
    epilogue: tuple[Epilogue, ...] = ()
    surplus: int = field(default=0, kw_only=True)

    def __repr__(self) -> str:
        """Say what the site is, without the numbers of its weight."""
        shapes = ", ".join("x".join(map(str, shape)) for shape in self.input_shapes)
        return f"{type(self).__name__}({self.name!r}, {self.description}, inputs {shapes})"

    @property
    def input_shape(self) -> Shape:
        """The input shape of the first call."""
        return self.input_shapes[0]

    @property
    def calls(self) -> int:
        """Number of calls of the operator in the graph."""
        return len(self.input_shapes)

    @property
    def runs(self) -> int:
        """Number of times the operator runs in one run of the model: in a loop, once for each step."""
        loops = [step for step in self.epilogue if isinstance(step, Loop)]
        return sum(loops[0].steps(shape) for shape in self.input_shapes) if loops else self.calls

    @property
    def members(self) -> tuple[Site, ...]:
        """The sites that get one decision together: this site alone, unless it is a joint site."""
        return (self,)

    def placed(self, step: Operator | Chain) -> Operator | Chain:
        """Return the operator or its chain followed by the epilogue, for timing."""
        steps = step.steps if isinstance(step, Chain) else (step,)
        return Chain((*steps, *self.epilogue)) if self.epilogue else step

    @property
    def description(self) -> str:
        """The operator in words."""
        return self.operator.description

    @property
    def parameters(self) -> int:
        """Number of parameters; several calls count once."""
        return self.operator.parameters + self.surplus

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls in one run."""
        return sum(self.operator.macs(shape) for shape in self.input_shapes)


@dataclass(frozen=True, eq=False, repr=False)
class FactoredSite(Site):
    """A site where a chain of known factorization and ranks already stands; the chain may be cut to lower ranks.

    ``operator`` is the operator that the chain stands for. Its weight is on the meta device, without numbers.
    """

    chain: Chain = field(kw_only=True)

    @property
    def made_by(self) -> tuple[str, tuple[int, ...]]:
        """The name of the factorization and its ranks. Raises CheckError if the chain has no origin."""
        if self.chain.origin is None:
            raise CheckError(f"nothing says what made the chain of {self.name}")
        return self.chain.origin

    @property
    def description(self) -> str:
        """The operator in words, with its factorization and ranks."""
        method, ranks = self.made_by
        return f"{self.operator.description} as {method} {','.join(map(str, ranks))}"

    @property
    def parameters(self) -> int:
        """Number of parameters of the chain."""
        return self.chain.parameters

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls of the chain in one run."""
        return sum(self.chain.macs(shape) for shape in self.input_shapes)


@dataclass(frozen=True)
class Skip:
    """A place that was considered and left alone; ``parameters`` and ``macs`` are 0 where they are not known."""

    name: str
    operator: str
    reason: str
    parameters: int = 0
    macs: int = 0


@dataclass(frozen=True)
class Totals:
    """Costs of a whole model: all parameters, and the MACs of all products with weights in one run, sites or not."""

    parameters: int
    macs: int


def select(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> dict[str, str | None]:
    """Map each name to None if the glob patterns select it, else to the reason why they do not.

    Raises:
        InputError: a pattern that matches no name.
    """
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"no site matches {pattern!r}", allowed=", ".join(names) or "none: there are no sites")
    reasons: dict[str, str | None] = {}
    for name in names:
        if include and not any(fnmatchcase(name, pattern) for pattern in include):
            reasons[name] = "not included"
        elif any(fnmatchcase(name, pattern) for pattern in exclude):
            reasons[name] = "excluded"
        else:
            reasons[name] = None
    return reasons
