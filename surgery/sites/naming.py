"""The names of factors: P.0.weight, P.1.weight, ... below the name P of a site, and P.1.0.2.weight in branches.

A record says which sites are factored. Where a file has lost it, these names are all that is left of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from surgery.sites.flow import Call, Flow
from surgery.sites.placement import BranchSum, Part

__all__ = ["common", "owners", "parents", "place_of"]


def parents(flow: Flow, part: Part) -> tuple[str, ...]:
    """Return the P of each name P.<step>.weight, or P.<step>.<row>.<call>.weight in a sum; none for other names."""
    branches = isinstance(part, BranchSum)
    found = {tuple(_parent(name, branches) for name in flow.tensors.aliases(call.weight)) for call in part.calls}
    return found.pop() if len(found) == 1 and all(all(names) for names in found) else ()


def _parent(name: str, branches: bool) -> str:
    *above, leaf = name.split(".")
    depth = 3 if branches else 1
    numbers = above[-depth:]
    fits = leaf == "weight" and len(above) > depth and all(number.isdecimal() for number in numbers)
    return ".".join(above[:-depth]) if fits else ""


def common(rows: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the names that are in all rows: a factor that several sites share stands below each of them."""
    return tuple(name for name in rows[0] if all(name in row for row in rows[1:]))


def place_of(flow: Flow, part: Part, above: tuple[str, ...]) -> int:
    """Return which step of its chain a part with a weight is, by its name below the first name in ``above``."""
    names = flow.tensors.aliases(part.calls[0].weight)
    name = next(alias for alias in names if alias.startswith(f"{above[0]}."))
    return int(name.removeprefix(f"{above[0]}.").split(".")[0])


def owners(flow: Flow, call: Call) -> frozenset[str]:
    """Return the factored sites, by the record, of which a call is a factor."""
    names = flow.tensors.aliases(call.weight)
    return frozenset(site for site in flow.recorded if any(name.startswith(f"{site}.") for name in names))
