"""Joint sites: sites that are factored as one operator with stacked outputs, and share all factors but the last.

The shared factors are one set of parameters under the names of every site. With ``svd``, Q, K and V share one input
basis; with ``tucker``, they share the input basis and the core. The chain is exact at the full ranks of the stacked
operator. Each site keeps its own calls, so that each can be composed alone. A runtime that merges equal calls on the
same input, as onnxruntime does, runs the shared factors once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.algebra.stack import stack, stack_key
from surgery.errors import Refusal
from surgery.sites.site import FactoredSite, Site

__all__ = ["JointSite", "joined"]


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
