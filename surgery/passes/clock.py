"""The clock: how fast choices make the whole model, timed against the original in new processes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.algebra import Chain, Operator
from surgery.cost.base import BACKENDS, Backend, Comparison, Seconds, make_backend
from surgery.cost.timing import MARGIN
from surgery.errors import InputError
from surgery.factorizations import Ranks, named
from surgery.kinds.inputs import Inputs, flatten_inputs
from surgery.kinds.onnx.layout import digest
from surgery.kinds.registry import Model, kind_of
from surgery.passes.damages import Damages
from surgery.passes.original import Original
from surgery.plans.goal import Goal
from surgery.plans.options import Option
from surgery.runtime.bench import ModelTiming, Timing
from surgery.runtime.export import capture
from surgery.runtime.fresh import Apart
from surgery.system.progress import Progress

__all__ = ["Clock", "Instruments", "ModelTimer", "OpenTimer", "Speeds", "backend_of", "instruments_of"]

_FINAL = 2  # times the seconds for the model that is returned
_PATIENCE = 2  # times that, where it is open whether a target is reached, and twice as much for that model


class Clock:
    """Times changed models against a model, for ``run_s`` seconds each time; the original alone once in its life.

    ``open_timer`` opens what does it, when the first is to be timed.
    """

    def __init__(
        self,
        model: Model,
        inputs: Inputs,
        backend: Backend,
        open_timer: OpenTimer,
        *,
        run_s: float,
        progress: Progress,
    ) -> None:
        self._model, self._inputs, self.backend = model, inputs, backend
        self._open, self._run_s, self._progress = open_timer, run_s, progress

    @cached_property
    def seconds(self) -> float:
        """The median seconds of a run of the original; known from another time, perhaps."""

        def measure() -> Seconds:
            timing = self._original.alone(seconds=self._run_s, progress=self._show)
            return Seconds(timing.median_s)

        return self.backend.recall(Seconds, self.structure, measure).seconds

    @cached_property
    def structure(self) -> dict[str, Any]:
        """All that the latency of the original depends on: its graph, and the shapes of its tensors and inputs."""
        if (onnx := kind_of(self._model).as_onnx(self._model)) is not None:
            feeds = [(list(leaf.shape), str(leaf.dtype)) for leaf in flatten_inputs(self._inputs)]
            return {"processes": hashlib.sha256((digest(onnx) + json.dumps(feeds)).encode()).hexdigest()}
        program, inputs = capture(self._model, self._given)
        tensors = [*program.state_dict.items(), *enumerate(pytree.tree_leaves(inputs))]
        shapes = [(n, list(t.shape), str(t.dtype)) if isinstance(t, Tensor) else (n, repr(t)) for n, t in tensors]
        text = json.dumps([program.graph_module.code, shapes])
        return {"processes": hashlib.sha256(text.encode()).hexdigest()}

    def time(self, changed: Any, *, goal: float | None = None, final: bool = False) -> Timing:
        """Time a changed model against the original, at the inputs at which the result is to be fast.

        It takes longer for a ``final`` model, and where it is open whether a ``goal``, a speed-up, is reached.
        """
        return self._original.against(
            changed,
            goal=goal,
            patience=_PATIENCE * (_FINAL if final else 1),
            seconds=(_FINAL if final else 1) * self._run_s,
            progress=self._show,
        )

    @cached_property
    def _original(self) -> ModelTimer:
        return self._open(self._model, self._given, self.backend)

    @property
    def _given(self) -> Inputs | None:
        return self._inputs if any(self._inputs) else None

    def _show(self, share: float) -> None:
        self._progress("time", round(100 * share), 100)


_SECONDS = 3.0


class ModelTimer(Protocol):
    """Times other models against one; ``surgery.runtime.fresh.Apart`` does so in new processes."""

    def alone(self, *, seconds: float, progress: Callable[[float], None] | None) -> ModelTiming:
        """Return the timing of the model itself."""

    def against(
        self,
        model: Any,
        *,
        goal: float | None,
        patience: int,
        seconds: float,
        progress: Callable[[float], None] | None,
    ) -> Timing:
        """Return the timing of both; longer where it is open whether the ``goal``, a speed-up, is reached."""


OpenTimer: TypeAlias = Callable[[Any, Any, Backend], ModelTimer]


@dataclass(frozen=True)
class Instruments:
    """What measures sites, and ``open_timer(model, inputs, backend)``, which opens what times whole models with it.

    Whole models are timed for ``seconds`` each time. A speed-up that differs by less than ``margin`` is the same.
    """

    backend: Backend = field(default_factory=make_backend)
    open_timer: OpenTimer = Apart
    seconds: float = _SECONDS
    margin: float = MARGIN


def instruments_of(goal: Goal) -> Instruments:
    """Return the instruments that a goal names, or the usual ones.

    Raises:
        InputError: its backend is neither a ``Backend`` nor the name of one.
    """
    return Instruments() if goal.backend is None else Instruments(backend_of(goal.backend))


def backend_of(given: Any) -> Backend:
    """Return the backend that was given, or a new one of this name.

    Raises:
        InputError: an unknown name, or something else.
    """
    if isinstance(given, Backend):
        return given
    if isinstance(given, str):
        return make_backend(given)
    what = f"backend is a {type(given).__name__}"
    raise InputError(
        what, allowed=f"surgery.Backend, {', '.join(BACKENDS)}", next_step="say one of these, or leave it out"
    )


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
        # Example: sites that save 10 ms alone saved 6 ms in the whole model, so that of other choices, too, 0.6 of what
        # their sites save is expected. Of 30 ms, a choice of 20 ms leaves 18: a speed-up of 1.67.
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
    # An output is a sum of I K terms, (g, O, I, *k): divided by their root it is about as large as an input.
    factors = [torch.randn(shape, generator=generator).to(like) * math.prod(shape[2:]) ** -0.5 for shape in shapes]
    return method.assemble(operator, factors, option.ranks)
