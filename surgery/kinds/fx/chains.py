"""Chains that a factorization has made at known ranks, as sites that may be cut to lower ranks.

The record says what made a chain. It counts only where the graph agrees: the items in a row have the steps that this
factorization gives the operator that they compose to. That is settled by shapes; no weight is composed for it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from surgery.algebra.chain import Chain
from surgery.algebra.compose import compose_steps
from surgery.algebra.operators import Operator, Shape
from surgery.algebra.steps import Shift, Step
from surgery.errors import Refusal
from surgery.factorizations import FACTORIZATIONS, Ranks, named
from surgery.kinds.fx.items import Item, all_calls
from surgery.kinds.fx.runs import Run, find_segments, sites_of
from surgery.kinds.fx.view import Spot, View, identity
from surgery.sites.site import FactoredSite

__all__ = ["ChainSpot", "Origin", "agrees", "find_chains", "without_numbers"]

Origin = tuple[str, Ranks]


@dataclass(frozen=True, eq=False)
class ChainSpot(Spot):
    """A factored site, the run that stands for it, and its first item in the graph."""

    run: Any = field(kw_only=True)
    item: Any = field(kw_only=True)

    @property
    def first(self) -> Node:
        """The first node with a weight."""
        node: Node = self.run.calls[0][0].node if self.run.calls else self.item.node
        return node


def find_chains(
    view: View, origins: Mapping[str, Origin], shape: Callable[[Node], Shape], recorded: Collection[str]
) -> list[ChainSpot]:
    """Return the chains of known origin whose factors no other site shares."""
    if not origins:
        return []
    groups: dict[tuple[Any, ...], list[list[Item]]] = defaultdict(list)
    for segment in find_segments(view, recorded):
        key = tuple(identity(view.parameters[call.weight]) for call in all_calls(segment))
        groups[key].append(segment)
    found = (_chain_spot(view, key, rows, origins, shape) for key, rows in groups.items())
    return [spot for spot in found if spot is not None]


def _chain_spot(
    view: View,
    key: tuple[Any, ...],
    rows: Sequence[list[Item]],
    origins: Mapping[str, Origin],
    shape: Callable[[Node], Shape],
) -> ChainSpot | None:
    sites = sites_of(view, rows[0])
    origin = origins.get(sites[0])
    own = {call.user for row in rows for call in all_calls(row)}
    if origin is None or any(view.uses[weight] - own for weight in key):
        return None
    least = max(at for at, item in enumerate(rows[0]) if item.calls) + 1
    for end in range(len(rows[0]), least - 1, -1):  # reshapes that follow may be the chain's or the model's own
        chain = Chain(tuple(item.step for item in rows[0][:end]), origin)
        operators = [operator for row in rows if (operator := _operator(row[:end])) is not None]
        if len(operators) == len(rows) and agrees(chain, operators[0]):
            shapes = tuple(shape(row[0].source) for row in rows)
            site = FactoredSite(sites[0], operators[0].to(device="meta"), shapes, sites[1:], chain=chain)
            run = Run(sites, tuple(tuple(row[:end]) for row in rows), tuple(operators))
            return ChainSpot(site, (), run=run, item=rows[0][0])
    return None


def _operator(items: Sequence[Item]) -> Operator | None:
    """Return the operator of a row without numbers, but with its bias; None if the row is none, or has other biases."""
    meta = compose_steps([item.step.to(device="meta") for item in items])
    biases = [call.operator.bias for call in all_calls(items)[:-1]]
    if isinstance(meta, Refusal) or any(bias is not None for bias in biases):
        return None
    bias = Chain(tuple(item.step for item in items)).bias
    return without_numbers(meta, like=all_calls(items)[0].operator.weight).with_bias(bias)


def without_numbers(operator: Operator, like: Tensor) -> Operator:
    """Return the operator with a weight of zeros that takes no memory, on the device of a tensor."""
    weight = torch.zeros((), dtype=like.dtype, device=like.device).expand(operator.weight.shape)
    return replace(operator, weight=weight, bias=None)


def agrees(chain: Chain, operator: Operator) -> bool:
    """Whether the chain has the steps that its origin gives the operator."""
    name, ranks = chain.origin or ("", ())
    if name not in FACTORIZATIONS or named(name).refuse(operator) is not None:
        return False
    if len(ranks) != len(named(name).rank_names(tuple(operator.kernel.shape))):
        return False
    made = named(name).skeleton(operator, ranks)
    return [_form(step) for step in made.steps] == [_form(step) for step in chain.steps]


def _form(step: Step) -> tuple[Any, ...]:
    tensors = [tuple(part.kernel.shape) for part in Chain((step,)).operators]
    geometries = [getattr(part, "geometry", None) for part in Chain((step,)).operators]
    return (type(step), tensors, geometries, None if tensors or isinstance(step, Shift) else step)
