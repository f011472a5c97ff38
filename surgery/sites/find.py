"""find: the sites of a flow, the places that are left alone, and the totals of the model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from surgery.errors import InputError, Refusal
from surgery.sites.epilogue import Activation, BatchNorm, Epilogue
from surgery.sites.flow import Call, Flow, Key, Other, site_name
from surgery.sites.placement import Found, FusableModule, Placement
from surgery.sites.recut import placed_chain, placed_chains, refuse_factor
from surgery.sites.site import Site, Skip, Totals

__all__ = ["epilogues", "find"]


def find(flow: Flow) -> Found:
    """Return all sites, all skips with their costs, and the totals. Chains of known origin are sites as well."""
    # Three sources of sites: chains of calls with a known origin, chains that stand as modules, and all other calls.
    chains = placed_chains(flow)
    modules = [placed_chain(flow, chain) for chain in flow.chains]
    chains += [found for found in modules if isinstance(found, Placement)]
    inside = {value for chain in chains for value in _values(chain)}  # a factor of a chain is not a site of its own
    placed, skips = [], []
    for found in _placed_calls(flow):
        if isinstance(found, Skip):
            skips.append(found)
        elif not any(call.value in inside for call in found.calls):
            reason = refuse_factor(flow, found.calls)
            if reason is None:
                placed.append(found)
            else:
                site = found.site
                skips.append(Skip(site.name, site.description, reason, site.parameters, site.macs))
    skips = [*_left(flow), *skips, *(found for found in modules if isinstance(found, Skip)), *flow.broken]
    placements = sorted([*chains, *placed], key=lambda placement: placement.first)
    skips = _with_macs(flow, skips)
    skips += _unseen(flow, placements, skips)
    macs = sum(placement.site.macs for placement in placements) + sum(skip.macs for skip in skips)
    return Found(tuple(placements), tuple(skips), Totals(flow.tensors.total, macs))


def _values(placement: Placement) -> Iterator[int]:
    """Yield the values of all calls in a chain of calls."""
    chain = placement.chain
    if chain is not None and not isinstance(chain, FusableModule):
        yield from (call.value for row in chain.calls for call in row)


def _groups(flow: Flow) -> dict[Key, list[Call]]:
    """Return the calls of each weight; a tied weight has all its calls in one group."""
    groups: dict[Key, list[Call]] = defaultdict(list)
    for call in flow.calls:
        groups[flow.tensors.keys[call.weight]].append(call)
    return groups


def _placed_calls(flow: Flow) -> Iterator[Placement | Skip]:
    for key, calls in _groups(flow).items():
        yield _placed(flow, key, tuple(calls))


def _left(flow: Flow) -> list[Skip]:
    """Return the skips that the kind reported, except for weights that a call of an operator reads as well."""
    listed = {site_name(name) for key in _groups(flow) for name in flow.tensors.names[key]}
    return [left.skip for left in flow.left if left.skip.name not in listed]


def _placed(flow: Flow, key: Key, calls: tuple[Call, ...]) -> Placement | Skip:
    """Return the placement of calls that share a weight, or the skip that says why they are left alone."""
    first, names = calls[0], [site_name(name) for name in flow.tensors.names[key]]
    shapes = tuple(flow.shapes[call.source] for call in calls)
    refusal = _refuse(flow, key, calls) or _refuse_biases(flow, calls)
    words = first.operator.description
    if refusal is not None:
        macs = sum(call.operator.macs(shape) for call, shape in zip(calls, shapes, strict=True))
        return Skip(site_name(first.weight), words, refusal.reason, first.operator.parameters, macs)
    try:
        # a layer that pads or reshapes its input calls its operator on another shape; following it there may fail
        inner = tuple(flow.input_shapes[call.value] for call in calls)
    except InputError as error:
        return Skip(names[0], words, error.what, first.operator.parameters + first.surplus)
    site = Site(names[0], first.operator, inner, tuple(names[1:]), surplus=first.surplus)
    epilogue = (first.loop,) if first.loop is not None else epilogues(flow, calls) if first.last else ()
    return Placement(replace(site, epilogue=epilogue), calls)


def _refuse(flow: Flow, key: Key, calls: Sequence[Call]) -> Refusal | None:
    """Refuse a weight that something other than these calls reads, and calls that could not share one chain."""
    # the flow lists every node that reads a weight; a call may have several, if it spans several values
    own = {value for call in calls for value in (call.user, *call.inside)}
    strangers = flow.tensors.uses.get(key, frozenset()) - own
    if strangers:
        names = ", ".join(sorted(flow.labels[value] for value in strangers))
        return Refusal(f"its weight is also used by {names}")
    if any(_form(call) != _form(calls[0]) for call in calls):
        return Refusal("its weight is shared by calls that differ in more than the bias")
    if any(0 in flow.shapes[call.source] for call in calls):
        return Refusal("it is called on an empty input")
    return None


def _refuse_biases(flow: Flow, calls: Sequence[Call]) -> Refusal | None:
    """Refuse a computed bias that is not one number for each output."""
    for call in calls:
        shape = None if call.computed_bias is None else flow.shapes[call.computed_bias]
        if shape is not None and shape != (call.operator.out_channels,):
            says = ",".join(map(str, shape))
            return Refusal(f"its bias is computed by the graph, of shape ({says}), not one number for each output")
    return None


def _form(call: Call) -> tuple[object, ...]:
    """Return what calls must have in common to share one chain: everything but the tensors."""
    return (call.operator.form, call.stored, call.path is None)


def _with_macs(flow: Flow, skips: Sequence[Skip]) -> list[Skip]:
    """Fill in the MACs of skips that have none, from the values that they are about; each value counts once."""
    values = {left.skip.name: left.values for left in flow.left}
    done: set[int] = set()  # a node that reads two weights is in two skips
    found = []
    for skip in skips:
        own = [value for value in values.get(skip.name, ()) if value not in done]
        done.update(own)
        found.append(replace(skip, macs=skip.macs or sum(flow.macs[value] for value in own)))
    return found


def _unseen(flow: Flow, placements: Sequence[Placement], skips: Sequence[Skip]) -> list[Skip]:
    """Return skips for the layers that neither a site nor a skip names so far.

    A layer counts as named if its weight is tied to a named one, if a chain contains it, or if a part of it is named.
    """
    named = {name for p in placements for name in (p.site.name, *p.site.aliases)} | {skip.name for skip in skips}
    said = {flow.tensors.keys.get(f"{name}.weight") for name in named} - {None}
    chains = tuple(f"{name}." for chain in flow.chains for name in chain.names)
    found = []
    for layer in flow.layers.unseen:
        path = layer.skip.name
        # the same weight under another name has been reported there
        tied = layer.key is not None and layer.key in said
        known = tied or path in named or path.startswith(chains) or any(n.startswith(f"{path}.") for n in named)
        if known or (not layer.operator and any(path.startswith(f"{name}.") for name in named)):
            continue
        found.append(layer.skip)
    return found


def epilogues(flow: Flow, calls: tuple[Call, ...]) -> tuple[Epilogue, ...]:
    """Return the epilogue of calls: a batch norm, an activation, or a batch norm and then an activation.

    The epilogue counts only if nothing else reads the output of the calls. It is empty if the calls of one site are
    followed by different things.
    """
    found = {tuple(_after(flow, call.value)) for call in calls}
    return found.pop() if len(found) == 1 else ()


def _after(flow: Flow, value: int) -> Iterator[Epilogue]:
    user = flow.only_user(value)
    epilogue = _epilogue(flow, user)
    if isinstance(epilogue, BatchNorm):
        assert user is not None  # it has an epilogue
        yield epilogue
        epilogue = _epilogue(flow, flow.only_user(user))
    if isinstance(epilogue, Activation):
        yield epilogue


def _epilogue(flow: Flow, value: int | None) -> Epilogue | None:
    element = None if value is None else flow.at.get(value)
    return element.epilogue if isinstance(element, Other) else None
