"""Chains that stand in a model as modules: known by what they are, wherever the model calls them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.algebra.blank import without_numbers
from surgery.algebra.chain import Chain
from surgery.algebra.compose import compose_steps
from surgery.algebra.operators import Operator
from surgery.errors import CheckError, Refusal
from surgery.kinds.layers.factored import Factored, build_layer, chain_of, weight_names, weights
from surgery.kinds.layers.modules import replace_module, weight_of, weight_path
from surgery.kinds.layers.tensors import key_of
from surgery.kinds.layers.undo import tolerance
from surgery.sites.flow import ModuleChain
from surgery.sites.site import Skip

__all__ = ["Known", "empty_known", "find_known", "put_back_known"]


@dataclass(frozen=True, eq=False)
class Known:
    """A chain that is a module, or several with the same weights and a bias each, with the modules by path."""

    chain: ModuleChain
    modules: Mapping[str, Factored]

    @property
    def each(self) -> tuple[Factored, ...]:
        """Each module once."""
        return tuple({id(module): module for module in self.modules.values()}.values())


def find_known(root: nn.Module) -> tuple[list[Known], tuple[Skip, ...]]:
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


def put_back_known(
    root: nn.Module, known: Known, operators: Sequence[Operator], notes: MutableMapping[str, str] | None = None
) -> dict[nn.Module, nn.Module]:
    """Put the layer where each module of a chain stands; return what took the place of what.

    ``notes`` gets what the user should know of it, by site.
    """
    made: dict[nn.Module, nn.Module] = {}
    for module, operator in zip(known.each, operators, strict=True):
        layer = build_layer(module, operator)
        if notes is not None and (error := vars(module).get("surgery_error", 0.0)) > tolerance(operator.weight.dtype):
            words = "no parameters of the layer give the composed weight exactly; the relative error of the nearest is"
            notes[known.chain.names[0]] = f"{words} {error:.2g}"
        if made:
            path, _, leaf = weight_path(layer).rpartition(".")
            layer.get_submodule(path)._parameters[leaf] = weight_of(next(iter(made.values())))
        made[module] = layer
    for path, module in list(root.named_modules(remove_duplicate=False)):
        if isinstance(module, Factored) and module in made:
            replace_module(root, path, made[module])
    return made


def empty_known(root: nn.Module, known: Known, operator: Operator) -> dict[nn.Module, nn.Module]:
    """Put layers of zeros where the modules of a chain stand, of the form of an operator; return what replaced what."""
    like = weights(known.each[0])[0]
    bias = None if operator.bias is None else like.new_zeros(operator.bias.shape)
    zeros = without_numbers(operator, like=like).with_bias(bias)
    return put_back_known(root, known, [zeros] * len(known.each))
