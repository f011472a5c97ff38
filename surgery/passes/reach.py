"""Which sites of a module run when something takes their place: seen in one run, before anything is fitted to data."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.errors import Refusal
from surgery.factorizations import fitting
from surgery.kinds.registry import kind_of
from surgery.passes.original import Original
from surgery.sites.site import FactoredSite

__all__ = ["unreached"]


def unreached(original: Original, names: Collection[str]) -> Mapping[str, str]:
    """Return why some sites have to stay dense, by name: a copy with the least chains at all of them is run once.

    Graphs say themselves what runs; of them none is refused here.
    """
    if kind_of(original.model).says_what_runs():
        return {}
    sites = (original.sites[name] for name in names)
    chains = {site.name: _least(site.operator) for site in sites if not isinstance(site, FactoredSite)}
    return original.spliced({name: chain for name, chain in chains.items() if chain is not None}).refused


def _least(operator: Operator) -> Chain | None:
    """Return the chain of the lowest ranks, of zeros; None where no factorization fits."""
    methods = fitting(operator, "auto")
    if isinstance(methods, Refusal):
        return None
    ranks = tuple(1 for _ in methods[0].max_ranks(operator))
    shapes = methods[0].shapes(tuple(operator.kernel.shape), ranks)
    return methods[0].assemble(operator, [operator.weight.new_zeros(shape) for shape in shapes], ranks)
