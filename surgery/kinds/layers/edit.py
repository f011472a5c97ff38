"""Edits of a tree of modules: a chain in the place of an operator module, and one module in the place of a chain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.errors import CheckError, Refusal
from surgery.kinds.fx.items import Item, all_calls
from surgery.kinds.fx.runs import Run
from surgery.kinds.fx.view import Call, Spot
from surgery.kinds.layers.carried import CARRIED, OWN, carry, is_watched
from surgery.kinds.layers.factored import build_factored
from surgery.kinds.layers.modules import build_module, is_operator_module, replace_module
from surgery.kinds.layers.within import Within, within_of

__all__ = [
    "Replaced",
    "Shared",
    "fuse_modules",
    "is_whole_sequential",
    "refuse_hooks",
    "refuse_outside",
    "splice_modules",
    "swap_references",
]


Shared = dict[int, tuple[Tensor, nn.Parameter]]  # by the id of a factor: itself, and the parameter that it became
Replaced = dict[nn.Module, nn.Module]  # what took the place of what


def splice_modules(root: nn.Module, spot: Spot, chain: Chain, shared: Shared) -> Replaced:
    """Replace the module at each name of a site by that of its chain; tied modules share its weights, not its bias.

    A factor that is the same tensor as one of an earlier chain in ``shared`` becomes the same parameter.
    """
    made: Replaced = {}
    before, after = spot.site.operator.bias, chain.bias
    moved = None
    if before is not None and after is not None and not before.is_meta:  # a site that is cut again has no numbers
        moved = None if torch.equal(before, after) else (after - before).detach()
    for path in (spot.site.name, *spot.site.aliases):
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
        raise CheckError(f"no layer at {spot.site.name} could be replaced by its chain")
    return made


def swap_references(root: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Let attributes that hold replaced modules hold what took their place: plain lists, dicts, bound methods."""
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
        value[:] = [_swapped(item, replaced) for item in value]
    elif isinstance(value, dict):
        value.update({key: _swapped(item, replaced) for key, item in value.items()})
    elif type(value) in (tuple, set, frozenset):
        items = [_swapped(item, replaced) for item in value]
        changed = any(new is not old for new, old in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    return value


def fuse_modules(root: nn.Module, run: Run) -> Replaced:
    """Replace a run's modules by one: in the place of their nn.Sequential, or of the first of them."""
    made: dict[int, nn.Module] = {}
    replaced: Replaced = {}
    paths = {tuple(str(item.path) for item in items): i for i, items in enumerate(run.rows)}
    for modules, index in paths.items():
        parent = modules[0].rpartition(".")[0]
        new = build_module(run.operators[index], _last_module(root, run.rows[index]))
        _keep_flags(new, [root.get_submodule(path) for path in modules])
        if made:
            _share_weights(next(iter(made.values())), new)
        if is_whole_sequential(root, modules):
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
    """Let a composed parameter train if any of those that it is made of does."""
    for name, parameter in new.named_parameters(recurse=False):
        parts = [p for module in old for own, p in module.named_parameters() if own.split(".")[-1] == name]
        parameter.requires_grad_(any(part.requires_grad for part in parts))


def _last_module(root: nn.Module, items: Sequence[Item]) -> nn.Module:
    return root.get_submodule(str(all_calls(items)[-1].path))


def is_whole_sequential(root: nn.Module, paths: Sequence[str]) -> bool:
    """Whether these modules are all the children of one container below the root, in order."""
    parent = paths[0].rpartition(".")[0]
    if not parent or type(root.get_submodule(parent)) not in (nn.Sequential, nn.Module):  # fx makes plain containers
        return False
    children = [f"{parent}.{name}" for name, _ in root.get_submodule(parent).named_children()]
    return children == list(paths)


def refuse_outside(runs: Sequence[Sequence[Item]], calls: Sequence[Call]) -> Refusal | None:
    """Refuse runs whose modules are also called outside of them."""
    inside = {call.node for run in runs for call in all_calls(run)}
    paths = {call.path for run in runs for call in all_calls(run) if call.path is not None}
    strangers = sorted({str(c.path) for c in calls if c.path in paths and c.node not in inside})
    return Refusal(f"{', '.join(strangers)} is also called outside of the chain") if strangers else None


def refuse_hooks(root: nn.Module, runs: Sequence[Sequence[Item]]) -> Refusal | None:
    """Refuse runs of modules on which something is hooked, which may change the value between them."""
    paths = sorted({str(item.path) for run in runs for item in run if item.path is not None})
    watched = [path for path in paths if any(map(is_watched, root.get_submodule(path).modules()))]
    if watched:
        return Refusal(f"{watched[0]} has a hook, or a forward of its own")
    layers = [(path, root.get_submodule(path)) for path in paths]
    more = [path for path, layer in layers if is_operator_module(layer) and _has_more(layer)]
    if more:
        return Refusal(f"{more[0]} has parameters, buffers or children of its own")
    around = [path for path, layer in layers if isinstance(within_of(layer), Within)]
    return Refusal(f"{around[0]} does more than its operator") if around else None


def _has_more(layer: nn.Module) -> bool:
    """Whether anything hangs on a layer that one layer for several could not have."""
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
