"""Edits of a tree of modules: a chain in the place of an operator module, and one module in the place of a chain."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from surgery.chain import Chain
from surgery.errors import Refusal
from surgery.graphs.items import Item, all_calls
from surgery.graphs.modules import build_module, build_sequential, carry_hooks, is_operator_module, replace_module
from surgery.graphs.runs import Run
from surgery.graphs.view import Call, Spot
from surgery.operators import Operator

__all__ = ["FACTORED", "ORIGIN", "Shared", "fuse_modules", "is_whole_sequential", "refuse_outside", "splice_modules"]


ORIGIN = "surgery_origin"  # set beside it: the factorization and its ranks
FACTORED = "surgery_factored"  # set on the nn.Sequential that stands for a factored module: the class of that module


Shared = dict[int, tuple[Tensor, nn.Parameter]]  # by the id of a factor: itself, and the parameter that it became


def splice_modules(root: nn.Module, spot: Spot, chain: Chain, shared: Shared) -> None:
    """Replace the module at each name of a site by an nn.Sequential; tied modules share its weights, not its bias.

    A factor that is the same tensor as one of an earlier chain in ``shared`` becomes the same parameter.
    """
    made: dict[int, nn.Sequential] = {}
    for path in (spot.site.name, *spot.site.aliases):
        module = root.get_submodule(path)
        if not is_operator_module(module):
            continue
        if id(module) not in made:
            bias = module._parameters.get("bias")
            new = build_sequential(chain.with_bias(bias), module)
            setattr(new, FACTORED, type(module))
            setattr(new, ORIGIN, chain.origin)
            if made:
                _share_weights(next(iter(made.values())), new)
            else:
                _share_factors(new, chain, shared)
            made[id(module)] = new
        replace_module(root, path, made[id(module)])


def fuse_modules(root: nn.Module, run: Run) -> None:
    """Replace a run's modules by one: in the place of their nn.Sequential, or of the first of them."""
    made: dict[int, nn.Module] = {}
    paths = {tuple(str(item.path) for item in items): i for i, items in enumerate(run.rows)}
    for modules, index in paths.items():
        parent = modules[0].rpartition(".")[0]
        whole = is_whole_sequential(root, modules)
        kind = getattr(root.get_submodule(parent), FACTORED, None) if whole else None
        new = build_module(run.operators[index], _last_module(root, run.rows[index]), kind=kind)
        if made:
            _share_weights(next(iter(made.values())), new)
        if whole:
            old = root.get_submodule(parent)
            carry_hooks(new, old)
            for alias, module in list(root.named_modules(remove_duplicate=False)):
                if module is old:
                    replace_module(root, alias, new)
        else:
            replace_module(root, modules[0], new)
            for path in modules[1:]:
                replace_module(root, path, nn.Identity())
        made[index] = new


def _last_module(root: nn.Module, items: Sequence[Item]) -> nn.Module:
    return root.get_submodule(str(all_calls(items)[-1].path))


def is_whole_sequential(root: nn.Module, paths: Sequence[str]) -> bool:
    """Whether these modules are all the children of one nn.Sequential below the root, in order."""
    parent = paths[0].rpartition(".")[0]
    if not parent or type(root.get_submodule(parent)) is not nn.Sequential:
        return False
    children = [f"{parent}.{name}" for name, _ in root.get_submodule(parent).named_children()]
    return children == list(paths)


def refuse_outside(runs: Sequence[Sequence[Item]], calls: Sequence[Call]) -> Refusal | None:
    """Refuse runs whose modules are also called outside of them."""
    inside = {call.node for run in runs for call in all_calls(run)}
    paths = {call.path for run in runs for call in all_calls(run) if call.path is not None}
    strangers = sorted({str(c.path) for c in calls if c.path in paths and c.node not in inside})
    return Refusal(f"{', '.join(strangers)} is also called outside of the chain") if strangers else None


def _share_factors(sequential: nn.Sequential, chain: Chain, shared: Shared) -> None:
    for place, part in chain.places:
        if isinstance(part, Operator):
            module = sequential.get_submodule(place)
            module.weight = shared.setdefault(id(part.weight), (part.weight, module.get_parameter("weight")))[1]


def _share_weights(source: nn.Module, target: nn.Module) -> None:
    for shared, own in zip(source.modules(), target.modules(), strict=True):
        if "weight" in shared._parameters:
            own.weight = shared.weight
