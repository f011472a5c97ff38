"""The rule ``measured``: ranks from the spectrum, rounded to what kernels like, kept where chains measure faster."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from surgery.algebra import Chain, Operator, Shape
from surgery.errors import InputError, Refusal
from surgery.plans.candidates import Candidate, Choice, say_ranks
from surgery.plans.quality import SiteRule, energy_counts, vbmf_counts
from surgery.sites import FactoredSite

__all__ = ["FACTORED_ALREADY", "FALLBACK_ENERGY", "SiteTimes", "KeepFaster", "Latencies", "snap"]

FALLBACK_ENERGY = 0.9  # ours: what a mode keeps in which EVBMF finds no signal, as in weights that are hardly trained
FACTORED_ALREADY = "it is factored already; give it ranks to cut it further"
_LEAST = 4  # ours: no kernel gains from fewer channels


class SiteTimes(Protocol):
    """What one timing of an operator against its chain says: median seconds, and the verdict."""

    @property
    def dense_s(self) -> float:
        """Seconds of the operator."""

    @property
    def chain_s(self) -> float:
        """Seconds of the chain."""

    @property
    def verdict(self) -> str:
        """What the chain is: "faster", "slower" or "no difference"."""


class Latencies(Protocol):
    """Whatever can time an operator against a chain; ``surgery.cost`` has one."""

    def compare(self, dense: Operator | Chain, chain: Operator | Chain, shape: Shape, /) -> SiteTimes:
        """Time both at an input shape; the chain's weights are on the meta device. InputError: they cannot be run."""


@dataclass(frozen=True)
class KeepFaster(SiteRule):
    """Ranks by EVBMF or, where that finds nothing, by ``FALLBACK_ENERGY``, snapped; the fewest MACs; measured.

    ``multiple`` is the number of channels that the kernels like. Without ``latencies`` a chain needs fewer MACs than
    dense, no more.
    """

    multiple: int | None = None
    latencies: Latencies | None = None

    def __str__(self) -> str:
        return "measured"

    def choose(self, candidates: Sequence[Candidate]) -> Choice | Refusal:
        """Return the choice with the fewest MACs that is faster than dense; refuse if none is."""
        if isinstance(candidates[0].site, FactoredSite):
            return Refusal(FACTORED_ALREADY)
        choices = [Choice(candidate, self.ranks(candidate)) for candidate in candidates]
        choices.sort(key=lambda choice: choice.order)
        cheaper = [choice for choice in choices if choice.saves("macs")]
        if not cheaper:
            return choices[0].refuse("macs")
        if self.latencies is None:
            return cheaper[0]
        reasons = []
        for choice in cheaper:
            measured = _measure(choice, self.latencies)
            if isinstance(measured, Choice):
                return measured
            reasons.append(measured.reason)
        return Refusal("; ".join(reasons))

    def ranks(self, candidate: Candidate) -> tuple[int, ...]:
        """Return the snapped ranks."""
        groups = candidate.site.operator.kernel.shape[0]
        counts = zip(vbmf_counts(candidate), energy_counts(candidate, FALLBACK_ENERGY), strict=True)
        rows = zip(candidate.settled(tuple(v or e for v, e in counts)), candidate.max_ranks, strict=True)
        snapped = tuple(min(full, snap(rank, groups=groups, multiple=self.multiple)) for rank, full in rows)
        return candidate.widened(snapped, "macs")


def snap(rank: int, *, groups: int = 1, multiple: int | None = None) -> int:
    """Return the rank rounded up so that its channels (rank x groups) are a multiple.

    Below one multiple the steps are powers of two from 4 on, so that a tiny rank stays small.

    >>> [snap(r, multiple=16) for r in (1, 5, 9, 17, 33)], snap(5, groups=4, multiple=16)
    ([4, 8, 16, 32, 48], 8)
    """
    if multiple is None:
        return rank
    # rank * groups is a multiple if the rank is one of multiple / gcd. Example: 4 groups and 16 need ranks of 4, 8, ...
    step = multiple // math.gcd(multiple, groups)
    if rank < step:
        # The next power of two: 5 has (5 - 1).bit_length() = 3, and becomes 8.
        return min(step, max(_LEAST, 1 << (rank - 1).bit_length()))
    return -(-rank // step) * step


def _measure(choice: Choice, latencies: Latencies) -> Choice | Refusal:
    """Return the choice with its latencies over all calls if it is faster, and slower for none of the input shapes."""
    candidate = choice.candidate
    what = f"{candidate.factorization.name} {say_ranks(choice.ranks)}"
    try:
        rows = [(n, latencies.compare(dense, chain, at)) for dense, chain, at, n in candidate.pairs(choice.ranks)]
    except InputError as error:
        return Refusal(f"{what} cannot be measured: {error.what}")
    dense = sum(count * row.dense_s for count, row in rows)
    latency = sum(count * row.chain_s for count, row in rows)
    verdicts = {row.verdict for _, row in rows}
    if "faster" in verdicts and "slower" not in verdicts and latency < dense:
        return Choice(candidate, choice.ranks, dense, latency)
    times = f"({dense * 1e3:.3g} -> {latency * 1e3:.3g} ms)"
    slower = "slower" in verdicts and latency > dense > 0
    how = f"{latency / dense:.2f}x slower than dense" if slower else "not faster than dense"
    return Refusal(f"{what} measured {how} {times}")
