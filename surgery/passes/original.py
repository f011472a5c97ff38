"""The model as it was given: its sites, and other models with chains in their places.

Passes read sites and splice chains through this file alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.algebra.chain import Chain
from surgery.data.batch_norm import feeds_batch_norm
from surgery.kinds.base import OpenModel
from surgery.kinds.inputs import Inputs
from surgery.kinds.registry import Model, open_model
from surgery.sites.edit import Replace
from surgery.sites.find import find
from surgery.sites.placement import Found
from surgery.sites.site import Site, Skip, Totals

__all__ = ["Original", "Spliced"]


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
        _splice(opened, find(opened.flow), chains)
        return opened.finish()

    def spliced(self, chains: Mapping[str, Chain], *, inplace: bool = False) -> Spliced:
        """Return a copy of the model, or the model itself, with those chains that were seen to run in it."""
        opened, found = self._take(inplace=inplace)
        _splice(opened, found, chains)
        refused = opened.verify()
        return Spliced(opened.finish(), refused)

    def _take(self, *, inplace: bool) -> tuple[OpenModel, Found]:
        """Return an open model that may be changed, and what was found in it."""
        if self._unused and not inplace:
            self._unused = False
            return self._opened, self.found
        opened = open_model(self.model, self.inputs, copies=not inplace, inplace=inplace)
        return opened, find(opened.flow)


def _splice(opened: OpenModel, found: Found, chains: Mapping[str, Chain]) -> None:
    """Put chains in the places of their sites; what is a chain already is made an operator first."""
    places = {placement.site.name: placement for placement in found.placements}
    places |= opened.reopen([p for name, p in places.items() if p.chain is not None and name in chains])
    for name, chain in chains.items():
        opened.apply(Replace(places[name], chain))
