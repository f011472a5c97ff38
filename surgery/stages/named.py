"""Stages from cuts that a user names: the values that may cross, and no others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from surgery.errors import InputError
from surgery.sites.network import Network
from surgery.system.opening import shown_name

__all__ = ["stages_at"]

_SHOWN = 4


def stages_at(network: Network, cuts: Sequence[str]) -> tuple[int, ...]:
    """Return the number of the stage of each operation, if only the named values cross between stages.

    Operations that share any other value stay together. A stage comes as early as the values that it reads allow.

    Raises:
        InputError: there is no such value; or a named one does not separate the graph: what gives it and what reads it
            share other values as well, directly or in a circle.
    """
    named = _values(network, cuts)
    groups = _together(network, set(named))
    level = _levels(network, named, groups)
    if level is None:
        raise _inseparable(network, named)
    for value in named:
        source = network.producer[value]
        if all(groups[source] == groups[reader] for reader in network.readers[value]):
            raise _inseparable(network, [value, *(other for other in named if other != value)])
    return tuple(level[group] for group in groups)


def _values(network: Network, cuts: Sequence[str]) -> list[int]:
    """Return the values of these names; raise InputError for names that no cut can have."""
    numbers = {value.name: number for number, value in enumerate(network.values)}
    found = []
    for name in cuts:
        number = numbers.get(name)
        if number is None or number not in network.producer or number not in network.readers:
            what = "there is no value of this name" if number is None else "no two operations share it"
            inner = [v.name for n, v in enumerate(network.values) if n in network.producer and n in network.readers]
            allowed = f"a value between two operations, as {_listed(inner) or 'none is here'}"
            raise InputError(f"a cut at {shown_name(name)!r}: {what}", allowed=allowed)
        if number in found:
            raise InputError(f"two cuts at {shown_name(name)!r}", next_step="name it once")
        found.append(number)
    return found


def _listed(names: Sequence[str]) -> str:
    """Return a few names from the whole length of a list."""
    step = max(1, len(names) // _SHOWN)
    return ", ".join(map(shown_name, names[step // 2 :: step][:_SHOWN]))


def _together(network: Network, named: set[int]) -> list[int]:
    """Return a group for each operation: those that share a value which is not named are in one."""
    parent = list(range(len(network.operations)))

    def root(number: int) -> int:
        while parent[number] != number:
            # Each step up halves the way for the next: all trees stay flat.
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def unite(numbers: Iterable[int]) -> None:
        first, *others = map(root, numbers)
        for other in others:
            parent[root(other)] = root(first)

    for value, readers in network.readers.items():
        if value in network.producer and value not in named:
            unite((network.producer[value], *readers))
    for group in network.together:
        if group:
            unite(group)
    return [root(number) for number in range(len(network.operations))]


def _levels(network: Network, named: Sequence[int], groups: Sequence[int]) -> dict[int, int] | None:
    """Return the longest way to each group over named values; None if some groups lie in a circle."""
    level = dict.fromkeys(groups, 0)
    edges = {(groups[network.producer[v]], groups[reader]) for v in named for reader in network.readers[v]}
    edges = {(source, target) for source, target in edges if source != target}
    for _ in range(len(level)):  # Bellman and Ford: as many rounds as the longest way is long, or it is a circle
        moved = False
        for source, target in edges:
            if level[target] <= level[source]:
                level[target], moved = level[source] + 1, True
        if not moved:
            return level
    return None


def _inseparable(network: Network, named: Sequence[int]) -> InputError:
    """Return the error for the first of the named values, with what would cross beside it."""
    before: set[int] = set()
    waiting = [network.producer[named[0]]]
    while waiting:
        number = waiting.pop()
        if number not in before:
            before.add(number)
            reads = network.operations[number].reads
            waiting += [network.producer[value] for value in reads if value in network.producer]
    others = [
        network.values[value].name
        for value, readers in network.readers.items()
        if value not in named and network.producer.get(value) in before and not before.issuperset(readers)
    ]
    what = f"a cut at {shown_name(network.values[named[0]].name)!r} does not separate the graph"
    if others:
        what += f": {_listed(others)} would cross it as well"
    return InputError(what, next_step="name the others too, or another value")
