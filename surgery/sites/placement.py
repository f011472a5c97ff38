"""Placements: where sites and fusable chains stand in a flow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.algebra.steps import Branches
from surgery.errors import CheckError, Refusal
from surgery.sites.flow import Call, ModuleChain, Reshape
from surgery.sites.site import Site, Skip, Totals

__all__ = ["BranchSum", "Found", "FusableChain", "FusableModule", "Fusable", "Part", "Placement", "calls_of"]


@dataclass(frozen=True, eq=False)
class BranchSum:
    """A sum of branches: rows of calls that all read one value, added up.

    ``additions`` are the values of the additions, in order.
    """

    rows: tuple[tuple[Call, ...], ...]
    additions: tuple[int, ...]

    @property
    def value(self) -> int:
        """The value of the last addition."""
        return self.additions[-1]

    @property
    def source(self) -> int:
        """The value that all rows read."""
        return self.rows[0][0].source

    @property
    def values(self) -> tuple[int, ...]:
        """All values of the sum; each comes after the values that it is computed from."""
        return (*(call.value for call in self.calls), *self.additions)

    @property
    def calls(self) -> tuple[Call, ...]:
        """All calls, row by row."""
        return tuple(call for row in self.rows for call in row)

    @property
    def step(self) -> Branches:
        """The sum as a step of a chain."""
        return Branches(tuple(tuple(call.operator for call in row) for row in self.rows))

    @property
    def bias(self) -> str | None:
        """The name of the last call's bias."""
        return self.rows[-1][-1].bias

    @property
    def path(self) -> str | None:
        """The path of the module that adds up the branches, if the calls are modules in its rows."""
        last = self.rows[-1][-1].path
        return None if last is None else last.rpartition(".")[0].rpartition(".")[0]


Part: TypeAlias = Call | Reshape | BranchSum


def calls_of(parts: Sequence[Part]) -> list[Call]:
    """Return the calls of all parts, in order."""
    return [call for part in parts for call in part.calls]


@dataclass(frozen=True, eq=False)
class FusableChain:
    """Rows of parts over the same weights; each row is provably one operator.

    ``operators`` has the operator that each row composes to; they have one weight, and a bias each. ``sites`` are the
    names for this operator, one for each name of a tied weight.
    """

    sites: tuple[str, ...]
    rows: tuple[tuple[Part, ...], ...]
    operators: tuple[Operator, ...]

    @property
    def calls(self) -> tuple[tuple[Call, ...], ...]:
        """The calls of each row."""
        return tuple(tuple(calls_of(row)) for row in self.rows)

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights."""
        return tuple(call.weight for call in self.calls[0])

    @property
    def parameters(self) -> int:
        """Number of parameters of the chain."""
        return sum(call.operator.parameters for call in self.calls[0])


@dataclass(frozen=True, eq=False)
class FusableModule:
    """A chain that stands in the model as a module, or as several modules with the same weights."""

    chain: ModuleChain

    @property
    def sites(self) -> tuple[str, ...]:
        """The paths of the modules."""
        return self.chain.names

    @property
    def weights(self) -> tuple[str, ...]:
        """The names of the weights."""
        return self.chain.weights

    @property
    def parameters(self) -> int:
        """Number of parameters of the chain."""
        return self.chain.chains[0].parameters

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """The operator that each module composes to. Raises CheckError if a chain does not compose."""
        return tuple(map(_composed, self.chain.chains))


Fusable: TypeAlias = FusableChain | FusableModule


def _composed(chain: Chain) -> Operator:
    operator = chain.compose()
    if isinstance(operator, Refusal):
        raise CheckError(f"the factors of a layer are not one operator: {operator.reason}")
    return operator


@dataclass(frozen=True, eq=False)
class Placement:
    """A site with its calls in a flow. A site that is factored already has no calls, but a ``chain``."""

    site: Site
    calls: tuple[Call, ...]
    chain: Fusable | None = None

    @property
    def first(self) -> int:
        """The first value in the graph that is computed with the site's weight."""
        if isinstance(self.chain, FusableModule):
            return min(self.chain.chain.calls)
        return self.chain.calls[0][0].value if self.chain is not None else self.calls[0].value


@dataclass(frozen=True, eq=False)
class Found:
    """All sites of a model with their calls, the skips, and the totals."""

    placements: tuple[Placement, ...]
    skips: tuple[Skip, ...]
    totals: Totals
