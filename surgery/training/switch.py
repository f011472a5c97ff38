"""The switch itself: take one module and its optimizer from dense to factored and back, in place, with all state.

The model and the optimizer stay the same objects; so do all modules other than the sites. The groups of the optimizer
and the weights that the factors compose to stay as they are. Biases keep their values, their ``requires_grad`` and
their state, even if a new object holds them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from surgery.errors import CheckError
from surgery.passes.decompose import decompose
from surgery.passes.recompose import recompose
from surgery.passes.results import Change
from surgery.plans.plan import Plan
from surgery.sites import Site
from surgery.training.gauss_newton import fit_factors
from surgery.training.optimizer import Exchange
from surgery.training.structure import TrainedSite, balance, build, factored_parameters, layouts, read_sites
from surgery.training.transport import Jacobian

__all__ = ["align_copy", "fill_structure", "set_format", "switch_to_factors", "switch_to_dense"]

Parameters = Mapping[str, nn.Parameter]


def switch_to_factors(
    root: nn.Module, example_inputs: Any, plan: Plan, sites: Sequence[Site]
) -> tuple[tuple[TrainedSite, ...], Plan, tuple[Change, ...], list[Exchange]]:
    """Factor the sites of a plan in place, and balance the factors.

    Return the record, the plan as it was carried out, the changes with their measured errors, and the exchanges of
    parameters that the optimizer needs.
    """
    stored, before = layouts(root, sites), _parameters(root)
    result = decompose(root, example_inputs, ranks=plan, inplace=True)
    record = read_sites(sites, result.plan, stored)
    balance(root, record)
    return record, result.plan, result.changes, _factoring_exchanges(root, before, record)


def switch_to_dense(root: nn.Module, example_inputs: Any, record: Sequence[TrainedSite]) -> list[Exchange]:
    """Compose the factored sites in place, exactly; return the exchanges of parameters that the optimizer needs.

    Raises:
        CheckError: a chain did not come back as one operator.
    """
    # Bind first: the exchanges need the factors after recompose has taken them out of the module.
    before = _parameters(root)
    bound = [site.bind(root) for site in record]
    recompose(root, example_inputs, inplace=True)
    after = _parameters(root)
    lost = [site.names[0] for site in record if f"{site.names[0]}.weight" not in after]
    if lost:
        raise CheckError(f"{', '.join(lost)} did not come back as one operator")
    exchanges, taken = [], set()
    for site, (factors, compose) in zip(record, bound, strict=True):
        name = f"{site.names[0]}.weight"
        jacobian = functools.partial(Jacobian, compose, factors)
        exchanges.append(Exchange(tuple(factors), (after[name],), (name,), jacobian))
        taken |= {id(factor) for factor in factors}
    origins = {new: old for old, news in factored_parameters(record).items() for new in news}
    rest = {name: parameter for name, parameter in before.items() if id(parameter) not in taken}
    return exchanges + _rebound(rest, after, origins)


def fill_structure(root: nn.Module, example_inputs: Any, plan: Plan) -> tuple[tuple[TrainedSite, ...], list[Exchange]]:
    """Give a dense module the structure of a plan, with factors of zeros; return the record and the exchanges."""
    before = _parameters(root)
    record = build(root, example_inputs, plan)
    return record, _factoring_exchanges(root, before, record)


def align_copy(
    copy: nn.Module, example_inputs: Any, plan: Plan, factored: nn.Module, record: Sequence[TrainedSite]
) -> None:
    """Factor a dense copy of a model, such as an average of its weights, with factors near those of the model.

    Factors are determined only up to a change of basis, and the average of factors in different bases means nothing. So
    the copy starts from the model's factors, and moves them towards its own weights as far as they come nearer.
    """
    weights = {site.names[0]: copy.get_submodule(site.names[0]).weight for site in record}
    biases = _parameters(copy)
    build(copy, example_inputs, plan)
    after = _parameters(copy)
    for site in record:
        factors, compose = site.bind(factored)
        own, _ = site.bind(copy)
        goal: Any = weights[site.names[0]]
        for parameter, factor in zip(own, fit_factors(compose, factors, goal.to(factors[0].device)), strict=True):
            parameter.data.copy_(factor)
    for old, names in factored_parameters(record).items():
        if old.endswith(".bias") and old in biases:
            after[names[0]].data.copy_(biases[old].detach())


def set_format(root: nn.Module, channels_last: bool) -> None:
    """Give all 4-d weights of a module the memory format, in place."""
    if channels_last:
        root.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _parameters(root: nn.Module) -> dict[str, nn.Parameter]:
    return dict(root.named_parameters(remove_duplicate=False))


def _factoring_exchanges(root: nn.Module, before: Parameters, record: Sequence[TrainedSite]) -> list[Exchange]:
    after, names, exchanges, taken = _parameters(root), factored_parameters(record), [], set()
    for site in record:
        weight = f"{site.names[0]}.weight"
        factors, compose = site.bind(root)
        jacobian = functools.partial(Jacobian, compose, factors)
        exchanges.append(Exchange((before[weight],), tuple(factors), tuple(names[weight]), jacobian))
        taken.add(id(before[weight]))
    rest = {name: parameter for name, parameter in before.items() if id(parameter) not in taken}
    return exchanges + _rebound(rest, after, {old: news[0] for old, news in names.items()})


def _rebound(before: Parameters, after: Parameters, names: Mapping[str, str]) -> list[Exchange]:
    """Return the exchanges of parameters that keep their values under another name (as biases do) or in a new object.

    They keep their ``requires_grad``.
    """
    # A tied parameter has several names; only its first counts, so that the optimizer gets it once.
    exchanges, seen = [], set()
    for name, old in before.items():
        moved = names.get(name, name)
        new = after[moved]
        if (new is not old or moved != name) and id(old) not in seen:
            new.requires_grad_(old.requires_grad)
            exchanges.append(Exchange((old,), (new,), (moved,)))
        seen.add(id(old))
    return exchanges
