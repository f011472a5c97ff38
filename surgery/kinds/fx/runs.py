"""Which items of an fx graph are provably one operator: runs cut at the borders of factored sites, then composed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from surgery.algebra.compose import compose, compose_steps
from surgery.algebra.operators import Conv, Operator
from surgery.errors import Refusal
from surgery.kinds.fx.items import Item, LinkCall, aliases, all_calls, container, find_runs
from surgery.kinds.fx.view import Call, View, site_name
from surgery.sites.site import Skip

__all__ = ["Part", "Run", "find_parts", "find_segments", "sites_of"]


@dataclass(frozen=True, eq=False)
class Part:
    """Items in a row, and the one operator that they are."""

    items: tuple[Item, ...]
    operator: Operator


@dataclass(frozen=True, eq=False)
class Run:
    """Items in a row that are provably one operator, and its twins: the other rows over the same weights.

    ``operators`` are the composed operators of the row and of its twins: one weight, each with its own bias.
    ``sites`` are the names that the one operator gets, one for each alias of a tied weight.
    """

    sites: tuple[str, ...]
    rows: tuple[tuple[Item, ...], ...]
    operators: tuple[Operator, ...]

    @property
    def calls(self) -> tuple[tuple[Call, ...], ...]:
        """The calls of each row."""
        return tuple(tuple(all_calls(items)) for items in self.rows)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the weights."""
        return tuple(call.weight for call in self.calls[0])

    @property
    def parameters_before(self) -> int:
        """Number of parameters of the items."""
        return sum(call.operator.parameters for call in self.calls[0])


def find_parts(view: View, recorded: Collection[str], *, everything: bool) -> tuple[list[Part], list[Skip]]:
    """Return the parts of all runs that compose, and why others that look like it do not.

    Where a record names factored sites, other chains are left alone unless ``everything`` is to be fused.
    """
    parts: list[Part] = []
    skips: list[Skip] = []
    for segment in find_segments(view, recorded):
        if recorded and not everything and not set(sites_of(view, segment)) & set(recorded):
            place = " -> ".join(site_name(call.weight) for call in all_calls(segment))
            skips.append(Skip(place, "chain", "the original model had it (--all fuses it as well)"))
            continue
        found, refusals = _partition(segment)
        parts += found
        skips += refusals
    return parts, skips


def find_segments(view: View, recorded: Collection[str]) -> list[list[Item]]:
    """Return all runs, cut at the borders of factored sites."""
    return [segment for run in find_runs(view, recorded) for segment in _segments(view, run)]


def sites_of(view: View, items: Sequence[Item]) -> tuple[str, ...]:
    """Name the one operator: P for weights P.0.weight, P.1.weight, ...; else as the first weight."""
    carriers = [item for item in items if item.calls]
    parents = _common([container(view, item) for item in carriers])
    if parents:
        return parents
    return tuple(site_name(name) for name in aliases(view, carriers[0].calls[0]))


def _common(rows: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the names that are in all rows: a factor that several sites share stands below each of them."""
    return tuple(name for name in rows[0] if all(name in row for row in rows[1:]))


def _segments(view: View, run: Sequence[Item]) -> list[list[Item]]:
    """Cut a run so that the factors of one site, with their links, stay apart from what comes before and after them."""
    segments: list[list[Item]] = [[]]
    start = 0
    while start < len(run):
        length = _factored(view, run[start:])
        if length:
            segments += [list(run[start : start + length]), []]
        else:
            segments[-1].append(run[start])
        start += max(1, length)
    return [segment for segment in segments if len(all_calls(segment)) > 1]


def _factored(view: View, run: Sequence[Item]) -> int:
    """Return how many items from the first on are all that is below a name P, with their links; 0 if they are not."""
    lead = next((at for at, item in enumerate(run) if item.calls), len(run))
    carriers = [item for item in run if item.calls]
    parents, mine = _site_of_first(view, carriers)
    if not parents or _first_step(view, carriers[0], parents) != lead:
        return 0
    calls = all_calls(mine)
    weights = {name for call in calls for name in aliases(view, call)}
    own = weights | {f"{name.removesuffix('.weight')}.bias" for name in weights}
    shifts = [item.bias for item in run if isinstance(item, LinkCall) and item.bias is not None]
    places = {bias.removeprefix(f"{parent}.") for bias in shifts for parent in parents if bias.startswith(f"{parent}.")}
    own |= {f"{parent}.{place}" for parent in parents for place in places}
    below = [name for name in view.parameters if name.startswith(f"{parents[0]}.")]
    whole = all(name in own for name in below if name.removeprefix(f"{parents[0]}.")[0].isdecimal())
    if len(calls) < 2 or not whole:
        return 0
    last = max(at for at, item in enumerate(run) if item in mine)
    following = next((at for at in range(last + 1, len(run)) if run[at].calls), None)
    if following is None:
        return len(run)
    others = container(view, run[following])
    return max(last + 1, following - (_first_step(view, run[following], others) if others else 0))


def _site_of_first(view: View, carriers: Sequence[Item]) -> tuple[tuple[str, ...], list[Item]]:
    """Return the names P below which the first items with weights stand, and these items."""
    parents = container(view, carriers[0]) if carriers else ()
    mine: list[Item] = []
    for item in carriers:
        common = _common([parents, container(view, item)])
        if not common:
            break
        parents = common
        mine.append(item)
    return parents, mine


def _first_step(view: View, item: Item, parents: tuple[str, ...]) -> int:
    """Return which step of its chain the first item with a weight is: its name says so."""
    name = next(alias for alias in aliases(view, item.calls[0]) if alias.startswith(f"{parents[0]}."))
    return int(name.removeprefix(f"{parents[0]}.").split(".")[0])


def _partition(items: Sequence[Item]) -> tuple[list[Part], list[Skip]]:
    """Split a segment into the longest parts that compose, from the left; each break is a skip with its reason."""
    if all(isinstance(item, Call) for item in items):
        return _partition_calls(all_calls(items))
    parts: list[Part] = []
    start = 0
    while start < len(items):
        part = _longest(items[start:])
        if part is not None:
            parts.append(part)
        start += 1 if part is None else len(part.items)
    return parts, []


def _longest(items: Sequence[Item]) -> Part | None:
    """Return the longest part from the first item on that composes of two calls or more."""
    for end in range(len(items), 0, -1):
        part = items[:end]
        if len(all_calls(part)) < 2 or len({item.path is None for item in part}) > 1:
            continue
        operator = compose_steps([item.step for item in part])
        if not isinstance(operator, Refusal) and _refuse(operator) is None:
            return Part(tuple(part), operator)
    return None


def _partition_calls(calls: Sequence[Call]) -> tuple[list[Part], list[Skip]]:
    parts: list[Part] = []
    skips = []
    current, operator = [calls[0]], calls[0].operator
    for call in calls[1:]:
        merged = _compose_calls(current[-1], operator, call)
        if isinstance(merged, Refusal):
            place = f"{site_name(current[-1].weight)} -> {site_name(call.weight)}"
            skips.append(Skip(place, "chain", merged.reason))
            parts.append(Part(tuple(current), operator))
            current, operator = [call], call.operator
        else:
            current, operator = [*current, call], merged
    parts.append(Part(tuple(current), operator))
    return [part for part in parts if len(part.items) > 1], skips


def _compose_calls(last: Call, operator: Operator, call: Call) -> Operator | Refusal:
    if (last.path is None) != (call.path is None):
        return Refusal("one is a module and the other a function call")
    merged = compose(operator, call.operator)
    return merged if isinstance(merged, Refusal) else _refuse(merged) or merged


def _refuse(operator: Operator) -> Refusal | None:
    if isinstance(operator, Conv) and not operator.expressible:
        return Refusal("the padding of their composition differs between two sides of a dimension")
    return None
