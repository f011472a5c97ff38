"""Ranks for training: each layer's spectrum, relative to its start, sets the ranks; measured time sets the method.

EVBMF finds no signal in weights that have hardly trained, and an energy rule keeps almost all of a spectrum that is
still nearly flat. So a fresh layer gets ``MOST`` of its full rank, the quarter that Pufferfish (Wang et al. 2021) takes
everywhere, or ``MOST_OF_EACH`` of several ranks, whose savings multiply. Layers differ in how far their stable rank has
fallen. The stable rank divided by that of the fresh weight (Cuttlefish's scaled stable rank) multiplies these shares:

    share = min(MOST, max(LEAST, MOST x stable rank now / stable rank at the start))

Example: a full rank of 512 and a stable rank that has fallen from 80 to 60 give a rank of 512 x 1/4 x 60/80 = 96.

Ranks are rounded up to what the kernels like. Of the factorizations that fit, the rule takes the one whose forward and
backward pass is fastest; a site stays dense if none is faster than the dense layer.

Which sites train: those whose weight gets gradients and is in a group of the optimizer.

The others stay dense in a run, because factors only approximate a weight, and no training would make up for the error.
Sites with a hook on the weight itself stay dense too, as with an optimizer that steps in the backward pass: the factors
are other parameters, which the hook would not see.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from surgery.cost.timing import Samples, compare_samples
from surgery.errors import Refusal
from surgery.factorizations import Ranks
from surgery.kinds.layers.within import Within, within_of
from surgery.plans.candidates import Candidate, Choice, say_ranks
from surgery.plans.faster import snap
from surgery.plans.plan import Plan
from surgery.plans.quality import SiteRule
from surgery.sites import Site
from surgery.training.measure import PassTimer
from surgery.training.schedule import SpectrumLog

__all__ = [
    "LEAST",
    "MOST",
    "MOST_OF_EACH",
    "Survey",
    "TrainingRanks",
    "as_pattern",
    "hooked",
    "keep_dense",
    "untrained",
]


@dataclass(frozen=True)
class Survey:
    """The sites of a model that trains.

    ``untrained`` maps the sites that cannot be trained in factors to the reasons. ``hooked`` does so for the modules
    that are not sites because their weight has a hook on its gradient.
    """

    sites: tuple[Site, ...]
    untrained: Mapping[str, str]
    hooked: Mapping[str, str]

    @property
    def left(self) -> dict[str, str]:
        """All names that must stay dense, with the reasons."""
        return dict(self.untrained) | dict(self.hooked)


_HOOKED = "its weight has a hook on its gradient, which factors do not have"


def hooked(root: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Map the modules whose weight has a hook on its gradient to the reason to leave them alone."""
    modules = dict(root.named_modules(remove_duplicate=False))
    weights = {name: modules[name]._parameters.get("weight") for name in names if name in modules}
    return {name: _HOOKED for name, weight in weights.items() if weight is not None and _has_hooks(weight)}


def untrained(root: nn.Module, optimizer: Optimizer, sites: Sequence[Site]) -> dict[str, str]:
    """Map each site that cannot be trained in factors to the reason; sites without a module are not judged here."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    modules = dict(root.named_modules(remove_duplicate=False))
    reasons = {}
    for site in sites:
        module = modules.get(site.name)
        weight = None if module is None else module._parameters.get("weight")
        reason = None if weight is None else _refuse(weight, held)
        within = None if module is None else within_of(module)
        if isinstance(within, Within) and within.weight not in within.exact:
            reason = "its weight is computed from other parameters, which train"
        if reason is not None:
            reasons[site.name] = reason
    return reasons


def _refuse(weight: nn.Parameter, held: set[int]) -> str | None:
    if not weight.requires_grad:
        return "its weight does not train"
    if id(weight) not in held:
        return "its weight does not train: it is not in any param group of the optimizer"
    if _has_hooks(weight):
        return _HOOKED
    return None


def _has_hooks(weight: Tensor) -> bool:
    """Whether the weight has a hook on its gradient."""
    # The last name is that of torch's own optimizer-in-backward.
    kinds = ("_backward_hooks", "_post_accumulate_grad_hooks", "_in_backward_optimizers")
    return any(getattr(weight, kind, None) for kind in kinds)


def keep_dense(plan: Plan, reasons: Mapping[str, str]) -> Plan:
    """Return the plan with these sites dense, each with its reason."""
    for name, reason in reasons.items():
        plan = plan.edit(name, rank=None, reason=reason)
    return plan


def as_pattern(name: str) -> str:
    """Return the glob pattern that matches this name only.

    >>> from fnmatch import fnmatchcase
    >>> fnmatchcase("a[0].b", as_pattern("a[0].b")), fnmatchcase("a0.b", as_pattern("a[0].b"))
    (True, False)
    """
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


LEAST, MOST, MOST_OF_EACH = 1 / 8, 1 / 4, 1 / 3  # ours: shares of the full rank
_CLOSE = 2.0  # ours: multiple of the fewest MACs; a chain that costs more is not worth measuring


@dataclass(frozen=True)
class TrainingRanks(SiteRule):
    """The rank rule for training; ``multiple`` is the number of channels that the kernels like."""

    log: SpectrumLog
    timer: PassTimer
    multiple: int

    def __str__(self) -> str:
        return "auto (training)"

    def choose(self, candidates: Sequence[Candidate]) -> Choice | Refusal:
        """Return the choice with the fastest passes and its measured seconds; refuse if none beats the dense layer."""
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
        """Return the ranks that the spectrum asks for, rounded up to what the kernels like."""
        most = MOST if len(candidate.max_ranks) == 1 else MOST_OF_EACH
        share = min(most, max(LEAST, most * self.log.relative(candidate.site.name)))
        groups = candidate.site.operator.kernel.shape[0]
        counts = tuple(math.ceil(share * s) for s in candidate.factorization.counts(candidate.max_ranks))
        rows = zip(candidate.settled(counts), candidate.max_ranks, strict=True)
        return tuple(min(full, snap(rank, groups=groups, multiple=self.multiple)) for rank, full in rows)

    def _times(self, choices: Sequence[Choice]) -> list[Samples]:
        """Return the times of the dense layer and then of each choice, summed over all calls of the site in a pass."""
        site = choices[0].candidate.site
        chains = [choice.candidate.factorization.skeleton(site.operator, choice.ranks) for choice in choices]
        calls = Counter(site.input_shapes)
        rows = [(count, self.timer.compare(site.operator, chains, shape)) for shape, count in calls.items()]
        return [_total([(count, samples[i]) for count, samples in rows]) for i in range(len(chains) + 1)]


def _total(rows: Sequence[tuple[int, Samples]]) -> Samples:
    # Round i of every shape adds up to round i of the site, so that dense and chains stay paired round by round.
    rounds = min(samples.runs for _, samples in rows)
    return Samples(tuple(sum(count * samples.seconds[i] for count, samples in rows) for i in range(rounds)))
