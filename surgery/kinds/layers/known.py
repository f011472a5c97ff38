"""Chains that stand in a model as modules: known by what they are, wherever the model calls them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn
from torch.fx import Node

from surgery.algebra.chain import Chain
from surgery.algebra.compose import compose_steps
from surgery.algebra.operators import Operator, Shape
from surgery.errors import CheckError, Refusal
from surgery.kinds.fx.chains import ChainSpot, agrees, without_numbers
from surgery.kinds.fx.view import identity
from surgery.kinds.layers.around import inner_of_chain
from surgery.kinds.layers.factored import Factored, build_layer, chain_of, weight_names, weights
from surgery.kinds.layers.modules import replace_module, weight_of, weight_path
from surgery.kinds.layers.undo import tolerance
from surgery.sites.site import FactoredSite, Skip, describe

__all__ = ["ModuleCall", "ModuleRun", "empty_known", "find_known", "known_spots", "put_back_known"]


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of the module of a chain, at a path."""

    node: Node
    source: Node
    path: str


@dataclass(frozen=True, eq=False)
class ModuleRun:
    """A chain that is a module, or several with the same weights and a bias each; ``sites`` are all their names."""

    sites: tuple[str, ...]
    modules: tuple[Factored, ...]

    @property
    def calls(self) -> tuple[()]:
        """None that a graph would have to know."""
        return ()

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the weights of the factors."""
        return tuple(weight_names(self.modules[0], self.sites[0]))

    @property
    def parameters_before(self) -> int:
        """Number of parameters of the factors."""
        return self.chain.parameters

    @cached_property
    def chain(self) -> Chain:
        """The chain of the first module."""
        chain = chain_of(self.modules[0])
        assert isinstance(chain, Chain)  # find_known has seen to it
        return chain

    @cached_property
    def operators(self) -> tuple[Operator, ...]:
        """What each module composes to."""
        return tuple(map(_composed, self.modules))


def _composed(module: Factored) -> Operator:
    chain = chain_of(module)
    operator = chain if isinstance(chain, Refusal) else chain.compose()
    if isinstance(operator, Refusal):
        raise CheckError(f"the factors of a layer are not one operator: {operator.reason}")
    return operator


def find_known(root: nn.Module) -> tuple[list[ModuleRun], list[Skip]]:
    """Return the chains below a module, and those that were changed so that they are none any more."""
    groups: dict[tuple[Any, ...], dict[str, Factored]] = defaultdict(dict)
    skips = []
    for path, module in root.named_modules(remove_duplicate=False):
        if not isinstance(module, Factored):
            continue
        chain = chain_of(module)
        whole = chain if isinstance(chain, Refusal) else compose_steps([s.to(device="meta") for s in chain.steps])
        if isinstance(whole, Refusal):
            skips.append(Skip(path, "chain", whole.reason))
        else:
            groups[tuple(identity(weight) for weight in weights(module))][path] = module
    runs = [ModuleRun(tuple(group), tuple({id(m): m for m in group.values()}.values())) for group in groups.values()]
    return runs, skips


def put_back_known(
    root: nn.Module, run: ModuleRun, operators: Sequence[Operator], notes: MutableMapping[str, str] | None = None
) -> dict[nn.Module, nn.Module]:
    """Put the layer where each module of a run stands; return what took the place of what.

    ``notes`` gets what the user should know of it, by site.
    """
    made: dict[nn.Module, nn.Module] = {}
    for module, operator in zip(run.modules, operators, strict=True):
        layer = build_layer(module, operator)
        if notes is not None and (error := vars(module).get("surgery_error", 0.0)) > tolerance(operator.weight.dtype):
            words = "no parameters of the layer give the composed weight exactly; the relative error of the nearest is"
            notes[run.sites[0]] = f"{words} {error:.2g}"
        if made:
            path, _, leaf = weight_path(layer).rpartition(".")
            layer.get_submodule(path)._parameters[leaf] = weight_of(next(iter(made.values())))
        made[module] = layer
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if isinstance(module, Factored) and module in made:
            replace_module(root, path, made[module])
    return made


def empty_known(root: nn.Module, spot: ChainSpot) -> dict[nn.Module, nn.Module]:
    """Put layers of zeros where the modules of a chain stand; return what took the place of what."""
    operator, like = spot.site.operator, weights(spot.run.modules[0])[0]
    bias = None if operator.bias is None else like.new_zeros(operator.bias.shape)
    zeros = without_numbers(operator, like=like).with_bias(bias)
    return put_back_known(root, spot.run, [zeros] * len(spot.run.modules))


def known_spots(
    runs: Sequence[ModuleRun], calls: Sequence[ModuleCall], shape: Callable[[Node], Shape]
) -> tuple[list[ChainSpot], list[Skip]]:
    """Return the chains that are called as sites, and why others are none."""
    uses: dict[tuple[Any, ...], int] = defaultdict(int)
    for run in runs:
        for weight in weights(run.modules[0]):
            uses[identity(weight)] += 1
    by_path: Mapping[str, list[ModuleCall]] = defaultdict(list)
    for call in calls:
        by_path[call.path].append(call)
    spots, skips = [], []
    for run in runs:
        own = [call for path in run.sites for call in by_path[path]]
        found = _spot(run, own, [uses[identity(w)] for w in weights(run.modules[0])], shape)
        if isinstance(found, Skip):
            skips.append(found)
        else:
            spots.append(found)
    return spots, skips


def _spot(
    run: ModuleRun, calls: Sequence[ModuleCall], uses: Sequence[int], shape: Callable[[Node], Shape]
) -> ChainSpot | Skip:
    chain, name = run.chain, run.sites[0]
    meta = compose_steps([step.to(device="meta") for step in chain.steps])
    assert isinstance(meta, Operator)  # find_known has seen to it
    operator = without_numbers(meta, like=weights(run.modules[0])[0]).with_bias(chain.bias)
    words = f"{describe(operator)}, factored"
    within = run.modules[0].surgery_within
    shapes = tuple(shape(call.source) for call in calls)
    if within is not None:
        shapes = tuple(inner_of_chain(run.modules[0], within, shape) for shape in shapes)
    macs = sum(chain.macs(s) for s in shapes)
    if not calls:
        return Skip(name, words, "the example inputs do not reach it", chain.parameters)
    if max(uses) > 1:
        return Skip(name, words, "it shares factors with other sites; recompose it first", chain.parameters, macs)
    if chain.origin is None or not agrees(chain, operator):
        reason = "its factors are not those of a known factorization; recompose it first"
        return Skip(name, words, reason, chain.parameters, macs)
    site = FactoredSite(name, operator.to(device="meta"), shapes, run.sites[1:], chain=chain)
    return ChainSpot(site, (), run=run, item=min(calls, key=lambda call: call.node))
