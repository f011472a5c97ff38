"""fusable: which parts of a flow are provably one operator.

A segment (see ``segments``) is split into the longest pieces that compose to one operator. Pieces over the same weights
are one chain. For a -> b -> relu -> a' -> b', where a and a' have tied weights and so have b and b', either both pieces
become one operator with one weight, or neither does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.algebra import Conv, Operator, compose, compose_steps
from surgery.errors import Refusal
from surgery.sites.flow import Call, Flow, Key, Layers, site_name
from surgery.sites.placement import Fusable, FusableChain, FusableModule, Part, calls_of
from surgery.sites.segments import find_segments, owners, sites_of
from surgery.sites.site import Skip

__all__ = ["fusable", "is_whole_sequential"]

_UNPROVED = "neither torch.fx nor torch.export can capture the model, so nothing is known of its dataflow"
_TORN = "the steps between its factors are not known as those of one chain in this graph"


def fusable(flow: Flow, *, everything: bool = False) -> tuple[list[Fusable], list[Skip]]:
    """Return the chains that are provably one operator, and a skip for each chain that looks like one but is not.

    In a model with a record, only factored sites are fused: chains of the original model are left alone, unless
    ``everything`` is true.
    """
    modules: list[Fusable] = [FusableModule(chain) for chain in flow.chains]
    skips = list(flow.broken)
    if not flow.proved:
        return modules, skips if modules else [*skips, Skip("model", "chain", _UNPROVED)]
    pieces, refused = _find_pieces(flow, everything=everything)
    chains, bound = _chains(flow, pieces)
    skips += [*refused, *bound]
    return [*modules, *chains], [*skips, *_torn(flow, [*modules, *chains], skips)]


def _torn(flow: Flow, found: Sequence[Fusable], skips: Sequence[Skip]) -> list[Skip]:
    """Return a skip for each factored site with factors in the graph that is neither fused nor told of already."""
    fused = {site for each in found for site in each.sites}
    sites = {site for call in flow.calls for site in owners(flow, call)} - fused
    told = [name for skip in skips for name in skip.name.split(" -> ")]
    return [
        Skip(site, "chain", _TORN)
        for site in sorted(sites)
        if not any(name == site or name.startswith(f"{site}.") for name in told)
    ]


@dataclass(frozen=True, eq=False)
class _Piece:
    """Parts in a row, and the one operator that they compose to."""

    parts: tuple[Part, ...]
    operator: Operator


def _chains(flow: Flow, pieces: Sequence[_Piece]) -> tuple[list[Fusable], list[Skip]]:
    """Return one chain for all pieces over the same weights, and a skip for each chain that cannot be fused."""
    groups: dict[tuple[Key, ...], list[_Piece]] = defaultdict(list)
    for piece in pieces:
        # keys and not names, so that tied weights bring their pieces together
        groups[tuple(flow.tensors.keys[call.weight] for call in calls_of(piece.parts))].append(piece)
    chains: list[Fusable] = []
    skips = []
    for same in groups.values():
        rows = tuple(piece.parts for piece in same)
        sites = sites_of(flow, rows[0])
        refusal = _refuse_part(flow, sites, rows) or _refuse_rows(flow, rows)
        if refusal is not None:
            skips.append(Skip(sites[0], "chain", refusal.reason))
        else:
            chains.append(FusableChain(sites, rows, tuple(piece.operator for piece in same)))
    return chains, skips


def _refuse_part(flow: Flow, sites: Sequence[str], rows: Sequence[Sequence[Part]]) -> Refusal | None:
    """Refuse rows that have some of the factors of a recorded site, and not all: they are not its operator."""
    used = {flow.tensors.keys[call.weight] for row in rows for call in calls_of(row)}
    own = {flow.tensors.keys[call.weight] for call in flow.calls if owners(flow, call) & set(sites)}
    return Refusal(_TORN) if own - used else None


def _refuse_rows(flow: Flow, rows: Sequence[Sequence[Part]]) -> Refusal | None:
    """Refuse modules that cannot be fused with others, and rows over the same weights that differ in their form."""
    if flow.layers.alone and (refusal := _refuse_functions(flow.layers, rows)) is not None:
        return refusal
    paths = sorted({part.path for row in rows for part in row if part.path is not None})
    # a hook between two modules sees a value that would not exist any more
    bound = next((path for path in paths if flow.layers.bound.get(path)), None)
    if bound is not None:
        return Refusal(f"{bound} {flow.layers.bound[bound]}")
    # rows may differ in their biases, since each row gets an operator with a bias of its own
    forms = {tuple(call.operator.form.unbiased for call in calls_of(row)) for row in rows}
    if len(forms) > 1:
        return Refusal("its weights are shared by chains of different geometry")
    # fused modules are gone afterwards, so nothing else may call them
    inside = {call.value for row in rows for call in calls_of(row)}
    strangers = sorted({str(c.path) for c in flow.calls if c.path in paths and c.value not in inside})
    return Refusal(f"{', '.join(strangers)} is also called outside of the chain") if strangers else None


def _refuse_functions(layers: Layers, rows: Sequence[Sequence[Part]]) -> Refusal | None:
    """Refuse function calls in a forward, where only modules can be changed."""
    for row in rows:
        if any(part.path is None for part in row):
            return Refusal("a function in forward() is part of the chain; recompose an exported program instead")
        paths = [str(part.path) for part in row]
        if not all(isinstance(part, Call) for part in row) and not is_whole_sequential(layers, paths):
            return Refusal("its modules are not those of one nn.Sequential")
    return None


def is_whole_sequential(layers: Layers, paths: Sequence[str]) -> bool:
    """Whether these paths are all children of one container, in order, and the container is not the root."""
    parent = paths[0].rpartition(".")[0]
    return bool(parent) and layers.children.get(parent) == tuple(paths)


def _find_pieces(flow: Flow, *, everything: bool) -> tuple[list[_Piece], list[Skip]]:
    """Return the pieces of all segments that compose, and a skip for each place where a piece ends."""
    pieces: list[_Piece] = []
    skips: list[Skip] = []
    for segment in find_segments(flow):
        if flow.recorded and not everything and not set(sites_of(flow, segment)) & flow.recorded:
            place = " -> ".join(site_name(call.weight) for call in calls_of(segment))
            skips.append(Skip(place, "chain", "the original model had it (--all fuses it as well)"))
            continue
        found, refused = _partition(segment, any_padding=flow.any_padding)
        pieces += found
        skips += refused
    return pieces, skips


def _partition(parts: Sequence[Part], *, any_padding: bool) -> tuple[list[_Piece], list[Skip]]:
    """Split a segment into the longest pieces that compose, from the left; each break is a skip with its reason."""
    if all(isinstance(part, Call) for part in parts):
        return _partition_calls(calls_of(parts), any_padding=any_padding)
    pieces: list[_Piece] = []
    start = 0
    while start < len(parts):
        piece = _longest(parts[start:], any_padding=any_padding)
        if piece is not None:
            pieces.append(piece)
        # greedy from the left: the longest piece that starts here is taken, and the search goes on after it
        start += 1 if piece is None else len(piece.parts)
    return pieces, []


def _longest(parts: Sequence[Part], *, any_padding: bool) -> _Piece | None:
    """Return the longest piece that starts with the first part, has two calls or more, and composes."""
    # Every prefix is tried: that [p, q] does not compose says nothing of [p, q, r], where r may undo a reshape q.
    for end in range(len(parts), 0, -1):
        piece = parts[:end]
        # module calls and function calls cannot be one piece: modules are replaced, function calls are rewritten
        if len(calls_of(piece)) < 2 or len({part.path is None for part in piece}) > 1:
            continue
        operator = compose_steps([part.step for part in piece])
        if not isinstance(operator, Refusal) and (any_padding or _refuse(operator) is None):
            return _Piece(tuple(piece), operator)
    return None


def _partition_calls(calls: Sequence[Call], *, any_padding: bool) -> tuple[list[_Piece], list[Skip]]:
    # ``operator`` is what the calls in ``current`` compose to. Each next call either joins them or starts a new piece.
    # Example of a -> b -> c where a and b compose and (b a) and c do not: [a, b] is a piece, c starts the next one,
    # and the skip names b -> c.
    pieces: list[_Piece] = []
    skips = []
    current, operator = [calls[0]], calls[0].operator
    for call in calls[1:]:
        merged = _compose_calls(current[-1], operator, call, any_padding=any_padding)
        if isinstance(merged, Refusal):
            place = f"{site_name(current[-1].weight)} -> {site_name(call.weight)}"
            skips.append(Skip(place, "chain", merged.reason))
            pieces.append(_Piece(tuple(current), operator))
            current, operator = [call], call.operator
        else:
            current, operator = [*current, call], merged
    pieces.append(_Piece(tuple(current), operator))
    return [piece for piece in pieces if len(piece.parts) > 1], skips


def _compose_calls(last: Call, operator: Operator, call: Call, *, any_padding: bool) -> Operator | Refusal:
    if (last.path is None) != (call.path is None):
        return Refusal("one is a module and the other a function call")
    merged = compose(operator, call.operator)
    if isinstance(merged, Refusal) or any_padding:
        return merged
    return _refuse(merged) or merged


def _refuse(operator: Operator) -> Refusal | None:
    if isinstance(operator, Conv) and not operator.expressible:
        return Refusal("the padding of their composition differs between two sides of a dimension")
    return None
