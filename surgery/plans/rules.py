"""What a user may say: a spec of ranks, ranks of single sites, and groups of sites to decide together.

| spec | rule |
|---|---|
| ``measured`` | EVBMF or energy, snapped to the kernels' multiples, kept only where measured faster |
| ``vbmf`` | the rank that EVBMF finds above the noise |
| ``full`` | full ranks: exact, to test with |
| ``energy=0.9`` | the smallest ranks that keep this share of the squared singular values |
| ``keep_params=0.5``, ``keep_macs=0.5`` | one threshold for the whole model, to meet the budget |
| ``16``, ``16,32`` | these ranks everywhere; two for methods with two, (out, in) for tucker |
| a dict of site names or patterns | ranks for these sites, None keeps one dense; all others stay dense |
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

from surgery.errors import InputError, RankError, Refusal
from surgery.factorizations import Ranks
from surgery.plans.candidates import Candidate, Choice, say_ranks
from surgery.plans.faster import KeepFaster
from surgery.plans.plan import Plan
from surgery.plans.quality import Energy, Fixed, Full, Keep, RankRule, SiteRule, Vbmf
from surgery.sites import FactoredSite, Site, joined

__all__ = ["PerSite", "RankSpec", "check_groups", "check_known", "explicit", "join", "joint_groups", "parse_ranks"]


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


def join(sites: Sequence[Site], groups: Sequence[Sequence[str]]) -> list[Site]:
    """Return the sites in order, with each group as one joint site in the place of its first member.

    Names that are not among the sites are passed over; of a group of which one is left it is a site by itself.

    Raises:
        InputError: members that cannot be stacked.
    """
    by_name = {site.name: site for site in sites}
    present = [[by_name[name] for name in group if name in by_name] for group in groups]
    # Invariant: the site of a group stands where its first member was, and the others go. Example: of a, b, c, d with
    # the group (d, b), the result is a, b + d, c.
    leads: dict[str, Site] = {}
    absorbed: set[str] = set()
    for members in present:
        if len(members) < 2:
            continue
        members.sort(key=list(by_name.values()).index)
        joint = joined(members)
        if isinstance(joint, Refusal):
            raise InputError(f"joint sites: {joint.reason}", next_step="group only sites that are alike")
        leads[joint.name] = joint
        absorbed |= {site.name for site in members[1:]}
    return [leads.get(site.name, site) for site in sites if site.name not in absorbed]


def check_groups(groups: Sequence[Sequence[str]], sites: Sequence[str]) -> None:
    """Raise InputError for a name that is no site, or that stands in two groups."""
    names = [name for group in groups for name in group]
    check_known((name for name in names if name not in set(sites)), sites, "joint= names")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"joint= names the site {twice[0]!r} twice", next_step="name each site in one group")


def joint_groups(plan: Plan) -> list[list[str]]:
    """Return the groups of sites that share factors in a plan.

    Raises:
        InputError: members with different factorizations or ranks.
    """
    groups: dict[str, list[str]] = {}
    forms: dict[str, set[object]] = {}
    for decision in plan:
        if decision.joint is not None and not decision.dense:
            groups.setdefault(decision.joint, []).append(decision.site)
            forms.setdefault(decision.joint, set()).add((decision.factorization, decision.rank))
    for name, found in forms.items():
        if len(found) > 1:
            raise InputError(
                f"the plan gives the joint group {name!r} ({', '.join(groups[name])}) different ranks or methods",
                allowed="one factorization and rank for all sites of a group",
            )
    return list(groups.values())


RankSpec: TypeAlias = str | int | tuple[int, ...] | Mapping[str, "int | tuple[int, ...] | None"]

_WORDS: dict[str, Callable[[], RankRule]] = {"measured": KeepFaster, "vbmf": Vbmf, "full": Full}
_FRACTIONS: dict[str, Callable[[float], RankRule]] = {
    "energy": Energy,
    "keep_params": lambda fraction: Keep("parameters", fraction),
    "keep_macs": lambda fraction: Keep("macs", fraction),
}
_ALLOWED = ", ".join([*_WORDS, *(f"{name}=0.5" for name in _FRACTIONS), "16", "16,32", "a dict of site names"])


def parse_ranks(spec: RankSpec | RankRule) -> RankRule:
    """Return the rule that a spec says; a rule comes back as it is.

    Raises:
        RankError: the spec does not say a rule.

    >>> parse_ranks("energy=0.9"), parse_ranks("16,32"), parse_ranks({"head": 8, "stem": None})
    (Energy(share=0.9), Fixed(ranks=(16, 32)), PerSite(rows=(('head', (8,)), ('stem', None))))
    """
    if isinstance(spec, RankRule):
        return spec
    if isinstance(spec, str):
        return _parse_text(spec)
    if isinstance(spec, Mapping):
        return PerSite(tuple(_parse_row(name, ranks) for name, ranks in spec.items()))
    return Fixed(_parse_ints(spec, "ranks"))


def _parse_text(text: str) -> RankRule:
    name, equals, value = (part.strip() for part in text.partition("="))
    if not equals and name in _WORDS:
        return _WORDS[name]()
    if equals and name in _FRACTIONS:
        return _FRACTIONS[name](_parse_fraction(name, value))
    if re.fullmatch(r"-?[0-9]{1,9}( *, *-?[0-9]{1,9})*", name) and not equals:
        return Fixed(_parse_ints(tuple(int(part) for part in name.split(",")), "ranks"))
    if text == "auto":
        raise RankError(
            "ranks='auto' is a promise, which is not a rule",
            allowed=_ALLOWED,
            next_step="say 'measured' for the rule that keeps what is faster, or give a Goal to decompose",
        )
    close = difflib.get_close_matches(name, [*_WORDS, *_FRACTIONS], n=1)
    meant = f"{close[0]}=0.5" if close and close[0] in _FRACTIONS else "".join(close)
    raise RankError(
        f"ranks={text!r} is not a rank rule",
        allowed=_ALLOWED,
        next_step=f"did you mean {meant!r}?" if meant else "say one of these",
    )


def _parse_fraction(name: str, value: str) -> float:
    try:
        fraction = float(value)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise RankError(
            f"{name}={value} is not a fraction",
            allowed="numbers above 0 and up to 1",
            next_step=f"say for example {name}=0.5",
        )
    return fraction


def _parse_row(name: object, ranks: object) -> tuple[str, Ranks | None]:
    if not isinstance(name, str):
        raise RankError(f"the ranks name the site {name!r}", allowed="site names as text", next_step="quote the name")
    return name, None if ranks is None else _parse_ints(ranks, f"the ranks of {name!r}")


def _parse_ints(ranks: object, what: str) -> Ranks:
    """Return one rank or a sequence of ranks as a tuple."""
    rows = tuple(ranks) if isinstance(ranks, list | tuple) else (ranks,)
    whole = tuple(rank for rank in rows if isinstance(rank, int) and not isinstance(rank, bool) and rank > 0)
    if not rows or len(whole) < len(rows):
        allowed = _ALLOWED if what == "ranks" else "whole numbers from 1, tuples of them, or None"
        said = f"ranks={ranks!r}" if what == "ranks" else f"{what} are {ranks!r}"
        raise RankError(f"{said}, which cannot be used", allowed=allowed, next_step="ranks are whole numbers from 1")
    return whole
