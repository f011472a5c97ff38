"""Placements: where sites and fusable chains stand in a flow.

Joint sites: sites that are factored as one operator with stacked outputs, and share all factors but the last.

The shared factors are one set of parameters under the names of every site. With ``svd``, Q, K and V share one input
basis; with ``tucker``, they share the input basis and the core. The chain is exact at the full ranks of the stacked
operator. Each site keeps its own calls, so that each can be composed alone. A runtime that merges equal calls on the
same input, as onnxruntime does, runs the shared factors once.

Edits: the changes that surgery wants in a graph, as values. A kind of models carries them out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from surgery.algebra import Branches, Chain, Operator, stack, stack_key
from surgery.errors import CheckError, Refusal
from surgery.sites.flow import Call, ModuleChain, Reshape
from surgery.sites.site import FactoredSite, Site, Skip, Totals

__all__ = [
    "BranchSum",
    "Edit",
    "Found",
    "Fusable",
    "FusableChain",
    "FusableModule",
    "Fuse",
    "JointSite",
    "Part",
    "Placement",
    "Replace",
    "calls_of",
    "joined",
]


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


@dataclass(frozen=True, eq=False, repr=False)
class JointSite(Site):
    """Several sites as one, with the outputs of their operators stacked; it has the name of the first site."""

    parts: tuple[Site, ...] = ()

    @property
    def members(self) -> tuple[Site, ...]:
        """The sites that share factors."""
        return self.parts

    @property
    def parameters(self) -> int:
        """Number of parameters of all members."""
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls of all members in one run."""
        return sum(part.macs for part in self.parts)


def joined(sites: Sequence[Site]) -> JointSite | Refusal:
    """Return the sites as one joint site with stacked outputs, or why they cannot be joined."""
    factored = [site.name for site in sites if isinstance(site, FactoredSite)]
    if factored:
        return Refusal(f"{factored[0]} is factored already; recompose it first")
    first, *others = sites
    for other in others:
        if stack_key(other.operator) != stack_key(first.operator):
            ours, theirs = (f"{s.name} ({s.description}, {s.operator.in_channels} in)" for s in (first, other))
            return Refusal(f"{ours} and {theirs} differ in more than their outputs")
    operator = stack([site.operator for site in sites])
    return JointSite(first.name, operator, first.input_shapes, parts=tuple(sites))


@dataclass(frozen=True, eq=False)
class Replace:
    """Replace an operator by a chain, at all calls of the operator."""

    placement: Placement
    chain: Chain


@dataclass(frozen=True, eq=False)
class Fuse:
    """Replace a chain by the one operator that it composes to, at all calls of the chain."""

    chain: Fusable


Edit: TypeAlias = Replace | Fuse
