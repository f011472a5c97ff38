"""Factored sites of a module that trains: which parameters stand for which weight, and how they compose.

The plan and the dense module determine both. ``build`` gives a module the structure of a plan with factors of zeros,
for a checkpoint to fill; ``read_sites`` returns the record of that structure. Both need shapes only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from surgery.algebra import Branches, Chain, Layout, Operator, Shift, Step
from surgery.errors import CheckError, InputError, Refusal
from surgery.factorizations import Ranks, named
from surgery.kinds.inputs import normalise_inputs
from surgery.kinds.layers.modules import stored_as
from surgery.passes.original import Original
from surgery.plans.plan import Plan
from surgery.sites import Site
from surgery.training.transport import Compose

__all__ = [
    "TrainedSite",
    "balance",
    "build",
    "factored_parameters",
    "has_dense",
    "layouts",
    "read_sites",
    "with_weights",
]


@dataclass(frozen=True, eq=False)
class TrainedSite:
    """One factored site: its chain without values, the paths of its factors, and all names of the site.

    ``names`` are the site's name and its aliases. ``places`` has the path of each factor's module below any of these
    names, and ``shift`` the path of the bias. ``stored`` is the layout in which the dense module stores its weight.
    """

    names: tuple[str, ...]
    chain: Chain
    places: tuple[str, ...]
    shift: str
    stored: Layout

    def bind(self, root: nn.Module) -> tuple[list[nn.Parameter], Compose]:
        """Return the factors' weights in a module, and a function that composes such weights to the dense weight.

        Both stay valid after the module is recomposed. The weights, factors and dense alike, have the layout in which
        their modules store them. The function is differentiable.
        """
        parameters, fill = self.bind_chain(root)

        def compose(weights: Sequence[Tensor]) -> Tensor:
            operator = fill(weights).compose()
            if isinstance(operator, Refusal):
                raise CheckError(f"the factors of {self.names[0]} are not one operator: {operator.reason}")
            return operator.weight.mT if self.stored == "in_out" else operator.weight

        return parameters, compose

    def bind_chain(self, root: nn.Module) -> tuple[list[nn.Parameter], Callable[[Sequence[Tensor]], Chain]]:
        """Return the factors' weights in a module, and a function that puts such weights into a chain without bias."""
        modules: list[Any] = [root.get_submodule(f"{self.names[0]}.{place}") for place in self.places]
        layouts = [stored_as(type(module)) for module in modules]

        def fill(weights: Sequence[Tensor]) -> Chain:
            turned = (w.mT if layout == "in_out" else w for w, layout in zip(weights, layouts, strict=True))
            return with_weights(self.chain, turned)

        return [module.weight for module in modules], fill


def with_weights(chain: Chain, weights: Iterable[Tensor]) -> Chain:
    """Return the chain with other weights for its operators, in order, and without any bias."""
    return Chain(tuple(_fill(chain.steps, iter(weights))))


def _fill(steps: Sequence[Step], weights: Iterator[Tensor]) -> Iterator[Step]:
    # All levels draw from one iterator, so weights go to operators in order, one row of branches after the other.
    for step in steps:
        if isinstance(step, Operator):
            yield replace(step, weight=next(weights), bias=None)
        elif isinstance(step, Branches):
            rows = (tuple(_fill(row, weights)) for row in step.rows)
            yield Branches(tuple(rows))  # type: ignore[arg-type]
        elif not isinstance(step, Shift):
            yield step


def layouts(root: nn.Module, sites: Sequence[Site]) -> dict[str, Layout]:
    """Map each site to the layout in which its dense module stores the weight; sites without a module are left out."""
    modules = dict(root.named_modules(remove_duplicate=False))
    return {site.name: stored_as(type(modules[site.name])) for site in sites if site.name in modules}


def read_sites(sites: Sequence[Site], plan: Plan, stored: Mapping[str, Layout]) -> tuple[TrainedSite, ...]:
    """Return the record of the sites that a plan factors; ``stored`` has the layouts of their dense modules."""
    found = []
    for site, decision in zip(sites, plan, strict=True):
        if decision.factorization is None or decision.rank is None:
            continue
        chain = named(decision.factorization).skeleton(site.operator, decision.rank)
        # A bias goes to the end of a chain, so the chain with any bias has the place of the bias last.
        places = tuple(place for place, part in chain.places if isinstance(part, Operator))
        shift = chain.with_bias(torch.empty(0)).places[-1][0]
        found.append(TrainedSite((site.name, *site.aliases), chain, places, shift, stored[site.name]))
    return tuple(found)


def build(root: nn.Module, example_inputs: Any, plan: Plan) -> tuple[TrainedSite, ...]:
    """Give a dense module the structure of a plan, in place, with factors of zeros; return the record of it.

    Raises:
        InputError: the plan was made for a model with other sites.
    """
    original = Original(root, normalise_inputs(example_inputs))
    names = list(original.sites)
    if names != [decision.site for decision in plan]:
        raise InputError(
            "the plan belongs to a model with other sites",
            allowed=", ".join(names),
            next_step="make the same model, dense",
        )
    sites = list(original.sites.values())
    record = read_sites(sites, plan, layouts(root, sites))
    chains = {
        site.name: _empty_chain(site.operator, decision.factorization, decision.rank)
        for site, decision in zip(sites, plan, strict=True)
        if decision.factorization is not None and decision.rank is not None
    }
    original.with_chains(chains, inplace=True)
    return record


def _empty_chain(operator: Operator, factorization: str, ranks: Ranks) -> Chain:
    method = named(factorization)
    shapes = method.shapes(tuple(operator.kernel.shape), ranks)
    return method.assemble(operator, [operator.weight.new_zeros(shape) for shape in shapes], ranks)


def factored_parameters(record: Sequence[TrainedSite]) -> dict[str, list[str]]:
    """Map the name of each dense parameter to the names of the parameters that stand for it."""
    names: dict[str, list[str]] = {}
    for site in record:
        for name in site.names:
            names[f"{name}.weight"] = [f"{name}.{place}.weight" for place in site.places]
            names[f"{name}.bias"] = [f"{name}.{site.shift}.bias"]
    return names


def has_dense(state: Mapping[str, Any], prefix: str, record: Sequence[TrainedSite]) -> bool:
    """Return whether a state dict has the dense weight of a factored site, and none of its factors."""
    rows = factored_parameters(record).items()
    return any(
        f"{prefix}{old}" in state and not any(f"{prefix}{new}" in state for new in news)
        for old, news in rows
        if old.endswith(".weight")
    )


def balance(root: nn.Module, record: Sequence[TrainedSite]) -> None:
    """Scale the factors of each chain to the same Frobenius norm, in place; the composed weight stays the same.

    Gradient flow keeps the differences of the squared norms (Du et al. 2018), so factors with equal norms learn at
    equal rates. A chain with a sum of branches is left as it is, because each branch has its own scale.
    """
    # In logarithms: factor k is multiplied by exp(mean of all logs - log k), and these multipliers have the product 1.
    for site in record:
        if any(isinstance(step, Branches) for step in site.chain.steps):
            continue
        factors, _ = site.bind(root)
        # Example: norms 8 and 2 are multiplied by 1/2 and 2, and are both 4.
        logs = torch.stack([torch.linalg.vector_norm(factor.detach().double()).log() for factor in factors])
        if not bool(logs.isfinite().all()):
            continue
        for factor, log in zip(factors, logs, strict=True):
            factor.data.mul_(float((logs.mean() - log).exp()))
