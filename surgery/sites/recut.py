"""recut: chains in a flow whose factorization and ranks are known, as sites that may be cut to lower ranks.

The record has the factorization and the ranks of a chain. It counts only if the graph agrees with it: the parts of the
chain must be exactly the steps that this factorization, at these ranks, makes of the operator that the parts compose
to. Comparing shapes is enough; no weight is composed.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from surgery.algebra.chain import Chain, without_numbers
from surgery.algebra.compose import compose_steps
from surgery.algebra.operators import Operator
from surgery.algebra.steps import Shift, Step
from surgery.errors import Refusal
from surgery.factorizations import FACTORIZATIONS, named
from surgery.sites.flow import Call, Flow, Key, ModuleChain, Origin
from surgery.sites.placement import FusableChain, FusableModule, Part, Placement, calls_of
from surgery.sites.segments import find_segments, owners, sites_of
from surgery.sites.site import FactoredSite, Skip

__all__ = ["agrees", "placed_chain", "placed_chains", "refuse_factor"]


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
            shapes = tuple(flow.shapes[row[0].source] for row in rows)
            loop = calls_of(rows[0])[0].loop
            epilogue = () if loop is None else (loop,)
            site = FactoredSite(sites[0], operators[0].to(device="meta"), shapes, sites[1:], epilogue, chain=chain)
            cut = tuple(tuple(row[:end]) for row in rows)
            return Placement(site, (), FusableChain(sites, cut, tuple(operators)))
    return None


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
    return [_form(step) for step in made.steps] == [_form(step) for step in chain.steps]


def _form(step: Step) -> tuple[object, ...]:
    """Return the form of a step: the kernel shapes and geometries of its operators; for a reshape, the step itself."""
    operators = Chain((step,)).operators
    kernels = [tuple(operator.kernel.shape) for operator in operators]
    geometries = [getattr(operator, "geometry", None) for operator in operators]
    return (type(step), kernels, geometries, None if kernels or isinstance(step, Shift) else step)
