"""Edits of a tree of modules: they replace an operator module by a chain, and a chain by one module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from surgery.algebra import Chain, Operator, compose_steps, without_numbers
from surgery.errors import CheckError, Refusal
from surgery.kinds.layers.carried import CARRIED, OWN, carry, is_watched
from surgery.kinds.layers.factored import Factored, build_factored, build_layer, chain_of, weight_names, weights
from surgery.kinds.layers.modules import build_module, is_operator_module, replace_module, weight_of, weight_path
from surgery.kinds.layers.tensors import key_of
from surgery.kinds.layers.undo import tolerance
from surgery.kinds.layers.within import Within, within_of
from surgery.sites import FusableChain, Layers, ModuleChain, Part, Site, Skip, Unseen, calls_of, is_whole_sequential
from surgery.system.importing import Lazy

__all__ = [
    "Known",
    "Replaced",
    "Shared",
    "empty_known",
    "find_known",
    "fuse_modules",
    "layers_of",
    "restore_known",
    "splice_modules",
    "swap_references",
]


Shared = dict[int, tuple[Tensor, nn.Parameter]]  # id of a factor -> the factor (so that it lives) and its parameter
Replaced = dict[nn.Module, nn.Module]  # old module -> the module that took its place


def splice_modules(root: nn.Module, site: Site, chain: Chain, shared: Shared) -> Replaced:
    """Replace the module at each name of a site by the module of its chain, and return the replacements.

    Tied modules share the chain's weights; each keeps its own bias. A factor that is the same tensor as a factor of an
    earlier chain in ``shared`` becomes the same parameter.

    Raises:
        CheckError: there is no operator module at any name of the site.
    """
    made: Replaced = {}
    # A fit to data may have moved the bias. Tied modules have a bias each, and all of them move by the same difference.
    before, after = site.operator.bias, chain.bias
    moved = None
    if before is not None and after is not None and not before.is_meta:  # a chain that is cut has no numbers yet
        moved = None if torch.equal(before, after) else (after - before).detach()
    # aliases may name one module twice, or several modules with a tied weight: each module gets one chain
    for path in (site.name, *site.aliases):
        module = root.get_submodule(path)
        if not is_operator_module(module):
            continue
        if module not in made:
            new = build_factored(chain, module, moved)
            if made:
                _share_weights(next(iter(made.values())), new)
            else:
                _share_factors(new, chain, shared)
            made[module] = new
        replace_module(root, path, made[module])
    if not made:
        raise CheckError(f"no layer at {site.name} could be replaced by its chain")
    return made


def swap_references(root: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Update attributes that hold replaced modules, also in lists, dicts, partial functions and bound methods."""
    for module in list(root.modules()) if replaced else ():
        own = vars(module)
        for name, value in list(own.items()):
            if name not in CARRIED:
                swapped = _swapped(value, replaced)
                if swapped is not value:
                    own[name] = swapped


def _swapped(value: Any, replaced: Mapping[nn.Module, nn.Module]) -> Any:
    if isinstance(value, nn.Module):
        return replaced.get(value, value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and value.__self__ in replaced:
        return getattr(replaced[value.__self__], value.__name__, value)
    if isinstance(value, partial):
        inner, given, named = (_swapped(part, replaced) for part in (value.func, value.args, dict(value.keywords)))
        return value if inner is value.func and given is value.args else partial(inner, *given, **named)
    if isinstance(value, list):
        # lists and dicts change in place, since other objects may hold them; tuples and sets are made anew
        value[:] = [_swapped(item, replaced) for item in value]
    elif isinstance(value, dict):
        value.update({key: _swapped(item, replaced) for key, item in value.items()})
    elif type(value) in (tuple, set, frozenset):
        items = [_swapped(item, replaced) for item in value]
        changed = any(new is not old for new, old in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    return value


def fuse_modules(root: nn.Module, chain: FusableChain, layers: Layers) -> Replaced:
    """Replace the modules of each row of a chain by one module, and return the replacements.

    If the modules are a whole nn.Sequential, the new module replaces it. Otherwise it replaces the first module, and
    the other modules become nn.Identity.
    """
    made: dict[int, nn.Module] = {}
    replaced: Replaced = {}
    paths = {tuple(str(part.path) for part in row): i for i, row in enumerate(chain.rows)}
    for modules, index in paths.items():
        parent = modules[0].rpartition(".")[0]
        new = build_module(chain.operators[index], _last_module(root, chain.rows[index]))
        _keep_flags(new, [root.get_submodule(path) for path in modules])
        if made:
            _share_weights(next(iter(made.values())), new)
        # the container goes with its children, and its hooks and attributes go to the new module
        if is_whole_sequential(layers, modules):
            old = root.get_submodule(parent)
            carry(new, old, own=old._modules)
            for alias, module in list(root.named_modules(remove_duplicate=False)):
                if module is old:
                    replace_module(root, alias, new)
            replaced[old] = new
        else:
            replaced[root.get_submodule(modules[0])] = new
            replace_module(root, modules[0], new)
            for path in modules[1:]:
                identity = nn.Identity()
                replaced[root.get_submodule(path)] = identity
                replace_module(root, path, identity)
        made[index] = new
    return replaced


def _keep_flags(new: nn.Module, old: Sequence[nn.Module]) -> None:
    """Let a composed parameter train if any of the parameters that it is composed of trains."""
    for name, parameter in new.named_parameters(recurse=False):
        # the last word of a name is "weight" or "bias"
        parts = [p for module in old for own, p in module.named_parameters() if own.split(".")[-1] == name]
        parameter.requires_grad_(any(part.requires_grad for part in parts))


def _last_module(root: nn.Module, row: Sequence[Part]) -> nn.Module:
    return root.get_submodule(str(calls_of(row)[-1].path))


def layers_of(root: nn.Module, *, alone: bool = False, unseen: tuple[Unseen, ...] = ()) -> Layers:
    """Return what a flow says about the modules below a root, by path."""
    modules = dict(root.named_modules(remove_duplicate=False))
    plain = {path: module for path, module in modules.items() if type(module) in (nn.Sequential, nn.Module)}
    children = {
        path: tuple(f"{path}.{name}" for name, _ in module.named_children()) for path, module in plain.items() if path
    }
    return Layers(children, Lazy(modules, lambda path: _bound(modules[path])), alone, unseen)


def _bound(module: nn.Module) -> str | None:
    """Return why a module cannot be fused with others, or None."""
    if any(map(is_watched, module.modules())):
        return "has a hook, or a forward of its own"
    if is_operator_module(module) and _has_more(module):
        return "has parameters, buffers or children of its own"
    return "does more than its operator" if isinstance(within_of(module), Within) else None


def _has_more(layer: nn.Module) -> bool:
    """Whether a layer has buffers, children or parameters that a fused layer could not have."""
    return bool(layer._buffers or layer._modules or set(layer._parameters) - OWN)


def _share_factors(factored: nn.Module, chain: Chain, shared: Shared) -> None:
    for place, part in chain.places:
        if isinstance(part, Operator):
            module = factored.get_submodule(place)
            own = module.get_parameter("weight")
            module._parameters["weight"] = shared.setdefault(id(part.weight), (part.weight, own))[1]


def _share_weights(source: nn.Module, target: nn.Module) -> None:
    for shared, own in zip(source.modules(), target.modules(), strict=False):
        if "weight" in shared._parameters and "weight" in own._parameters:
            own._parameters["weight"] = shared._parameters["weight"]


@dataclass(frozen=True, eq=False)
class Known:
    """A chain that stands as one module, or as several with the same weights and a bias each; the modules by path."""

    chain: ModuleChain
    modules: Mapping[str, Factored]

    @property
    def each(self) -> tuple[Factored, ...]:
        """Each module once."""
        return tuple({id(module): module for module in self.modules.values()}.values())


def find_known(root: nn.Module) -> tuple[list[Known], tuple[Skip, ...]]:
    """Return the chains below a module, and skips for modules that were changed and are not chains any more."""
    groups: dict[tuple[Any, ...], dict[str, Factored]] = defaultdict(dict)
    skips = []
    for path, module in root.named_modules(remove_duplicate=False):
        if not isinstance(module, Factored):
            continue
        chain = chain_of(module)
        # on the meta device composing costs nothing, and it refuses just the chains that would be refused later
        whole = chain if isinstance(chain, Refusal) else compose_steps([s.to(device="meta") for s in chain.steps])
        if isinstance(whole, Refusal):
            skips.append(Skip(path, "chain", whole.reason))
        else:
            groups[tuple(key_of(weight) for weight in weights(module))][path] = module
    return [_known(keys, modules) for keys, modules in groups.items()], tuple(skips)


def _known(keys: tuple[Any, ...], modules: Mapping[str, Factored]) -> Known:
    first = next(iter(modules))
    each = {id(module): module for module in modules.values()}.values()
    chain = ModuleChain(tuple(modules), tuple(map(_chain, each)), tuple(weight_names(modules[first], first)), keys)
    return Known(chain, modules)


def _chain(module: Factored) -> Chain:
    chain = chain_of(module)
    if isinstance(chain, Refusal):
        raise CheckError(f"a factored layer is not a chain: {chain.reason}")
    return chain


def restore_known(
    root: nn.Module, known: Known, operators: Sequence[Operator], notes: MutableMapping[str, str] | None = None
) -> dict[nn.Module, nn.Module]:
    """Replace each module of a chain by the layer of its operator, and return the replacements.

    If the layer's parameters cannot give the operator's weight exactly, ``notes`` gets a note for the user, by site.
    """
    made: dict[nn.Module, nn.Module] = {}
    for module, operator in zip(known.each, operators, strict=True):
        layer = build_layer(module, operator)
        if notes is not None and (error := vars(module).get("surgery_error", 0.0)) > tolerance(operator.weight.dtype):
            words = "no parameters of the layer give the composed weight exactly; the relative error of the nearest is"
            notes[known.chain.names[0]] = f"{words} {error:.2g}"
        if made:
            # tied layers are made one by one, and then share the weight of the first
            path, _, leaf = weight_path(layer).rpartition(".")
            layer.get_submodule(path)._parameters[leaf] = weight_of(next(iter(made.values())))
        made[module] = layer
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if isinstance(module, Factored) and module in made:
            replace_module(root, path, made[module])
    return made


def empty_known(root: nn.Module, known: Known, operator: Operator) -> dict[nn.Module, nn.Module]:
    """Replace the modules of a chain by layers of zeros of the form of an operator, and return the replacements."""
    like = weights(known.each[0])[0]
    bias = None if operator.bias is None else like.new_zeros(operator.bias.shape)
    zeros = without_numbers(operator, like=like).with_bias(bias)
    return restore_known(root, known, [zeros] * len(known.each))
