"""Segments: rows of parts of a flow that may be one operator, cut at the borders of factored sites.

    parts        calls, reshapes, and sums of branches that are one operator together
    rows         parts in sequence, where only the next part uses the value of each part
    segments     rows, cut so that the factors of one site stay apart from the parts before and after them

For x -> a.0 -> a.1 -> b.0 -> b.1 -> relu -> c the parts are five calls; [a.0, a.1, b.0, b.1] is a row, since nothing
else reads the values between them; and [a.0, a.1] and [b.0, b.1] are its segments.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from surgery.algebra import add, compose_steps
from surgery.errors import Refusal
from surgery.sites.flow import Call, Flow, Reshape, Sum, site_name
from surgery.sites.placement import BranchSum, Part, calls_of

__all__ = ["common", "find_segments", "is_factor_of", "owners", "parents", "step_of", "sites_of"]


def sites_of(flow: Flow, parts: Sequence[Part]) -> tuple[str, ...]:
    """Return the names of the one operator that parts compose to.

    The name is P if the weights are P.0.weight, P.1.weight, ...; otherwise it is the site name of the first weight.
    There is one name for each name of a tied weight.
    """
    carriers = [part for part in parts if part.calls]
    found = common([parents(flow, part) for part in carriers])
    return found or tuple(site_name(name) for name in flow.tensors.aliases(carriers[0].calls[0].weight))


def find_segments(flow: Flow) -> list[list[Part]]:
    """Return all rows of parts, cut at the borders of factored sites; each segment has two calls or more."""
    return [segment for row in _find_rows(flow) for segment in _segments(flow, row)]


def _find_rows(flow: Flow) -> Iterator[list[Part]]:
    """Yield each row of maximal length with two calls or more; a bias that the graph computes ends a row."""
    # follower[v] is the only part that uses the value v. A part is the start of a row if it follows no other part.
    parts = _find_parts(flow)
    follower: dict[int, Part] = {}
    ends = {part.value for part in parts if part.calls and part.calls[-1].computed_bias is not None}
    for part in parts:
        # ``values`` has all values of a sum of branches: that several of its branches read the source is no other use.
        if part.source not in ends and flow.users.get(part.source, frozenset()) <= set(part.values):
            follower[part.source] = part
    inner = {follower[part.value].value for part in parts if part.value in follower}
    for part in parts:
        row = [part]
        while row[-1].value in follower:
            row.append(follower[row[-1].value])
        if part.value not in inner and len(calls_of(row)) > 1:
            yield row


def _find_parts(flow: Flow) -> list[Part]:
    """Return all parts in order. The calls in a sum of branches are part of it; calls on computed weights are not.

    A sum counts only if its branches belong to one site that is known to be factored, or have the names of factors. A
    sum of the model's own, such as that of two heads, is not a part.
    """
    calls = {call.value: call for call in flow.calls if call.weight not in flow.tensors.computed}
    parts: dict[int, Part] = dict(calls)
    for element in flow.elements:
        if isinstance(element, Reshape):
            parts[element.value] = element
        elif isinstance(element, Sum) and (found := _branch_sum(flow, element, calls)) is not None:
            parts[element.value] = found
    # a sum that is part of a larger sum, and the calls in it, are inner values of that larger part
    sums = [part for part in parts.values() if isinstance(part, BranchSum)]
    within = {value for part in sums for value in part.values[:-1]}
    return [parts[value] for value in sorted(parts) if value not in within]


def _branch_sum(flow: Flow, last: Sum, calls: Mapping[int, Call]) -> BranchSum | None:
    """Return the sum of branches whose last addition is ``last``, if it composes to one operator; else None."""
    leaves, additions = _leaves(flow, last)
    # each term must be the end of a branch, all branches must start at one value, and no term may occur twice
    rows = [_branch(flow, leaf, calls) for leaf in leaves] if len(set(leaves)) == len(leaves) else [[]]
    # An empty row is a term that is no call, such as x itself in x + b(a(x)): a residual sum, not one operator.
    if any(not row or row[0].source != rows[0][0].source for row in rows):
        return None
    found = BranchSum(tuple(map(tuple, rows)), tuple(additions))
    # one layer that is called twice has the same weights in both terms; branches of one operator share none
    weights = [flow.tensors.keys[call.weight] for call in found.calls]
    if len(set(weights)) < len(weights):
        return None
    # a computed bias can be moved only if it is that of the last call
    if any(call.computed_bias is not None for call in found.calls[:-1]) or not _of_one_site(flow, found):
        return None
    composed = add([compose_steps([call.operator for call in row]) for row in rows])
    return None if isinstance(composed, Refusal) else found


def _of_one_site(flow: Flow, found: BranchSum) -> bool:
    """Whether branches belong to one factored site: by the record, or by their names if the record has none of them."""
    known = [owners(flow, call) for call in found.calls]
    return bool(frozenset.intersection(*known)) or (not any(known) and bool(parents(flow, found)))


def _leaves(flow: Flow, last: Sum) -> tuple[list[int], list[int]]:
    """Return the terms of a tree of additions from left to right, and the values of its additions.

    An addition belongs to the tree only if nothing else uses it. For s = (a + b) + c, where only s uses a + b, the
    terms are a, b, c and the additions are a + b, s.
    """
    leaves: list[int] = []
    additions: list[int] = []
    for term in last.terms:
        element = flow.at.get(term)
        inner = isinstance(element, Sum) and len(flow.users.get(term, ())) == 1
        found = _leaves(flow, element) if inner and isinstance(element, Sum) else ([term], [])
        leaves += found[0]
        additions += found[1]
    return leaves, [*additions, last.value]


def _branch(flow: Flow, leaf: int, calls: Mapping[int, Call]) -> list[Call]:
    """Return the calls, one after another, that end at a term of a sum and whose values nothing else uses."""
    row: list[Call] = []
    value = leaf
    while value in calls and len(flow.users.get(value, ())) == 1:
        row.insert(0, calls[value])
        value = calls[value].source
    return row


def _segments(flow: Flow, row: Sequence[Part]) -> list[list[Part]]:
    """Cut a row so that the factors of one site, with their reshapes, stay apart from the parts before and after."""
    segments: list[list[Part]] = [[]]
    start = 0
    while start < len(row):
        length = _factored(flow, row[start:])
        if length:
            segments += [list(row[start : start + length]), []]
        else:
            segments[-1].append(row[start])
        start += max(1, length)
    return [segment for segment in segments if len(calls_of(segment)) > 1]


def _factored(flow: Flow, row: Sequence[Part]) -> int:
    """Return how many of the first parts of a row are the whole chain of one factored site; 0 if they are none.

    The chain of site P has step number i under the name P.i. Reshapes have no weight and so no name; the numbers of the
    steps with weights say how many reshapes belong to the chain. In a row reshape, P.1, P.2, reshape, Q.0 the chain of
    P starts at the first reshape (P.1 is step 1) and has all four parts before Q.0 (Q.0 is step 0 of its own chain).
    """
    lead = next((at for at, part in enumerate(row) if part.calls), len(row))
    carriers = [part for part in row if part.calls]
    above, mine = _site_of_first(flow, carriers)
    # As many reshapes must stand before the first weight as its step number says; with fewer or
    # more, these are others'.
    if not above or step_of(flow, carriers[0], above) != lead:
        return 0
    # the parts are the whole chain only if they have every parameter below P.<number>
    calls = calls_of(mine)
    weights = {name for call in calls for name in flow.tensors.aliases(call.weight)}
    own = weights | {f"{name.removesuffix('.weight')}.bias" for name in weights}
    own |= {name for call in calls if call.bias is not None for name in flow.tensors.aliases(call.bias)}
    # a shift after the last reshape holds the bias as P.<number>.bias
    shifts = [part.bias for part in row if isinstance(part, Reshape) and part.bias is not None]
    places = {bias.removeprefix(f"{name}.") for bias in shifts for name in above if bias.startswith(f"{name}.")}
    own |= {f"{name}.{place}" for name in above for place in places}
    below = [name for name in flow.tensors.keys if name.startswith(f"{above[0]}.")]
    whole = all(name in own for name in below if name.removeprefix(f"{above[0]}.")[0].isdecimal())
    if len(calls) < 2 or not whole:
        return 0
    last = max(at for at, part in enumerate(row) if part in mine)
    following = next((at for at in range(last + 1, len(row)) if row[at].calls), None)
    if following is None:
        return len(row)
    # the reshapes before the next part with a weight belong to that part's chain if its step number says so
    others = parents(flow, row[following])
    # Example of reshape, P.1, P.2, reshape, Q.0: last = 2, following = 4 and Q.0 is step 0, so 4 parts. With Q.1 in
    # place of Q.0 the second reshape would be step 0 of Q, and P would have 4 - 1 = 3 parts.
    return max(last + 1, following - (step_of(flow, row[following], others) if others else 0))


def _site_of_first(flow: Flow, carriers: Sequence[Part]) -> tuple[tuple[str, ...], list[Part]]:
    """Return the names P that the first parts with weights have in common, and these parts."""
    above = parents(flow, carriers[0]) if carriers else ()
    mine: list[Part] = []
    weights: set[str] = set()
    for part in carriers:
        shared, own = common([above, parents(flow, part)]), {call.weight for call in part.calls}
        if not shared or own & weights:  # the second call of the same chain starts with a weight of the first
            break
        above = shared
        weights |= own
        mine.append(part)
    return above, mine


def parents(flow: Flow, part: Part) -> tuple[str, ...]:
    """Return the P of each name P.<step>.weight, or P.<step>.<row>.<call>.weight in a sum; nothing for other names."""
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
    """Return the names that are in all rows. A factor that several sites share has a name below each of them."""
    return tuple(name for name in rows[0] if all(name in row for row in rows[1:]))


def step_of(flow: Flow, part: Part, above: tuple[str, ...]) -> int:
    """Return the number of the step that a part with a weight is in its chain, from its name below ``above[0]``."""
    names = flow.tensors.aliases(part.calls[0].weight)
    name = next(alias for alias in names if alias.startswith(f"{above[0]}."))
    return int(name.removeprefix(f"{above[0]}.").split(".")[0])


def owners(flow: Flow, call: Call) -> frozenset[str]:
    """Return the recorded sites P that a call is a factor of: its name is P.<number>... (P.weight is dense again)."""
    names = flow.tensors.aliases(call.weight)
    return frozenset(site for site in flow.recorded if any(is_factor_of(site, name) for name in names))


def is_factor_of(site: str, name: str) -> bool:
    """Whether a parameter has the name of one that is in the chain of a site.

    >>> is_factor_of("fc", "fc.0.weight"), is_factor_of("fc", "fc.weight"), is_factor_of("fc", "fc.0")
    (True, False, False)
    """
    if not name.startswith(f"{site}."):
        return False
    words = name.removeprefix(f"{site}.").split(".")
    numbers = list(itertools.takewhile(str.isdecimal, words))
    # the step, or the step, row and call: fc.0.0.weight is a factor of the site fc.0
    return len(numbers) in (1, 3) and len(words) > len(numbers)
