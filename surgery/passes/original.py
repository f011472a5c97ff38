"""The model as it was given: its sites, and other models with chains in their places.

Passes read sites and splice chains through this file alone.

Which sites of a module run when something takes their place: seen in one run, before anything is fitted to data.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from surgery.algebra import Chain, Operator
from surgery.data.batch_norm import feeds_batch_norm
from surgery.errors import Refusal
from surgery.factorizations import fitting
from surgery.kinds.base import OpenModel
from surgery.kinds.inputs import Inputs
from surgery.kinds.registry import Model, kind_of, open_model
from surgery.sites import FactoredSite, Found, Replace, Site, Skip, Totals
from surgery.sites.find import find

__all__ = ["Original", "Spliced", "unreached"]


@dataclass(frozen=True, eq=False)
class Spliced:
    """A model with chains in it, and the sites whose chains did not run, so that they are as before, with reasons."""

    model: Any
    refused: Mapping[str, str]


class Original:
    """A model, the inputs that it runs on, and all that was found in it.

    With ``copies`` the model is copied at once, for the one result that will be made; else a copy is made when chains
    are spliced.
    """

    def __init__(self, model: Model, inputs: Inputs, *, copies: bool = False) -> None:
        self.model, self.inputs = model, inputs
        self._opened = open_model(model, inputs, copies=copies)
        self._unused = copies
        self.found: Found = find(self._opened.flow)
        self._placements = {placement.site.name: placement for placement in self.found.placements}
        self.sites: Mapping[str, Site] = {name: placement.site for name, placement in self._placements.items()}

    @property
    def skips(self) -> tuple[Skip, ...]:
        """The places that were left alone."""
        return self.found.skips

    @property
    def totals(self) -> Totals:
        """The costs of the whole model."""
        return self.found.totals

    def sources(self, site: str) -> tuple[object, ...]:
        """Return the values that a site reads, one for each call."""
        return tuple(call.source for call in self._placements[site].calls)

    def feeds_batch_norm(self, site: str) -> bool:
        """Whether all that a site puts out goes into batch norms, which take up its mean."""
        return feeds_batch_norm(self._opened.flow, self._placements[site])

    def with_chains(self, chains: Mapping[str, Chain], *, inplace: bool = False) -> Any:
        """Return a copy of the model, or the model itself, with these chains in the places of their sites."""
        opened = open_model(self.model, self.inputs, copies=not inplace, inplace=inplace)
        self._splice(opened, chains)
        return opened.finish()

    def spliced(self, chains: Mapping[str, Chain], *, inplace: bool = False) -> Spliced:
        """Return a copy of the model, or the model itself, with those chains that were seen to run in it."""
        opened = self._take(inplace=inplace)
        self._splice(opened, chains)
        refused = opened.verify()
        return Spliced(opened.finish(), refused)

    def _take(self, *, inplace: bool) -> OpenModel:
        """Return an open model that may be changed."""
        if self._unused and not inplace:
            self._unused = False
            return self._opened
        return open_model(self.model, self.inputs, copies=not inplace, inplace=inplace)

    def _splice(self, opened: OpenModel, chains: Mapping[str, Chain]) -> None:
        """Put chains in the places of their sites; what is a chain already is made an operator first.

        The placements are those that were found once: the same model, opened again, has the same names and numbers.
        """
        asked = [self._placements[name] for name in chains]
        places = self._placements | opened.reopen([place for place in asked if place.chain is not None])
        for name, chain in chains.items():
            opened.apply(Replace(places[name], chain))


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
