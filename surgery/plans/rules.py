"""Rank specs: what a user may say of ranks, read into a rule.

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
from collections.abc import Callable, Mapping
from typing import TypeAlias

from surgery.errors import RankError
from surgery.factorizations import Ranks
from surgery.plans.faster import KeepFaster
from surgery.plans.keep import Keep
from surgery.plans.named import PerSite
from surgery.plans.quality import Energy, Fixed, Full, RankRule, Vbmf

__all__ = ["RankSpec", "parse_ranks"]

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
