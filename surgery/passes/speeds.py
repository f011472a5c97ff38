"""How fast choices make the whole model: timed with factors of random numbers, which take as long as fitted ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.cost.base import Comparison
from surgery.factorizations import Ranks, named
from surgery.passes.clock import Clock
from surgery.passes.damages import Damages
from surgery.passes.original import Original
from surgery.plans.options import Option
from surgery.runtime.bench import Timing

__all__ = ["Speeds"]

_Key: TypeAlias = tuple[tuple[str, str, Ranks], ...]

_SURE = 1.2  # a wider interval is not kept for another time


class Speeds:
    """Times choices among the options of ``damages``, and says what speed-up to expect of others."""

    def __init__(self, original: Original, damages: Damages, clock: Clock) -> None:
        self._original, self._damages, self._clock = original, damages, clock
        self._realised = 1.0  # of what sites save alone, how much they save together
        self._compared: dict[_Key, float] = {}

    def compare(self, chosen: Sequence[Option], goal: float) -> Comparison:
        """Return how fast a choice makes the whole model; known from another time, perhaps.

        How fast it is does not depend on the values of its factors, so that nothing is fitted.
        """

        def measure() -> Comparison:
            return _comparison(self._clock.time(self._sketch(chosen), goal=goal))

        changes = [[o.site, o.factorization, list(o.ranks or ())] for o in chosen if o.factorization is not None]
        found = self._clock.backend.recall(
            Comparison,
            self._clock.structure | {"changes": changes},
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
        dense = {site.site.name: site.dense.cost for site in self._damages.sites}
        return sum(dense[option.site] - option.cost for option in chosen)

    def _sketch(self, chosen: Sequence[Option]) -> Any:
        """Return a copy of the model with chains of the right shapes, which take as long as those that are fitted."""
        work = [option for option in chosen if option.factorization is not None]
        sites = self._original.sites
        return self._original.with_chains({o.site: _random_chain(sites[o.site].operator, o) for o in work})


def _keys(chosen: Sequence[Option]) -> _Key:
    return tuple((o.site, o.factorization, o.ranks or ()) for o in chosen if o.factorization is not None)


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
