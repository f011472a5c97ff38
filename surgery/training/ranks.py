"""Ranks for training: how much of each unfolding to keep by its spectrum relative to that at the start, then by time.

EVBMF sees nothing in weights that are hardly trained, and the energy of a spectrum that is still nearly flat asks for
almost all of it. A layer of which nothing is known yet gets ``MOST`` of its full rank, the quarter that Pufferfish
(Wang et al. 2021) takes everywhere, or ``MOST_OF_EACH`` of several ranks, whose savings multiply. What tells layers
apart is how far the stable rank has fallen: its share of that of the fresh weight (Cuttlefish's scaled stable rank) is
the share of that to keep, not below ``LEAST``.

Ranks are rounded up to what the kernels like; of the factorizations that fit, the one is taken whose forward and
backward pass measures shortest; where none is faster than dense, the site stays dense.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from surgery.cost.timing import Samples, compare_samples
from surgery.errors import Refusal
from surgery.factorizations import Ranks
from surgery.plans.candidates import Candidate, Choice, say_ranks
from surgery.plans.faster import snap
from surgery.plans.quality import SiteRule
from surgery.training.measure import PassTimer
from surgery.training.spectra import SpectrumLog

__all__ = ["LEAST", "MOST", "MOST_OF_EACH", "TrainingRanks"]

LEAST, MOST, MOST_OF_EACH = 1 / 8, 1 / 4, 1 / 3  # ours: shares of the full rank
_CLOSE = 2.0  # ours: times the fewest MACs; what costs more is not worth the time to measure it


@dataclass(frozen=True)
class TrainingRanks(SiteRule):
    """The rule; ``multiple`` is the number of channels that the kernels like."""

    log: SpectrumLog
    timer: PassTimer
    multiple: int

    def __str__(self) -> str:
        return "auto (training)"

    def choose(self, candidates: Sequence[Candidate]) -> Choice | Refusal:
        """Return the choice whose passes are shortest, with its measured seconds; refuse if none beats dense."""
        choices = [Choice(candidate, self.ranks(candidate)) for candidate in candidates]
        least = min(choices, key=lambda choice: choice.order)
        cheaper = [c for c in choices if c.saves("macs") and c.cost.macs <= _CLOSE * least.cost.macs]
        if not cheaper:
            return least.refuse("macs")
        dense, *chains = self._times(cheaper)
        verdicts = [compare_samples(dense, chain).verdict for chain in chains]
        faster = [
            Choice(choice.candidate, choice.ranks, dense.median, chain.median)
            for choice, chain, verdict in zip(cheaper, chains, verdicts, strict=True)
            if verdict == "faster"
        ]
        if faster:
            return min(faster, key=lambda choice: choice.latency or 0.0)
        rows = zip(cheaper, chains, strict=True)
        said = [f"{c.candidate.factorization.name} {say_ranks(c.ranks)} {s.median * 1e3:.3g} ms" for c, s in rows]
        return Refusal(f"no chain trains faster than dense ({dense.median * 1e3:.3g} ms): {', '.join(said)}")

    def ranks(self, candidate: Candidate) -> Ranks:
        """Return the ranks by the spectrum, rounded up to what the kernels like."""
        most = MOST if len(candidate.max_ranks) == 1 else MOST_OF_EACH
        share = min(most, max(LEAST, most * self.log.relative(candidate.site.name)))
        groups = candidate.site.operator.kernel.shape[0]
        counts = tuple(math.ceil(share * s) for s in candidate.factorization.counts(candidate.max_ranks))
        rows = zip(candidate.settled(counts), candidate.max_ranks, strict=True)
        return tuple(min(full, snap(rank, groups=groups, multiple=self.multiple)) for rank, full in rows)

    def _times(self, choices: Sequence[Choice]) -> list[Samples]:
        """Return the samples of dense and of each choice, over all calls of the site in one pass."""
        site = choices[0].candidate.site
        chains = [choice.candidate.factorization.skeleton(site.operator, choice.ranks) for choice in choices]
        calls = Counter(site.input_shapes)
        rows = [(count, self.timer.compare(site.operator, chains, shape)) for shape, count in calls.items()]
        return [_total([(count, samples[i]) for count, samples in rows]) for i in range(len(chains) + 1)]


def _total(rows: Sequence[tuple[int, Samples]]) -> Samples:
    rounds = min(samples.runs for _, samples in rows)
    return Samples(tuple(sum(count * samples.seconds[i] for count, samples in rows) for i in range(rounds)))
