"""What ``auto`` with calibration data works with: a model, all that is measured of it once, and what is made of it.

moments -> options of each site (damage, cost);    chosen options -> data-aware factors -> a model, timed or measured
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.cost.base import Comparison
from surgery.data.factor import correct_bias
from surgery.data.samples import Calibration
from surgery.errors import Refusal
from surgery.factorizations import Ranks, named
from surgery.kinds.inputs import Inputs
from surgery.kinds.registry import Model, open_model
from surgery.passes.clock import Clock
from surgery.passes.effects import Effects
from surgery.passes.factoring import SiteData, gather, plain, weight_error
from surgery.passes.fitting import Fitted, Fitting, judged
from surgery.passes.goals import HeldOut, scores_of
from surgery.passes.reach import unreached
from surgery.passes.terms import Terms
from surgery.plans.options import Option, Options, options_of
from surgery.plans.plan import Decision, Plan
from surgery.plans.planning import Progress
from surgery.runtime.bench import Timing
from surgery.sites.edit import Replace
from surgery.sites.find import find
from surgery.sites.placement import Found
from surgery.sites.site import select

__all__ = ["Workshop"]

_Key = tuple[str, str, Ranks]  # site, factorization, ranks

_SURE = 1.2  # a wider interval is not kept for another time
_ROUNDS = 3  # of corrections
_SMALL, _LARGE = 160_000, 2_500_000  # weights: a 3x3 convolution of 128 channels, a linear layer of 768 to 3072
_LEAST, _FEW = 16, 64  # samples of a correction
_WORST = 1e6  # times an expected damage


@dataclass(frozen=True)
class _Part:
    """The chain of a site."""

    chain: Chain


@dataclass(eq=False)
class Workshop:
    """The model with all that is measured of it once, and the chains that were fitted so far."""

    model: Model
    inputs: Inputs
    samples: Calibration
    terms: Terms
    progress: Progress
    made_up: str = ""
    sites: list[Options] = field(init=False)
    reasons: dict[str, str] = field(init=False)
    _clean: dict[_Key, Chain | None] = field(init=False, default_factory=dict)
    _fitted: dict[tuple[_Key, ...], Fitted[_Part]] = field(init=False, default_factory=dict)
    _realised: float = field(init=False, default=1.0)
    _compared: dict[tuple[_Key, ...], float] = field(init=False, default_factory=dict)
    _reached: dict[tuple[_Key, ...], tuple[float, float]] = field(init=False, default_factory=dict)
    _built: Any = field(init=False, default=None)
    _latest: tuple[_Key, ...] = field(init=False, default=())
    _expected: dict[_Key, float] = field(init=False)
    _seen: set[_Key] = field(init=False, default_factory=set)
    _ratios: dict[tuple[str, str], float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        fit, self._held = judged(self.samples, promised=self.terms.goal.kind == "max_error")
        self.found: Found = find(open_model(self.model, self.inputs, copies=False).flow)
        self._spots = {spot.site.name: spot for spot in self.found.placements}
        left_out = select(list(self._spots), self.terms.include, self.terms.exclude)
        self.reasons = {name: reason for name, reason in left_out.items() if reason is not None}
        if self.terms.ruled is not None:
            self.reasons |= {d.site: d.reason or "" for d in self.terms.ruled if d.dense}
        self.reasons |= unreached(self.model, self.inputs, [name for name in self._spots if name not in self.reasons])
        wanted = [name for name in self._spots if name not in self.reasons]
        self._data = gather(self.model, self.inputs, fit, wanted, self.progress)
        self.sites = []
        for done, name in enumerate(wanted):
            self.progress("measure", done, len(wanted))
            options = self._options(name)
            if isinstance(options, Refusal):
                self.reasons[name] = options.reason
            else:
                self.sites.append(options)
        self.progress("measure", len(wanted), len(wanted))
        chains = (option for site in self.sites for option in site.options if option.factorization is not None)
        self._expected = {_key(option): option.damage for option in chains}

    @cached_property
    def held_out(self) -> HeldOut:
        """The original's outputs on samples that nothing was fitted to."""
        return HeldOut(self.model, self._held)

    @cached_property
    def _effects(self) -> Effects:
        """What measures chains one by one, on few samples: there are many chains."""
        work = self._data.macs * len(self.sites)
        few = self._data.samples.affordable(work, least=_LEAST)
        return Effects(self.model, few.take(slice(min(_FEW, few.count))))

    @cached_property
    def clock(self) -> Clock:
        """What times whole models against the original."""
        return Clock(self.model, self.inputs, self.terms.latencies, self.terms.seconds, self.progress)

    @cached_property
    def scores(self) -> Tensor | None:
        """The metric of the original."""
        return None if self.terms.asked.evaluate is None else scores_of(self.model, self.terms.asked.evaluate)

    def settle(self, choose: Callable[[], Sequence[Option]]) -> None:
        """Correct the damages of options by what chains do to the outputs, until all that is chosen has been seen to.

        What was seen of one rank of a site holds for its others, and the median of what was seen for sites without.
        """
        for _ in range(_ROUNDS):
            options = [self._instead(site, chosen) for site, chosen in zip(self.sites, choose(), strict=True)]
            new = [option for option in options if self._unseen(option)]
            if not new:
                break
            for done, option in enumerate(new):
                self.progress("fit", done, len(new))
                self._see(option)
            self.progress("fit", len(new), len(new))
            found = list(self._ratios.values())
            typical = statistics.median(found) if found else 1.0
            self.sites = [
                options.with_damages([self._corrected(option, typical) for option in options.options])
                for options in self.sites
            ]

    def _instead(self, site: Options, chosen: Option) -> Option:
        """Return what is to be seen of a site: what is chosen, or if that is dense some chain, of a site unseen."""
        seen = any(name == site.site.name for name, _ in self._ratios)
        return chosen if seen or chosen.factorization is not None else site.middle

    def _corrected(self, option: Option, typical: float) -> float:
        if option.factorization is None:
            return option.damage
        key = _key(option)
        return self._expected[key] * self._ratios.get(key[:2], typical)

    def _unseen(self, option: Option) -> bool:
        """Whether the effect of an option is to be measured; chains of large convolutions take long to fit."""
        if option.factorization is None or not option.damage > 0 or _key(option) in self._seen:
            return False
        weights = self._spots[option.site].site.operator.kernel.numel()
        return weights <= (_LARGE if option.factorization == "svd" else _SMALL)

    def _see(self, option: Option) -> None:
        self._seen.add(_key(option))
        chain, site = self._fit(option, None if self.made_up else self._data), self._spots[option.site].site
        if chain is None:
            return
        if not self.made_up and site.operator.bias is None and option.site in self._data.centred:
            chain = correct_bias(chain, site.operator, self._data.moments[option.site])  # as what follows will
        ratio = self._effects.of(option.site, chain) ** 2 / self._expected[_key(option)]
        self._ratios[_key(option)[:2]] = ratio if ratio < _WORST else _WORST  # or not finite

    def _options(self, name: str) -> Options | Refusal:
        if name not in self._data.moments:
            return Refusal("no calibration input reaches it")
        ruled = self.terms.ruled
        return options_of(
            self._spots[name].site,
            self._data.moments[name],
            self.terms.prices,
            factorization=self.terms.factorization if ruled is None else ruled[name].factorization or "auto",
            multiple=self.terms.multiple,
            centred=name in self._data.centred,
        )

    def compare(self, chosen: Sequence[Option], goal: float) -> Comparison:
        """Return how fast a choice makes the whole model; known from another time, perhaps.

        How fast it is does not depend on the values of its factors, so that nothing is fitted.
        """

        def measure() -> Comparison:
            return _comparison(self.clock.time(self._sketch(chosen), goal=goal))

        changes = [[o.site, o.factorization, list(o.ranks or ())] for o in chosen if o.factorization is not None]
        found = self.terms.latencies.recall(
            Comparison,
            self.clock.structure | {"changes": changes},
            measure,
            keep=lambda comparison: comparison.high < _SURE * comparison.low,
        )
        self._compared[_keys(chosen)] = found.speedup
        if (saved := self._saved(chosen)) > 0:
            self._realised = (found.dense_s - found.chain_s) / saved
        return found

    def expected(self, chosen: Sequence[Option], seconds: float) -> float:
        """Return the speed-up to expect of a choice, where the original takes so many seconds.

        It is what a model with random factors has shown, of this choice, or of how much of what sites save alone they
        save together.
        """
        return self._compared.get(_keys(chosen)) or seconds / (seconds - self._realised * self._saved(chosen))

    def _saved(self, chosen: Sequence[Option]) -> float:
        dense = {site.site.name: site.dense.cost for site in self.sites}
        return sum(dense[option.site] - option.cost for option in chosen)

    def _sketch(self, chosen: Sequence[Option]) -> Any:
        """Return a copy of the model with chains of the right shapes, which take as long as those that are fitted."""
        work = (option for option in chosen if option.factorization is not None)
        return self._spliced({o.site: _random_chain(self._spots[o.site].site.operator, o) for o in work})

    @property
    def staged(self) -> bool:
        """Whether chains are fitted in more than one stage; ``rough`` gives another model than ``build`` then."""
        return not self.made_up and len(self._data.stages(len(self.sites), self.terms.asked.stages)) > 1

    def rough(self, chosen: Sequence[Option]) -> Any:
        """Return what ``build`` does, but fitted in one stage, which is quick: chains are known from time to time."""
        fits = {o.site: self._fit(o, self._data) for o in chosen if o.factorization is not None}
        if not fits:
            return self.model
        model = self._spliced({name: chain for name, chain in fits.items() if chain is not None})
        self._data.correct(model, self.progress)
        return model

    def build(self, chosen: Sequence[Option]) -> Any:
        """Return a copy of the model with these options, their factors fitted to the data, batch norms re-estimated."""
        work = tuple(option for option in chosen if option.factorization is not None)
        if not work:
            return self.model
        if _keys(work) != self._latest:
            self._built = self.fitted(work).model  # the last one only: models are large
            if self._built is None:
                fitted = self._fitted[_keys(work)]
                self._built = self._spliced({name: part.chain for name, part in fitted.made.items()})
                if fitted.way != "plain":
                    self._data.correct(self._built, self.progress)
            self._latest = _keys(work)
        return self._built

    def reach(self, chosen: Sequence[Option], speedup: float) -> None:
        """Note that a choice is within reach: its speed-up, and the error of its outputs."""
        if _keys(chosen) not in self._reached:
            self._reached[_keys(chosen)] = speedup, self.held_out.error(self.build(chosen))[0]

    @property
    def reached(self) -> list[tuple[float, float]]:
        """The speed-ups that were within reach, with the output error of each."""
        return sorted(self._reached.values())

    def change(self, chosen: Sequence[Option]) -> Any:
        """Make the model itself what ``build`` returns, and return it; nothing can be measured of the original then."""
        built = self.build(chosen)
        changed = self._spliced(self.chains(chosen), inplace=True)
        changed.load_state_dict(built.state_dict())
        return changed

    def _spliced(self, chains: Mapping[str, Chain], *, inplace: bool = False) -> Any:
        graph = open_model(self.model, self.inputs, copies=not inplace, inplace=inplace)
        spots = {spot.site.name: spot for spot in find(graph.flow).placements}
        for name, chain in chains.items():
            graph.apply(Replace(spots[name], chain))
        return graph.finish()

    def fitted(self, chosen: Sequence[Option]) -> Fitted[_Part]:
        """Return the chain of each site that gets one, and the model with them where it was not made before."""
        work = [option for option in chosen if option.factorization is not None]
        keys = _keys(work)
        if keys in self._fitted:
            return self._fitted[keys]

        def fit(at: int, data: SiteData | None) -> dict[str, _Part]:
            chain = self._fit(work[at], data)
            return {} if chain is None else {work[at].site: _Part(chain)}

        def build(made: Mapping[str, _Part]) -> Any:
            return self._spliced({name: part.chain for name, part in made.items()})

        units = [frozenset({option.site}) for option in work]
        loop = Fitting(self._data, self.held_out, units, fit, build, self.progress)
        if self.made_up:  # what is fitted to made-up inputs is near to the original on them alone
            found = loop.plain()
        else:
            found = loop.run(self._data.stages(len(work), self.terms.asked.stages), plain=True)
        self._fitted[keys] = replace(found, model=None)
        return found

    def chains(self, chosen: Sequence[Option]) -> dict[str, Chain]:
        """Return the chain of each site that gets one."""
        return {name: part.chain for name, part in self.fitted(chosen).made.items()}

    def _fit(self, option: Option, data: SiteData | None) -> Chain | None:
        """Return the chain of an option for some data; None where the method finds no good factors."""
        key, clean = _key(option), data is None if self.made_up else data is self._data
        if clean and key in self._clean:
            return self._clean[key]
        site, solver = self._spots[option.site].site, self.terms.asked.solver
        found = plain(site, *key[1:], solver) if data is None else data.fit(site, *key[1:], solver)
        if isinstance(found, Refusal):
            self.reasons[option.site] = found.reason
        chain = None if isinstance(found, Refusal) else found
        if clean:
            self._clean[key] = chain
        return chain

    def weight_errors(self, chosen: Sequence[Option]) -> dict[str, float]:
        """Return the relative error of the weight of each site that has a chain."""
        return {name: weight_error(self._spots[name].site, chain) for name, chain in self.chains(chosen).items()}

    def plan(self, chosen: Sequence[Option]) -> Plan:
        """Return the decisions for all sites, dense where no chain is chosen, with the reasons."""
        by_name = {options.site.name: options for options in self.sites}
        choice, chains = {option.site: option for option in chosen}, self.chains(chosen)
        decisions = []
        for name, spot in self._spots.items():
            site = spot.site
            measured = self.terms.prices.measured
            dense = by_name[name].dense.cost if measured and name in by_name else None
            decision = Decision(name, dense_parameters=site.parameters, dense_macs=site.macs, dense_latency=dense)
            option, chain = choice.get(name), chains.get(name)
            if option is None or chain is None:
                reason = self.reasons.get(name, "every chain would cost more of the promise than it gains")
                decisions.append(replace(decision, reason=reason))
                continue
            decisions.append(
                replace(
                    decision,
                    factorization=option.factorization,
                    rank=option.ranks,
                    error=option.damage**0.5,
                    parameters=chain.parameters,
                    macs=sum(chain.macs(shape) for shape in site.input_shapes),
                    latency=option.cost if measured else None,
                )
            )
        return Plan(tuple(decisions), ranks="auto")


def _key(option: Option) -> _Key:
    assert option.factorization is not None
    assert option.ranks is not None
    return option.site, option.factorization, option.ranks


def _keys(chosen: Sequence[Option]) -> tuple[_Key, ...]:
    return tuple(_key(option) for option in chosen if option.factorization is not None)


def _comparison(timing: Timing) -> Comparison:
    first, second = (model.median_s for model in timing.models)
    found = timing.comparisons[0]
    return Comparison(first, second, found.speedup, found.low, found.high, found.verdict)


def _random_chain(operator: Operator, option: Option) -> Chain:
    """Return the chain of an option with random numbers, scaled so that activations keep about their size."""
    assert option.factorization is not None
    assert option.ranks is not None
    method, like = named(option.factorization), operator.weight
    generator = torch.Generator().manual_seed(0)
    shapes = method.shapes(tuple(operator.kernel.shape), option.ranks)
    factors = [torch.randn(shape, generator=generator).to(like) * math.prod(shape[2:]) ** -0.5 for shape in shapes]
    return method.assemble(operator, factors, option.ranks)
