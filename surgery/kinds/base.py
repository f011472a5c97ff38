"""What a graph kind is: an adapter that finds sites and runs, splices chains in and puts single operators back.

An adapter owns the model that it changes (a copy, unless the caller asks for in-place work) and gives it back by
``finish``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

from torch import nn
from torch.fx import Node

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Conv, Operator, Shape
from surgery.errors import InputError, Refusal
from surgery.kinds.fx.behind import behind
from surgery.kinds.fx.chains import ChainSpot, Origin, find_chains
from surgery.kinds.fx.costs import with_costs
from surgery.kinds.fx.items import Item, all_calls
from surgery.kinds.fx.recurrence import Recurrence
from surgery.kinds.fx.runs import Part, Run, find_parts, sites_of
from surgery.kinds.fx.view import Spot, View, identity
from surgery.kinds.layers.known import ModuleRun
from surgery.kinds.layers.modules import called_shape
from surgery.kinds.layers.tensors import count
from surgery.kinds.layers.within import Within, within_of
from surgery.sites.epilogue import Loop
from surgery.sites.site import Skip, Totals

__all__ = ["AnyRun", "Found", "GraphKind"]

AnyRun: TypeAlias = Run | ModuleRun


@dataclass(frozen=True, eq=False)
class Found:
    """All sites of a graph with their calls, what was left alone, and the totals."""

    spots: tuple[Spot, ...]
    skips: tuple[Skip, ...]
    totals: Totals


class GraphKind(ABC):
    """The verbs that passes use; one subclass for each kind of model.

    ``recurrences`` are layers whose module runs in the place of the nodes that compute them, where these are observed.
    """

    kind: ClassVar[str]
    view: View
    shape: Callable[[Node], Shape]
    recurrences: Sequence[Recurrence] = ()

    @abstractmethod
    def splice(self, spot: Spot, chain: Chain) -> None:
        """Put a chain where an operator stands, at all its calls."""

    @abstractmethod
    def put_back(self, run: AnyRun) -> None:
        """Put one operator where a run stands, at all its calls."""

    @abstractmethod
    def finish(self) -> Any:
        """Check the changed model and return it."""

    def find(self) -> Found:
        """Return all sites and skips, and the totals of the model; chains whose making is known are sites too."""
        spots, skips = self.view.spots(self.shape)
        known, left = self.chain_spots()
        skips = [*skips, *left]
        chains = [*find_chains(self.view, self.origins, self.shape, self.recorded), *known]
        inside = {call.node for chain in chains for row in chain.run.calls for call in row}
        if chains:
            others = [spot for spot in spots if not {call.node for call in spot.calls} & inside]
            spots = sorted([*chains, *others], key=lambda spot: spot.first)
        placed = [self._placed(spot) for spot in spots]
        skips += [found for found in placed if isinstance(found, Skip)]
        spots = [found for found in placed if isinstance(found, Spot)]
        skips = with_costs(skips, self.view, self.shape)
        unique = {identity(p): count([p]) for p in self.view.parameters.values()}
        macs = sum(spot.site.macs for spot in spots) + sum(skip.macs for skip in skips)
        return Found(tuple(spots), tuple(skips), Totals(sum(unique.values()), macs))

    def _placed(self, spot: Spot) -> Spot | Skip:
        first = spot.item if isinstance(spot, ChainSpot) else spot.calls[0]
        path = getattr(first, "path", None)
        module = None if path is None or self.view.module is None else self.view.module(path)
        if module is not None and isinstance(within := within_of(module), Within):
            found = _placed_within(spot, module, within)
            if isinstance(found, Skip) or not within.ends:
                return found
            spot = found
        if (loop := self.loop(first)) is not None:
            return replace(spot, site=replace(spot.site, behind=(loop,)))
        return (
            spot
            if isinstance(spot, ChainSpot)
            else replace(spot, site=replace(spot.site, behind=behind(self.view, spot)))
        )

    def chain_spots(self) -> tuple[list[ChainSpot], list[Skip]]:
        """Return the chains that are modules as sites, and those that cannot be cut again."""
        return [], []

    def known_runs(self) -> tuple[list[ModuleRun], list[Skip]]:
        """Return the chains that are modules, and those that were changed since."""
        return [], []

    def verify(self) -> dict[str, str]:
        """See that all chains that were spliced in run; give those that do not up, and return why, by site."""
        return {}

    def loop(self, item: Any) -> Loop | None:
        """Return the loop of a recurrent layer in which an item runs, if any."""
        return None

    @property
    def origins(self) -> Mapping[str, Origin]:
        """The factorization and the ranks of each site that decompose has factored, where that is known."""
        return {}

    @abstractmethod
    def reopen(self, spots: Sequence[ChainSpot]) -> dict[str, Spot]:
        """Put an operator without numbers where each chain stands, and return the spots for splicing, by name."""

    @property
    def notes(self) -> Mapping[str, str]:
        """What the user should know of sites that were put back, by name."""
        return {}

    @property
    def recorded(self) -> frozenset[str]:
        """The sites that decompose has factored in this model, where it has left a record."""
        return frozenset()

    def runs(self, *, everything: bool = False) -> tuple[list[AnyRun], list[Skip]]:
        """Return the runs that are provably one operator, and why others that look like it are not.

        A model with a record comes back to what it was before: chains that it had of its own are left alone, unless
        ``everything`` is to be fused.
        """
        known, skips = self.known_runs()
        parts, refused = find_parts(self.view, self.recorded, everything=everything)
        skips = [*skips, *refused]
        groups: dict[tuple[Any, ...], list[Part]] = defaultdict(list)
        for part in parts:
            groups[self._weights_key(part)].append(part)
        runs: list[AnyRun] = [*known]
        for same in groups.values():
            refusal = self.refuse_run([part.items for part in same])
            sites = sites_of(self.view, same[0].items)
            if refusal is not None:
                skips.append(Skip(sites[0], "chain", refusal.reason))
            else:
                runs.append(Run(sites, tuple(part.items for part in same), tuple(part.operator for part in same)))
        return runs, skips

    def refuse_run(self, runs: Sequence[Sequence[Item]]) -> Refusal | None:
        """Return why runs over the same weights cannot become one operator, or None; a kind may know more reasons."""
        forms = {tuple(_shape_of(call.operator) for call in all_calls(run)) for run in runs}
        return Refusal("its weights are shared by runs of different geometry") if len(forms) > 1 else None

    def _weights_key(self, part: Part) -> tuple[Any, ...]:
        return tuple(identity(self.view.parameters[call.weight]) for call in all_calls(part.items))


def _placed_within(spot: Spot, module: nn.Module, within: Within) -> Spot | Skip:
    """Return the site inside a layer that does more: its operator gets other shapes than the layer."""
    try:
        shapes = tuple(called_shape(module, shape) for shape in spot.site.input_shapes)
    except InputError as error:
        return Skip(spot.site.name, spot.site.description, error.what, spot.site.parameters)
    site = replace(spot.site, input_shapes=shapes, surplus=within.extra)
    return replace(spot, site=site)


def _shape_of(operator: Operator) -> tuple[Any, ...]:
    conv = (operator.geometry, operator.groups) if isinstance(operator, Conv) else ()
    return (type(operator), tuple(operator.weight.shape), *conv)
