"""Sites and skips: what was found in a graph, as values that know no graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator, Shape
from surgery.errors import CheckError, InputError
from surgery.sites.epilogue import Loop, Neighbour

__all__ = ["FactoredSite", "Site", "Skip", "Totals", "select"]


@dataclass(frozen=True, eq=False)
class Site:
    """One place in one graph where an operator stands.

    ``name`` is the dotted path of its weight without ``.weight``; ``aliases`` are the other names of a tied weight.
    ``input_shapes`` has the shape of the activations of each call, the batch included. ``behind`` is what stands behind
    each call, as far as a runtime makes one with it, or the loop of a recurrent layer around it. ``surplus`` counts the
    parameters that a computed weight is computed from, over the numbers that it has.
    """

    name: str
    operator: Operator
    input_shapes: tuple[Shape, ...]
    aliases: tuple[str, ...] = ()
    behind: tuple[Neighbour, ...] = ()
    surplus: int = field(default=0, kw_only=True)

    @property
    def input_shape(self) -> Shape:
        """The input shape of the first call."""
        return self.input_shapes[0]

    @property
    def calls(self) -> int:
        """How often the operator is called in one run."""
        return len(self.input_shapes)

    @property
    def runs(self) -> int:
        """How often it runs in one run of the model: for all steps of a loop, of which a call has all at once."""
        loops = [step for step in self.behind if isinstance(step, Loop)]
        return sum(loops[0].steps(shape) for shape in self.input_shapes) if loops else self.calls

    @property
    def members(self) -> tuple[Site, ...]:
        """The sites that are decided on together: itself alone, unless it is a joint one."""
        return (self,)

    def placed(self, step: Operator | Chain) -> Operator | Chain:
        """Return the operator or its chain with what stands behind it, for timing."""
        steps = step.steps if isinstance(step, Chain) else (step,)
        return Chain((*steps, *self.behind)) if self.behind else step

    @property
    def description(self) -> str:
        """The operator in words."""
        return self.operator.description

    @property
    def parameters(self) -> int:
        """Number of parameters, counted once however often it is called."""
        return self.operator.parameters + self.surplus

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls in one run."""
        return sum(self.operator.macs(shape) for shape in self.input_shapes)


@dataclass(frozen=True, eq=False)
class FactoredSite(Site):
    """A chain that a factorization has made at known ranks: a site that may be cut to lower ranks.

    ``operator`` is the one that it stands for, without numbers: its weight is on the meta device.
    """

    chain: Chain = field(kw_only=True)

    @property
    def made_by(self) -> tuple[str, tuple[int, ...]]:
        """The factorization and its ranks."""
        if self.chain.origin is None:
            raise CheckError(f"nothing says what made the chain of {self.name}")
        return self.chain.origin

    @property
    def description(self) -> str:
        """The operator in words, and what it has become."""
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
    """Costs of a whole model: all parameters, and the multiply-accumulates of one run with weights, sites or not."""

    parameters: int
    macs: int


def select(names: Sequence[str], include: Sequence[str], exclude: Sequence[str]) -> dict[str, str | None]:
    """Map each name to None if the glob patterns choose it, else to the reason why they do not.

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
