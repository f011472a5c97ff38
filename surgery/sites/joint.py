"""Joint sites: two or more that are factored as one operator with stacked outputs, and share all factors but the last.

    [W_1; W_2; ..] (O_1 + O_2 + .., I, K)  ~  [U_1; U_2; ..] F(rest)        chain of site i: the rest, then U_i

The rest is one set of parameters under the names of every site: one input basis for Q, K and V with ``svd``; the input
basis and the core with ``tucker``. Exact at the full ranks of the stacked operator. Each site keeps calls of its own,
so that each composes alone; runtimes that merge equal calls on the same input (onnxruntime does) run the rest once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Conv, Embedding, Linear, Operator
from surgery.errors import Refusal
from surgery.sites.site import FactoredSite, Site

__all__ = ["JointSite", "form", "own_parameters", "split", "stack"]


@dataclass(frozen=True, eq=False)
class JointSite(Site):
    """Sites that share factors, as one: its operator has their outputs stacked, and its name is that of the first."""

    parts: tuple[Site, ...] = ()

    @property
    def members(self) -> tuple[Site, ...]:
        """The sites."""
        return self.parts

    @property
    def parameters(self) -> int:
        """Number of parameters of all of them."""
        return sum(part.parameters for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of all calls of all of them in one run."""
        return sum(part.macs for part in self.parts)


def form(operator: Operator) -> tuple[object, ...]:
    """Return what operators must have in common to be stacked: all but the number of outputs and the bias."""
    groups, _, *rest = operator.kernel.shape
    how = operator.geometry if isinstance(operator, Conv) else None
    row = operator.padding_index if isinstance(operator, Embedding) else None
    return type(operator), how, row, groups, tuple(rest), operator.weight.dtype, operator.weight.device


def stack(sites: Sequence[Site]) -> JointSite | Refusal:
    """Return the sites as one with stacked outputs, or why they cannot be."""
    factored = [site.name for site in sites if isinstance(site, FactoredSite)]
    if factored:
        return Refusal(f"{factored[0]} is factored already; recompose it first")
    first, *others = sites
    for other in others:
        if form(other.operator) != form(first.operator):
            ours, theirs = (f"{s.name} ({s.description}, {s.operator.in_channels} in)" for s in (first, other))
            return Refusal(f"{ours} and {theirs} differ in more than their outputs")
    kernel = torch.cat([site.operator.kernel.detach() for site in sites], 1)
    operator: Operator
    if isinstance(first.operator, Conv):
        operator = Conv.from_kernel(kernel, first.operator.geometry)
    elif isinstance(first.operator, Embedding):
        operator = Embedding(kernel[0].t(), padding_index=first.operator.padding_index)
    else:
        operator = Linear(kernel[0])
    return JointSite(first.name, operator, first.input_shapes, parts=tuple(sites))


def split(chain: Chain, sites: Sequence[Site]) -> tuple[Chain, ...] | Refusal:
    """Return the chain of each site, with its bias, from that of the stacked operator; refuse where none is its own.

    All steps but the last are the same objects in every chain.
    """
    *rest, last = chain.steps
    rows = [site.operator.kernel.shape[1] for site in sites]
    if not isinstance(last, Conv | Linear) or last.kernel.shape[1] != sum(rows) or not rest:
        return Refusal("its last factor is not that of the outputs alone, so that there is nothing to share")
    chains = []
    for site, kernel in zip(sites, last.kernel.split(rows, 1), strict=True):
        rows_of = Conv.from_kernel(kernel, last.geometry) if isinstance(last, Conv) else Linear(kernel[0])
        own = rows_of.to(memory_format=torch.contiguous_format, copy=True)
        chains.append(Chain((*rest, own), chain.origin).with_bias(site.operator.bias))
    return tuple(chains)


def own_parameters(chains: Sequence[Chain]) -> list[int]:
    """Return the number of parameters of each chain, with what several share counted for the first of them."""
    seen: set[int] = set()
    counts = []
    for chain in chains:
        new = [step for step in chain.steps if id(step) not in seen]
        seen |= {id(step) for step in new}
        counts.append(sum(step.parameters for step in new))
    return counts
