"""Give a dense module the structure of a factored one, from a plan or a record; the factors are zeros.

A site's name is the path of its layer, so no graph is captured and nothing is run. This works on the meta device too.
Afterwards, ``load_state_dict`` takes the weights of the factored model. ``record_of`` is the record that a factored
module gives for this.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from surgery.algebra import Chain, Operator
from surgery.errors import InputError, RankError, Refusal
from surgery.factorizations import named
from surgery.kinds.layers.carried import refuse_carrying
from surgery.kinds.layers.edit import Shared, splice_modules, swap_references
from surgery.kinds.layers.factored import Factored
from surgery.kinds.layers.modules import is_operator_module, read_module, weight_of
from surgery.kinds.layers.tensors import key_of
from surgery.kinds.layers.unpacking import pack_all, unpack_all
from surgery.kinds.registry import is_model, kind_of
from surgery.sites import Entry, Origin, Record, Site

__all__ = ["give_structure", "record_of", "tie"]

_MOST, _LEAST = 64, 2**20  # a layer may get 64 times its own numbers in factors, and 2^20 more


@dataclass(frozen=True, eq=False)
class _Replacement:
    """A layer by all its names, and the chain that will replace it."""

    names: tuple[str, ...]
    operator: Operator
    chain: Chain


def give_structure(model: nn.Module, sites: Mapping[str, Origin], joint: Iterable[Sequence[str]] = ()) -> nn.Module:
    """Replace layers by factors of zeros, in place, and return the model, which is new if it is itself a layer.

    ``sites`` maps the names of layers to (factorization, ranks). The sites of each ``joint`` group share all factors
    but the last. Either all layers are replaced, or nothing is changed.

    Raises:
        InputError: the model is a graph, lacks a layer, or has one that is factored already or cannot be factored.
        RankError: a layer cannot take its rank.
    """
    what = kind_of(model).refuse_structure() if is_model(model) else f"a {type(model).__name__}"
    if what is not None:
        raise InputError(
            f"{what} cannot be given a structure",
            allowed="nn.Module",
            next_step="save the graph itself, as a program",
        )
    # The holder lets a model that is itself a layer be replaced. Packed layers, such as attention, are unpacked into
    # plain ones, and packed again at the end. Everything is checked and built before the first layer is spliced in.
    holder = nn.ModuleList([model])
    originals = unpack_all(holder)
    root = holder[0]
    try:
        replacements = _replacements(root, sites)
        for group in joint:
            replacements = _sharing(replacements, group)
        shared: Shared = {}
        replaced: dict[nn.Module, nn.Module] = {}
        for replacement in replacements.values():
            site = Site(replacement.names[0], replacement.operator, (), replacement.names[1:])
            replaced |= splice_modules(root, site, replacement.chain, shared)
        swap_references(root, replaced)
    finally:
        pack_all(holder, originals)
    return holder[0]


def _replacements(root: nn.Module, sites: Mapping[str, Origin]) -> dict[str, _Replacement]:
    modules = dict(root.named_modules(remove_duplicate=False))
    layers = [name for name, module in modules.items() if is_operator_module(module)]
    if unknown := [name for name in sites if name not in modules]:
        known = ", ".join(layers[:8]) or "none: it has no layers to factor"
        raise InputError(f"the structure names {unknown[0]!r}, which the model does not have", allowed=known)
    replacements: dict[str, _Replacement] = {}
    taken: set[str] = set()
    for name, origin in sites.items():
        if name in taken:
            continue
        operator = _operator(name, modules[name])
        weight = weight_of(modules[name])
        # Layers with one weight get one chain, so that they stay tied.
        tied = [other for other in layers if other != name and weight_of(modules[other]) is weight]
        taken |= {name, *tied}
        replacements[name] = _Replacement((name, *tied), operator, _chain(name, operator, origin))
    return replacements


def _operator(name: str, module: nn.Module) -> Operator:
    """Return the operator of a layer; raises InputError if the layer cannot be factored."""
    if isinstance(module, Factored):
        raise InputError(f"{name} is factored already", next_step="give a fresh, dense model")
    operator = (
        read_module(module, detached=False) if is_operator_module(module) else Refusal("it is not a linear layer")
    )
    reason = operator.reason if isinstance(operator, Refusal) else refuse_carrying(module)
    if reason is not None or isinstance(operator, Refusal):
        raise InputError(f"{name}, a {type(module).__name__}, cannot be factored: {reason}")
    return operator


def _chain(name: str, operator: Operator, origin: Origin) -> Chain:
    method, ranks = named(origin[0]), origin[1]
    refusal = method.refuse(operator)
    if refusal is not None:
        raise InputError(f"{name}: {method.name} does not apply: {refusal.reason}")
    kernel = tuple(operator.kernel.shape)
    count = len(method.rank_names(kernel))
    if len(ranks) != count:
        raise RankError(f"{name}: {method.name} cannot take rank {ranks}", allowed=f"{count} of them")
    shapes = method.shapes(kernel, ranks)
    if sum(map(math.prod, shapes)) > _MOST * math.prod(kernel) + _LEAST:
        raise RankError(f"{name}: {method.name} at rank {ranks} is far larger than the layer", allowed="lower ranks")
    weight = operator.weight.detach()
    return replace(method.assemble(operator, [weight.new_zeros(shape) for shape in shapes], ranks), origin=origin)


def _sharing(replacements: dict[str, _Replacement], group: Sequence[str]) -> dict[str, _Replacement]:
    """Return the replacements in which the chains of a group have the same factors except the last."""
    members = [name for name in group if name in replacements]
    if len(members) < 2:
        return replacements
    first = replacements[members[0]].chain.steps[:-1]
    new = {}
    for name in members:
        chain = replacements[name].chain
        new[name] = replace(replacements[name], chain=replace(chain, steps=(*first, chain.steps[-1])))
    return replacements | new


def tie(model: nn.Module, ties: Iterable[Sequence[str]]) -> None:
    """Make the parameters of each group of names one parameter again, if their values are equal."""
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


def record_of(model: nn.Module) -> Record:
    """Return the record of a module: its factored layers by name, and the groups of parameters that are tied."""
    sites = {
        name: Entry(module.surgery_origin)
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Factored) and module.surgery_origin is not None
    }
    groups: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[key_of(parameter)].append(name)
    return Record(sites, tuple(tuple(names) for names in groups.values() if len(names) > 1))
