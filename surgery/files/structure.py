"""The structure of factored layers, given to a dense module without numbers: from a plan, or from a record.

Nothing is captured and nothing is run: the name of a site is the path of its layer. So it works on the meta device too,
and any ``load_state_dict`` fits afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.errors import InputError, RankError, Refusal
from surgery.factorizations import Ranks, named
from surgery.kinds.layers.carried import refuse_carrying
from surgery.kinds.layers.edit import Shared, splice_modules, swap_references
from surgery.kinds.layers.factored import Factored
from surgery.kinds.layers.modules import is_operator_module, read_module, weight_of
from surgery.kinds.layers.unpacking import pack_all, unpack_all
from surgery.kinds.registry import is_model, kind_of
from surgery.sites.site import Site

__all__ = ["give_structure", "tie"]

_MOST, _LEAST = 64, 2**20  # numbers of all factors, over those of the layer, that a record may ask for; and at least

Origin = tuple[str, Ranks]


@dataclass(frozen=True, eq=False)
class _Piece:
    """A layer by all its names, and the chain that is to take its place."""

    names: tuple[str, ...]
    operator: Operator
    chain: Chain


def give_structure(model: nn.Module, sites: Mapping[str, Origin], joint: Iterable[Sequence[str]] = ()) -> nn.Module:
    """Put factors of zeros in the places of layers, by name; the sites of a group share all factors but the last.

    Nothing is changed unless everything can be.

    Raises:
        InputError: the model is a graph, has no such layer, or is factored already.
        RankError: a rank that a layer cannot take.
    """
    what = kind_of(model).refuse_structure() if is_model(model) else f"a {type(model).__name__}"
    if what is not None:
        raise InputError(
            f"{what} cannot be given a structure",
            allowed="nn.Module",
            next_step="save the graph itself, as a program",
        )
    holder = nn.ModuleList([model])
    originals = unpack_all(holder)
    root = holder[0]
    try:
        pieces = _pieces(root, sites)
        for group in joint:
            pieces = _sharing(pieces, group)
        shared: Shared = {}
        replaced: dict[nn.Module, nn.Module] = {}
        for piece in pieces.values():
            site = Site(piece.names[0], piece.operator, (), piece.names[1:])
            replaced |= splice_modules(root, site, piece.chain, shared)
        swap_references(root, replaced)
    finally:
        pack_all(holder, originals)
    return holder[0]


def _pieces(root: nn.Module, sites: Mapping[str, Origin]) -> dict[str, _Piece]:
    modules = dict(root.named_modules(remove_duplicate=False))
    layers = [name for name, module in modules.items() if is_operator_module(module)]
    if unknown := [name for name in sites if name not in modules]:
        known = ", ".join(layers[:8]) or "none: it has no such layers"
        raise InputError(f"the structure names {unknown[0]!r}, which the model does not have", allowed=known)
    pieces: dict[str, _Piece] = {}
    taken: set[str] = set()
    for name, origin in sites.items():
        if name in taken:
            continue
        operator = _operator(name, modules[name])
        weight = weight_of(modules[name])
        tied = [other for other in layers if other != name and weight_of(modules[other]) is weight]
        taken |= {name, *tied}
        pieces[name] = _Piece((name, *tied), operator, _chain(name, operator, origin))
    return pieces


def _operator(name: str, module: nn.Module) -> Operator:
    """Return the operator of a layer that can be factored."""
    if isinstance(module, Factored):
        raise InputError(f"{name} is factored already", next_step="give a fresh, dense model")
    operator = read_module(module, detached=False) if is_operator_module(module) else Refusal("it is no linear layer")
    reason = operator.reason if isinstance(operator, Refusal) else refuse_carrying(module)
    if reason is not None or isinstance(operator, Refusal):
        raise InputError(f"{name}, a {type(module).__name__}, cannot be factored: {reason}")
    return operator


def _chain(name: str, operator: Operator, origin: Origin) -> Chain:
    method, ranks = named(origin[0]), origin[1]
    refusal = method.refuse(operator)
    if refusal is not None:
        raise InputError(f"{name}: {method.name} does not fit it: {refusal.reason}")
    kernel = tuple(operator.kernel.shape)
    count = len(method.rank_names(kernel))
    if len(ranks) != count:
        raise RankError(f"{name}: {method.name} cannot take rank {ranks}", allowed=f"{count} of them")
    shapes = method.shapes(kernel, ranks)
    if sum(map(math.prod, shapes)) > _MOST * math.prod(kernel) + _LEAST:
        raise RankError(f"{name}: {method.name} at rank {ranks} is far larger than the layer", allowed="lower ranks")
    weight = operator.weight.detach()
    return replace(method.assemble(operator, [weight.new_zeros(shape) for shape in shapes], ranks), origin=origin)


def _sharing(pieces: dict[str, _Piece], group: Sequence[str]) -> dict[str, _Piece]:
    """Let the chains of a group have the same factors but for the last."""
    members = [name for name in group if name in pieces]
    if len(members) < 2:
        return pieces
    first = pieces[members[0]].chain.steps[:-1]
    new = {}
    for name in members:
        chain = pieces[name].chain
        new[name] = replace(pieces[name], chain=replace(chain, steps=(*first, chain.steps[-1])))
    return pieces | new


def tie(model: nn.Module, ties: Iterable[Sequence[str]]) -> None:
    """Let parameters of these names be one again, where they are equal."""
    for names in ties:
        first: nn.Parameter | None = None
        for name in names:
            path, _, leaf = name.rpartition(".")
            module = dict(model.named_modules(remove_duplicate=False)).get(path)
            own = None if module is None else module._parameters.get(leaf)
            if module is None or own is None:
                continue
            if first is None:
                first = own
            elif (
                own is not first
                and own.shape == first.shape
                and own.dtype == first.dtype
                and bool((own == first).all())
            ):
                module._parameters[leaf] = first
