"""Damages of options, corrected by what their chains do to the outputs: expected ones hold to first order only.

What the chain of one site alone does to a model's outputs, measured: expected damages hold to first order only.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TypeAlias

from torch import Tensor

from surgery.algebra import Chain, Operator
from surgery.data.factor import correct_bias
from surgery.data.samples import Calibration
from surgery.factorizations import Ranks
from surgery.kinds.registry import Model, observe
from surgery.passes.evidence import Evidence, Outputs
from surgery.passes.factoring import SiteData
from surgery.passes.fitting import Fitter
from surgery.plans.options import Option, Options
from surgery.plans.plan import Decision
from surgery.system.progress import Progress

__all__ = ["Damages", "Effects", "OpenEffects", "open_effects"]


class Effects:
    """The outputs of a model on some samples, and by how much they move when a chain takes the place of an operator.

    Nothing is changed: what the operator puts out is replaced as the model runs.
    """

    def __init__(self, model: Model, samples: Calibration) -> None:
        self._observed = observe(model, next(iter(samples)))
        self._placements = {placement.site.name: placement for placement in self._observed.find().placements}
        self._outputs = Outputs(self._observed.run, samples)

    def of(self, site: str, chain: Chain) -> float:
        """Return the relative error of the outputs with a chain at a site."""
        placement = self._placements[site]
        place = _Place(placement.site.operator, chain)
        self._observed.forget()
        for call in placement.calls:
            self._observed.watch(call, place.see)
            self._observed.tap(call, place.change)
        return self._outputs.error(self._observed.run)[0]


class _Place:
    """What an operator reads and puts out is shown to it, and what its chain would put out comes back.

    The difference is added, since calls that share a weight may have a bias each.
    """

    def __init__(self, operator: Operator, chain: Chain) -> None:
        self._operator, self._chain = operator, chain
        self._input: Tensor | None = None

    def see(self, x: Tensor) -> None:
        self._input = x

    def change(self, y: Tensor) -> Tensor:
        assert self._input is not None  # it is shown just before
        difference = self._chain(self._input) - self._operator(self._input)
        return y + difference.to(y.dtype).view_as(y)


_Key: TypeAlias = tuple[str, str, Ranks]  # site, factorization, ranks
OpenEffects: TypeAlias = Callable[[Evidence, int], Effects]

_ROUNDS = 3  # of corrections
_SMALL, _LARGE = 160_000, 2_500_000  # weights: a 3x3 convolution of 128 channels, a linear layer of 768 to 3072
_LEAST, _FEW = 16, 64  # samples of a correction
_WORST = 1e6  # times an expected damage


def open_effects(evidence: Evidence, sites: int) -> Effects:
    """Return what measures the chains of so many sites one by one, on few samples: there are many chains."""
    data = _data(evidence)
    few = data.samples.affordable(data.macs * sites, least=_LEAST)
    return Effects(evidence.model, few.take(slice(min(_FEW, few.count))))


class Damages:
    """The options of all sites, with damages that are corrected by measuring as far as choices need them.

    ``open_effects`` opens what measures the effect of one chain on the outputs, when the first is needed.
    """

    def __init__(
        self,
        sites: Sequence[Options],
        evidence: Evidence,
        fitter: Fitter,
        *,
        open_effects: OpenEffects = open_effects,
        progress: Progress,
    ) -> None:
        self.sites = list(sites)
        self._evidence, self._fitter, self._progress = evidence, fitter, progress
        self._open = open_effects
        self._effects: Effects | None = None
        chains = (option for site in sites for option in site.options if option.factorization is not None)
        self._expected = {_key(option): option.damage for option in chains}
        self._tried: set[_Key] = set()
        self._ratios: dict[tuple[str, str], float] = {}

    def settle(self, choose: Callable[[], Sequence[Option]]) -> None:
        """Correct the damages of options until all that is chosen has been measured.

        What was measured of one rank of a site holds for its others, and the median of all for sites without.
        """
        for _ in range(_ROUNDS):
            options = [self._instead(site, chosen) for site, chosen in zip(self.sites, choose(), strict=True)]
            new = [option for site, option in zip(self.sites, options, strict=True) if self._is_new(site, option)]
            if not new:
                break
            for done, option in enumerate(new):
                self._progress("fit", done, len(new))
                self._measure(option)
            self._progress("fit", len(new), len(new))
            found = list(self._ratios.values())
            typical = statistics.median(found) if found else 1.0
            self.sites = [
                options.with_damages([self._corrected(option, typical) for option in options.options])
                for options in self.sites
            ]

    def _instead(self, site: Options, chosen: Option) -> Option:
        """Return what is to be measured of a site: what is chosen, or some chain if that is dense and none is known."""
        known = any(name == site.site.name for name, _ in self._ratios)
        return chosen if known or chosen.factorization is not None else site.middle

    def _corrected(self, option: Option, typical: float) -> float:
        if option.factorization is None:
            return option.damage
        key = _key(option)
        return self._expected[key] * self._ratios.get(key[:2], typical)

    def _is_new(self, site: Options, option: Option) -> bool:
        """Whether the effect of an option is to be measured; chains of large convolutions take long to fit."""
        if option.factorization is None or not option.damage > 0 or _key(option) in self._tried:
            return False
        weights = site.site.operator.kernel.numel()
        return weights <= (_LARGE if option.factorization == "svd" else _SMALL)

    def _measure(self, option: Option) -> None:
        self._tried.add(_key(option))
        decision = Decision(option.site, factorization=option.factorization, rank=option.ranks)
        chain = self._fitter.chain(decision)
        if chain is None:
            return
        if self._effects is None:
            self._effects = self._open(self._evidence, len(self.sites))
        effect = self._effects.of(option.site, self._as_followed(option.site, chain))
        # Example: an expected damage of 0.01 whose chain moves the outputs by 0.2 is 0.04, so that the ratio is 4.
        ratio = effect**2 / self._expected[_key(option)]
        self._ratios[_key(option)[:2]] = ratio if ratio < _WORST else _WORST  # or not finite

    def _as_followed(self, name: str, chain: Chain) -> Chain:
        """Return the chain with the mean corrected where the batch norms that follow will do so."""
        data = self._evidence.fit_to
        operator = next(site.site.operator for site in self.sites if site.site.name == name)
        if data is None or operator.bias is not None or name not in data.centred:
            return chain
        return correct_bias(chain, operator, data.moments[name])


def _data(evidence: Evidence) -> SiteData:
    assert evidence.data is not None  # options are made of it
    return evidence.data


def _key(option: Option) -> _Key:
    assert option.factorization is not None
    assert option.ranks is not None
    return option.site, option.factorization, option.ranks
