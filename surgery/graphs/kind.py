"""What a graph kind is: an adapter that finds sites and runs, splices chains in and puts single operators back.

An adapter owns the model that it changes (a copy, unless the caller asks for in-place work) and gives it back by
``finish``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.fx import Node

from surgery.chain import Chain, compose
from surgery.errors import Refusal
from surgery.graphs.view import Call, Spot, View, identity, site_name
from surgery.operators import Conv, Operator, Shape
from surgery.sites import Skip, Totals

__all__ = ["Found", "GraphKind", "Run"]


@dataclass(frozen=True, eq=False)
class Found:
    """All sites of a graph with their calls, what was left alone, and the totals."""

    spots: tuple[Spot, ...]
    skips: tuple[Skip, ...]
    totals: Totals


@dataclass(frozen=True, eq=False)
class Run:
    """Calls in a row that are provably one operator; ``twins`` are the other runs over the same weights.

    ``operators`` are the composed operators of the run and of its twins: one weight, each with its own bias.
    ``sites`` are the names that the one operator gets, one for each alias of a tied weight.
    """

    sites: tuple[str, ...]
    calls: tuple[tuple[Call, ...], ...]
    operators: tuple[Operator, ...]


class GraphKind(ABC):
    """The verbs that passes use; one subclass for each kind of model."""

    kind: ClassVar[str]
    view: View
    shape: Callable[[Node], Shape]

    @abstractmethod
    def splice(self, spot: Spot, chain: Chain) -> None:
        """Put a chain where an operator stands, at all its calls."""

    @abstractmethod
    def put_back(self, run: Run) -> None:
        """Put one operator where a run stands, at all its calls."""

    @abstractmethod
    def finish(self) -> Any:
        """Check the changed model and return it."""

    def find(self) -> Found:
        """Return all sites and skips, and the totals of the model."""
        spots, skips = self.view.spots(self.shape)
        unique = {identity(p): p.numel() for p in self.view.parameters.values()}
        macs = sum(spot.site.macs for spot in spots) + sum(skip.macs for skip in skips)
        return Found(tuple(spots), tuple(skips), Totals(sum(unique.values()), macs))

    @property
    def recorded(self) -> frozenset[str]:
        """The sites that decompose has factored in this model, where it has left a record."""
        return frozenset()

    def runs(self, *, everything: bool = False) -> tuple[list[Run], list[Skip]]:
        """Return the runs that are provably one operator, and why others that look like it are not.

        A model with a record comes back to what it was before: chains that it had of its own are left alone, unless
        ``everything`` is to be fused.
        """
        groups: dict[tuple[Any, ...], list[tuple[list[Call], Operator]]] = defaultdict(list)
        skips = []
        for segment in (s for calls in self.view.runs() for s in self._segments(calls)):
            if self.recorded and not everything and not set(self._sites(segment)) & self.recorded:
                place = " -> ".join(site_name(call.weight) for call in segment)
                skips.append(Skip(place, "chain", "the original model had it (--all fuses it as well)"))
                continue
            parts, refusals = _partition(segment)
            skips.extend(refusals)
            for part, operator in parts:
                groups[self._weights_key(part)].append((part, operator))
        runs = []
        for same in groups.values():
            refusal = self.refuse_run([part for part, _ in same])
            sites = self._sites(same[0][0])
            if refusal is not None:
                skips.append(Skip(sites[0], "chain", refusal.reason))
            else:
                runs.append(Run(sites, tuple(tuple(part) for part, _ in same), tuple(op for _, op in same)))
        return runs, skips

    def _segments(self, calls: Sequence[Call]) -> list[list[Call]]:
        """Cut a run so that the factors of one site stay apart from what comes before and after them."""
        segments: list[list[Call]] = [[]]
        start = 0
        while start < len(calls):
            length = self._factored(calls[start:])
            if length:
                segments += [list(calls[start : start + length]), []]
            else:
                segments[-1].append(calls[start])
            start += max(1, length)
        return [segment for segment in segments if len(segment) > 1]

    def _factored(self, calls: Sequence[Call]) -> int:
        """Return how many calls from the first on are P.0, P.1, ... and all that is below P; 0 if they are not."""
        names = [self.view.names[identity(self.view.parameters[call.weight])] for call in calls]
        parents = [_container(aliases, index) for index, aliases in enumerate(names)]
        length = next((i for i, parent in enumerate(parents) if not parent or parent != parents[0]), len(calls))
        if length < 2:
            return 0
        weights = {name for aliases in names[:length] for name in aliases}
        own = weights | {f"{name.removesuffix('.weight')}.bias" for name in weights}
        below = f"{parents[0][0]}."
        return length if all(n in own for n in self.view.parameters if n.startswith(below)) else 0

    def refuse_run(self, runs: Sequence[Sequence[Call]]) -> Refusal | None:
        """Return why runs over the same weights cannot become one operator, or None; a kind may know more reasons."""
        forms = {tuple(_shape_of(call.operator) for call in run) for run in runs}
        return Refusal("its weights are shared by runs of different geometry") if len(forms) > 1 else None

    def _weights_key(self, calls: Sequence[Call]) -> tuple[Any, ...]:
        return tuple(identity(self.view.parameters[call.weight]) for call in calls)

    def _sites(self, calls: Sequence[Call]) -> tuple[str, ...]:
        """Name the one operator: P for weights P.0.weight, P.1.weight, ...; else as the first weight."""
        aliases = [self.view.names[identity(self.view.parameters[call.weight])] for call in calls]
        parents = [_container(names, index) for index, names in enumerate(aliases)]
        if all(parent == parents[0] for parent in parents) and parents[0]:
            return parents[0]
        return tuple(site_name(name) for name in aliases[0])


def _container(names: Sequence[str], index: int) -> tuple[str, ...]:
    """Return the P of each name P.<index>.weight; none if a name has another form."""
    suffix = f".{index}.weight"
    return tuple(name.removesuffix(suffix) for name in names) if all(n.endswith(suffix) for n in names) else ()


def _shape_of(operator: Operator) -> tuple[Any, ...]:
    conv = (operator.geometry, operator.groups) if isinstance(operator, Conv) else ()
    return (type(operator), tuple(operator.weight.shape), *conv)


def _partition(calls: Sequence[Call]) -> tuple[list[tuple[list[Call], Operator]], list[Skip]]:
    """Split a run into the longest parts that compose, from the left; each break is a skip with its reason."""
    parts: list[tuple[list[Call], Operator]] = []
    skips = []
    current, operator = [calls[0]], calls[0].operator
    for call in calls[1:]:
        merged = _compose_calls(current[-1], operator, call)
        if isinstance(merged, Refusal):
            place = f"{site_name(current[-1].weight)} -> {site_name(call.weight)}"
            skips.append(Skip(place, "chain", merged.reason))
            parts.append((current, operator))
            current, operator = [call], call.operator
        else:
            current, operator = [*current, call], merged
    parts.append((current, operator))
    return [(part, op) for part, op in parts if len(part) > 1], skips


def _compose_calls(last: Call, operator: Operator, call: Call) -> Operator | Refusal:
    if (last.path is None) != (call.path is None):
        return Refusal("one is a module and the other a function call")
    merged = compose(operator, call.operator)
    if isinstance(merged, Conv) and not merged.expressible:
        return Refusal("the padding of their composition differs between two sides of a dimension")
    return merged
