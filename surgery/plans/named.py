"""Ranks that are said for single sites, by name or pattern, in a dict or in a plan."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from surgery.errors import InputError, RankError, Refusal
from surgery.factorizations import Ranks
from surgery.plans.candidates import Candidate, Choice, say_ranks
from surgery.plans.quality import Fixed, SiteRule
from surgery.sites.site import FactoredSite

__all__ = ["PerSite", "check_known", "explicit"]


@dataclass(frozen=True)
class PerSite(SiteRule):
    """Ranks by site name, or None to stay dense; sites that no row names stay dense.

    A row is an exact name or a glob pattern. The exact name counts first, then the first pattern that matches. What is
    said of one site by its name must be possible there; a pattern is clamped as a rank for all sites is.
    """

    rows: tuple[tuple[str, Ranks | None], ...]

    def __str__(self) -> str:
        return "; ".join(f"{name}={'dense' if ranks is None else say_ranks(ranks)}" for name, ranks in self.rows)

    def check(self, sites: Sequence[str]) -> None:
        """Raise InputError for a row that names no site."""
        check_known((n for n, _ in self.rows if not any(fnmatchcase(s, n) for s in sites)), sites, "the ranks name")

    def choose(self, candidates: Sequence[Candidate]) -> Choice | Refusal:
        """Return what the site's row says.

        Raises:
            RankError: the row has the site's own name and a rank that its candidates cannot take; or sites that share
                factors have different ranks.
        """
        rows = dict(self.rows)
        members = [site.name for site in candidates[0].site.members]
        found = [(site, self._row(site)) for site in members]
        if len({None if name is None else rows[name] for _, name in found}) > 1:
            raise RankError(f"the joint sites {', '.join(members)} have different ranks", allowed="one for all of them")
        site, name = found[0]
        if name is None:
            return Refusal("the ranks do not name it")
        ranks = rows[name]
        if ranks is None:
            return Refusal("kept dense by the ranks given")
        return explicit(candidates, ranks) if name == site else Fixed(ranks).choose(candidates)

    def _row(self, site: str) -> str | None:
        """Return the row that counts for a site: its own, or the first pattern that matches."""
        rows = [name for name, _ in self.rows]
        return site if site in rows else next((name for name in rows if fnmatchcase(site, name)), None)


def explicit(candidates: Sequence[Candidate], ranks: Ranks) -> Choice:
    """Return the first candidate with as many ranks, at exactly these ranks, whatever they cost.

    One rank for a method with several is for all its modes; modes with a smaller full rank take that.

    Raises:
        RankError: there is no such candidate, or a rank is above its full rank.
    """
    site = candidates[0].site.name
    fits = [c for c in candidates if len(ranks) in (1, len(c.max_ranks))]
    spans = "; or ".join(_spans(c) for c in fits or candidates)
    full = fits[0].max_ranks if fits else ()
    limits = (max(full),) if len(ranks) == 1 and fits else full
    if not fits or any(not 1 <= rank <= limit for rank, limit in zip(ranks, limits, strict=True)):
        already = ", which is factored already," if isinstance(candidates[0].site, FactoredSite) else ""
        raise RankError(
            f"site {site!r}{already} cannot take rank {say_ranks(ranks)}",
            allowed=spans,
            next_step="give it a rank in this span, or none to keep it dense",
        )
    wanted = ranks * len(full) if len(ranks) == 1 else ranks
    return Choice(fits[0], tuple(map(min, wanted, full)))


def check_known(unknown: Iterable[str], sites: Sequence[str], who: str) -> None:
    """Raise InputError for the first of the unknown names, with the sites that are nearest to it."""
    for name in unknown:
        close = difflib.get_close_matches(name, sites, n=3, cutoff=0.5)
        raise InputError(
            f"{who} the site {name!r}, which the model does not have",
            allowed=", ".join(sites) if len(sites) <= 8 else f"{', '.join(sites[:8])} and {len(sites) - 8} more",
            next_step=f"did you mean {' or '.join(map(repr, close))}?" if close else "correct or remove it",
        )


def _spans(candidate: Candidate) -> str:
    return (
        f"{candidate.factorization.name} {candidate.factorization.spans(candidate.site.operator, candidate.max_ranks)}"
    )
