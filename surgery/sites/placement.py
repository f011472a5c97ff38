"""Placements: sites with their calls in a flow, and chains in a flow that are one operator."""

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
    """The sum of rows of calls on one source; ``additions`` are the values of the additions, in order."""

    rows: tuple[tuple[Call, ...], ...]
    additions: tuple[int, ...]

    @property
    def value(self) -> int:
        """The value of the last addition."""
        return self.additions[-1]

    @property
    def source(self) -> int:
        """What all rows read."""
        return self.rows[0][0].source

    @property
    def values(self) -> tuple[int, ...]:
        """All values, each after those that it is computed from."""
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
        """The path of the module that adds, if the calls are modules in its rows."""
        last = self.rows[-1][-1].path
        return None if last is None else last.rpartition(".")[0].rpartition(".")[0]


Part: TypeAlias = Call | Reshape | BranchSum


def calls_of(parts: Sequence[Part]) -> list[Call]:
    """Return the calls of all parts, in order."""
    return [call for part in parts for call in part.calls]


@dataclass(frozen=True, eq=False)
class FusableChain:
    """Parts in a row that are provably one operator, and the other rows over the same weights.

    ``operators`` are what the rows compose to: one weight, a bias each. ``sites`` are the names that the one operator
    gets, one for each name of a tied weight.
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
        """Number of parameters of the parts."""
        return sum(call.operator.parameters for call in self.calls[0])


@dataclass(frozen=True, eq=False)
class FusableModule:
    """A chain that stands as a module, with what it composes to."""

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
        """What each module composes to."""
        return tuple(map(_composed, self.chain.chains))


Fusable: TypeAlias = FusableChain | FusableModule


def _composed(chain: Chain) -> Operator:
    operator = chain.compose()
    if isinstance(operator, Refusal):
        raise CheckError(f"the factors of a layer are not one operator: {operator.reason}")
    return operator


@dataclass(frozen=True, eq=False)
class Placement:
    """A site with its calls. Of a site that is factored already, ``chain`` is what stands there in place of calls."""

    site: Site
    calls: tuple[Call, ...]
    chain: Fusable | None = None

    @property
    def first(self) -> int:
        """The first value that is computed with its weight."""
        if isinstance(self.chain, FusableModule):
            return min(self.chain.chain.calls)
        return self.chain.calls[0][0].value if self.chain is not None else self.calls[0].value


@dataclass(frozen=True, eq=False)
class Found:
    """All sites of a model with their calls, what was left alone, and the totals."""

    placements: tuple[Placement, ...]
    skips: tuple[Skip, ...]
    totals: Totals
