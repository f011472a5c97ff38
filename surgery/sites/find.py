"""Find the sites of a flow: calls of operators, and chains in it that can be cut to lower ranks.

The record has the factorization and the ranks of a chain. It counts only if the graph agrees with it: the parts of the
chain must be exactly the steps that this factorization, at these ranks, makes of the operator that the parts compose
to. Comparing shapes is enough; no weight is composed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from surgery.algebra import Chain, Operator, Shape, Shift, Step, compose_steps, without_numbers
from surgery.errors import InputError, Refusal
from surgery.factorizations import FACTORIZATIONS, named
from surgery.sites.flow import Call, Flow, Key, ModuleChain, Origin, Other, site_name
from surgery.sites.placement import Found, FusableChain, FusableModule, Part, Placement, calls_of
from surgery.sites.segments import find_segments, owners, sites_of
from surgery.sites.site import Activation, BatchNorm, Epilogue, FactoredSite, Site, Skip, Totals

__all__ = ["agrees", "epilogues", "find", "placed_chain", "placed_chains", "refuse_factor"]


def placed_chains(flow: Flow) -> list[Placement]:
    """Return the placements of all chains of calls whose origin is known and whose factors no other site shares."""
    if not flow.origins:
        return []
    groups: dict[tuple[Key, ...], list[list[Part]]] = defaultdict(list)
    for segment in find_segments(flow):
        groups[tuple(flow.tensors.keys[call.weight] for call in calls_of(segment))].append(segment)
    found = (_placed_rows(flow, keys, rows) for keys, rows in groups.items())
    return [placement for placement in found if placement is not None]


def _placed_rows(flow: Flow, keys: tuple[Key, ...], rows: Sequence[list[Part]]) -> Placement | None:
    sites = sites_of(flow, rows[0])
    origin = flow.origins.get(sites[0])
    own = {call.user for row in rows for call in calls_of(row)}
    # a factor that something else reads must not be cut; ``refuse_factor`` says so
    if origin is None or any(flow.tensors.uses.get(key, frozenset()) - own for key in keys):
        return None
    # The reshapes after the last factor may belong to the chain or to the model. So the longest row is tried first, and
    # then rows with fewer and fewer of these reshapes: for conv, conv, flatten the ends are 3 and 2.
    least = max(at for at, part in enumerate(rows[0]) if part.calls) + 1
    for end in range(len(rows[0]), least - 1, -1):
        chain = Chain(tuple(part.step for part in rows[0][:end]), origin)
        operators = [operator for row in rows if (operator := _operator(row[:end])) is not None]
        if len(operators) == len(rows) and agrees(chain, operators[0]):
            shapes = tuple(_input_shape(flow, row) for row in rows if flow.running(calls_of(row)))
            if not shapes:
                return None
            loop = calls_of(rows[0])[0].loop
            epilogue = () if loop is None else (loop,)
            site = FactoredSite(sites[0], operators[0].to(device="meta"), shapes, sites[1:], epilogue, chain=chain)
            cut = tuple(tuple(row[:end]) for row in rows)
            return Placement(site, (), FusableChain(sites, cut, tuple(operators)))
    return None


def _input_shape(flow: Flow, row: Sequence[Part]) -> Shape:
    """Return the shape of what a row reads; in a loop, that of all steps."""
    shape, first = flow.shapes[row[0].source], calls_of(row)[0]
    if first.loop is None:
        return shape
    # Example of 6 steps of (2, 16): the call reads (6, 2, 16), and the axes before those of one step come first.
    whole, step = flow.input_shapes[first.value], flow.shapes[first.source]
    return (*whole[: len(whole) - len(step)], *shape)


def refuse_factor(flow: Flow, calls: Sequence[Call]) -> str | None:
    """Return why calls are left alone that are factors of a site, but of no chain that can be cut; None for others."""
    sites = sorted({site for call in calls for site in owners(flow, call)})
    if len(sites) > 1:
        return f"it is a factor that {' and '.join(sites)} share; recompose them first"
    if not sites:
        return None
    if sites[0] in flow.origins:
        return f"it is a factor of {sites[0]}, which cannot be cut as it stands; recompose it first"
    return f"it is a factor of {sites[0]}, and nothing says what made that; recompose it first"


def _operator(parts: Sequence[Part]) -> Operator | None:
    """Return the operator that a row composes to, without the weight's numbers but with its bias.

    It is None if the row does not compose, or if a part before the last has a bias.
    """
    meta = compose_steps([part.step.to(device="meta") for part in parts])
    biases = [call.operator.bias for call in calls_of(parts)[:-1]]
    if isinstance(meta, Refusal) or any(bias is not None for bias in biases):
        return None
    bias = Chain(tuple(part.step for part in parts)).bias
    return without_numbers(meta, like=calls_of(parts)[0].operator.weight).with_bias(bias)


def placed_chain(flow: Flow, made: ModuleChain) -> Placement | Skip:
    """Return the placement of a chain that stands as a module, or the skip that says why it cannot be cut."""
    chain, name = made.chains[0], made.names[0]
    meta = compose_steps([step.to(device="meta") for step in chain.steps])
    assert isinstance(meta, Operator)  # else the kind would have called it broken
    operator = without_numbers(meta, like=chain.operators[0].weight).with_bias(chain.bias)
    words = f"{operator.description}, factored"
    if not made.calls:
        return Skip(name, words, "the example inputs do not reach it", chain.parameters)
    shapes = tuple(flow.input_shapes[value] for value in made.calls)
    macs = sum(chain.macs(shape) for shape in shapes)
    # the chains of a joint site share their first factors; cutting one of them would untie these
    if max(Counter(key for other in flow.chains for key in other.keys)[key] for key in made.keys) > 1:
        return Skip(name, words, "it shares factors with other sites; recompose it first", chain.parameters, macs)
    if chain.origin is None or not agrees(chain, operator):
        reason = "its factors are not those of a known factorization; recompose it first"
        return Skip(name, words, reason, chain.parameters, macs)
    epilogue = () if made.loop is None else (made.loop,)
    site = FactoredSite(name, operator.to(device="meta"), shapes, made.names[1:], epilogue, chain=chain)
    return Placement(site, (), FusableModule(made))


def agrees(chain: Chain, operator: Operator) -> bool:
    """Whether the chain has exactly the steps that its origin, a factorization at some ranks, makes of the operator."""
    origin: Origin = chain.origin or ("", ())
    name, ranks = origin
    if name not in FACTORIZATIONS or named(name).refuse(operator) is not None:
        return False
    if len(ranks) != len(named(name).rank_names(tuple(operator.kernel.shape))):
        return False
    # a skeleton is the chain without numbers, so this comparison costs next to nothing
    made = named(name).skeleton(operator, ranks)
    return [_step_form(step) for step in made.steps] == [_step_form(step) for step in chain.steps]


def _step_form(step: Step) -> tuple[object, ...]:
    """Return the form of a step: the kernel shapes and geometries of its operators; for a reshape, the step itself."""
    operators = Chain((step,)).operators
    kernels = [tuple(operator.kernel.shape) for operator in operators]
    geometries = [getattr(operator, "geometry", None) for operator in operators]
    return (type(step), kernels, geometries, None if kernels or isinstance(step, Shift) else step)


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
    # Each node's MACs are counted once, in a site or in a skip, so that the totals are those of the model.
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
    running = flow.running(calls)
    refusal = _refuse(flow, key, calls) or _refuse_biases(flow, calls)
    words = first.operator.description
    if refusal is not None:
        macs = sum(call.operator.macs(flow.shapes[call.source]) for call in running)
        return Skip(site_name(first.weight), words, refusal.reason, first.operator.parameters, macs)
    try:
        # a layer that pads or reshapes its input calls its operator on another shape; following it there may fail
        inner = tuple(flow.input_shapes[call.value] for call in running or calls)
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
        if len({_form(call)[1:] for call in calls}) == len({call.operator.form.unbiased for call in calls}) == 1:
            return Refusal("its weight is shared by calls with a bias and calls without one")
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
    return (call.operator.form, call.stored, call.view, call.path is None)


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
