"""What each site of a model could become, with the damage and the cost of each, by the moments of its inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from surgery.errors import Refusal
from surgery.passes.site_data import SiteData
from surgery.plans.options import Options, options_of
from surgery.plans.plan import Plan
from surgery.plans.planner import Progress
from surgery.plans.prices import Prices
from surgery.sites.site import Site

__all__ = ["Pricing", "SiteOptions", "list_options"]


@dataclass(frozen=True)
class Pricing:
    """How options are made and priced.

    ``ruled`` is a plan whose factorizations are taken over; ``multiple`` is the number of channels that kernels like.
    """

    prices: Prices
    factorization: str = "auto"
    multiple: int | None = None
    ruled: Plan | None = None

    def factorization_of(self, site: str) -> str:
        """Return the factorization that a site may have, or "auto"."""
        return self.factorization if self.ruled is None else self.ruled[site].factorization or "auto"


@dataclass(frozen=True, eq=False)
class SiteOptions:
    """The options of the sites that have any, and why the others have none, by name."""

    sites: tuple[Options, ...]
    reasons: dict[str, str]


def list_options(sites: Iterable[Site], data: SiteData, pricing: Pricing, progress: Progress) -> SiteOptions:
    """Return the options of each site."""
    wanted = tuple(sites)
    found: list[Options] = []
    reasons: dict[str, str] = {}
    for done, site in enumerate(wanted):
        progress("measure", done, len(wanted))
        options = _options(site, data, pricing)
        if isinstance(options, Refusal):
            reasons[site.name] = options.reason
        else:
            found.append(options)
    progress("measure", len(wanted), len(wanted))
    return SiteOptions(tuple(found), reasons)


def _options(site: Site, data: SiteData, pricing: Pricing) -> Options | Refusal:
    if site.name not in data.moments:
        return Refusal("no calibration input reaches it")
    return options_of(
        site,
        data.moments[site.name],
        pricing.prices,
        factorization=pricing.factorization_of(site.name),
        multiple=pricing.multiple,
        centred=site.name in data.centred,
    )
