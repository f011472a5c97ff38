"""Low-rank training: decompose a network partway through, train its factors, recompose it at the end.

After Elhoushi et al. 2019, in one run and in the user's own loop. A switch loses only what the factors leave out of the
weights: the model and the optimizer stay the same objects, the optimizer's moments follow the chain rule, schedulers
and scalers continue. Each decision rests on measurements, and the history reports it.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import nn
from torch.optim import Optimizer

from surgery.errors import InputError
from surgery.passes.job import read_patterns
from surgery.passes.recompose import recompose
from surgery.plans.plan import Plan
from surgery.plans.rules import RankSpec
from surgery.training.history import EpochRow, Event, History
from surgery.training.hooks import WeakHook
from surgery.training.optimizer import check_lists
from surgery.training.propose import (
    ForTraining,
    Request,
    SwitchPlan,
    TrainingEvidence,
    propose,
    refused,
    shrunk,
    try_formats,
)
from surgery.training.ranks import Survey, keep_dense
from surgery.training.schedule import Schedule, SpectrumLog, stable_rank
from surgery.training.structure import has_dense
from surgery.training.trainee import Trainee, inputs_for
from surgery.training.wrappers import Ending, warn_of_no_end

__all__ = ["LowRankTraining"]

_VERSION = 1


@dataclass(frozen=True)
class _Due:
    """A decision that is due: the epochs done (0 if nothing is due), and the seconds and steps of the last epoch."""

    done: int = 0
    seconds: float = 0.0
    steps: int = 0


_NOTHING = _Due()
_log = logging.getLogger(__name__)


class LowRankTraining:
    """One training run that decomposes the model when this saves time, and recomposes it at the end.

        run = LowRankTraining(model, optimizer, example_inputs, epochs=20)
        for epoch in range(20):
            train_one_epoch(run.model, run.optimizer)
            run.end_epoch(epoch)
        run.finish()

    ``model`` is edited in place and stays the same object; only a DistributedDataParallel wrapper is replaced, so use
    ``run.model`` in each epoch. ``phase`` is "dense", "factored" or "recomposed"; ``plan`` says what is factored.

    A site stays dense, with the reason in the plan, if its weight does not train (it needs no gradient, or is in no
    param group) or has a hook on its gradient, which factors would not have. A state of the dense model, such as the
    best so far, may be loaded at any time: ``load_state_dict`` first recomposes a factored model in place.

    Args:
        model: an nn.Module; it may be compiled, or distributed (then all processes make the same calls).
        optimizer: an optimizer that finds its parameters in ``param_groups`` alone: not LBFGS, and not a wrapper around
            another optimizer. The state of SGD, Adam, AdamW, NAdam and RAdam crosses the switch; that of other
            optimizers starts anew.
        example_inputs: one training batch: a tensor, a tuple of arguments, or a dict of keyword arguments.
        decompose_at: epochs to train before the switch, or "auto": when the spectra of the weights have settled, and at
            the latest after a twentieth of the epochs. In a sequence such as ``(2, 5)``, the later entries are numbers
            of epochs after which the same rule chooses ranks anew; ranks that fell are lowered.
        ranks: "auto" (by spectrum and measured time), or any rule that ``surgery.plan`` takes.
        factorization: "auto", or a name in ``surgery.FACTORIZATIONS``.
        recompose_at: a number of epochs, "end", or None for never. "end" is after ``epochs``; if ``epochs`` is not
            given, it is at ``finish()``, and a warning says so. A run also warns if it is garbage-collected, or if the
            program ends, before its model is recomposed.
        epochs: total number of epochs. The forecast of the time saved needs it.
        include, exclude: glob patterns of site names.
        memory_format: "auto" (measured; it may set channels_last on a model in another format), or None to keep the
            model's own.
        frobenius_decay: decay the weight that the factors compose to, in place of the factors. None means yes for SGD,
            Adam, AdamW, NAdam and RAdam that are not fused, whose way to decay is known.

    If the epoch or the ranks are ``"auto"``, a forecast is made first, and there is no switch if it would not pay.

    Raises:
        InputError: an argument is not allowed; the optimizer keeps its own list of parameters; the model is sharded.
        CaptureError: the graph of the model can be neither traced nor exported.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_inputs: Any,
        *,
        decompose_at: int | str | Sequence[int | str] = "auto",
        ranks: RankSpec = "auto",
        factorization: str = "auto",
        recompose_at: int | str | None = "end",
        epochs: int | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        memory_format: str | None = "auto",
        frobenius_decay: bool | None = None,
    ) -> None:
        start = time.perf_counter()
        if memory_format not in ("auto", None):
            raise InputError(f"memory_format={memory_format!r}", allowed="'auto', None")
        self._schedule = Schedule.read(decompose_at, recompose_at, epochs)
        check_lists(optimizer)
        warn_of_no_end(recompose_at, epochs)
        patterns = read_patterns(include, "include"), read_patterns(exclude, "exclude")
        self._request = Request(ranks, factorization, *patterns)
        self._trainee = Trainee(model, optimizer, example_inputs, frobenius_decay=frobenius_decay)
        self._measured = self._request.automatic or self._schedule.decompose_at == "auto"
        self._decided, self._phase, self._due = False, "dense", _NOTHING
        self._formats = [self._trainee.channels_last]
        if memory_format == "auto" and self._measured and not self._trainee.channels_last:
            self._try_formats()
        self._spectra = SpectrumLog((self._stable_ranks(),) if self._measured else ())
        self.history = History(setup=time.perf_counter() - start)
        self._ends: list[float] = []
        loading = WeakHook(self._before_load)
        self._handles = (
            optimizer.register_step_post_hook(WeakHook(self._count)),
            self._trainee.root.register_load_state_dict_pre_hook(loading),
        )
        self._ending = Ending()
        self._ending.watch(self)
        self._mark = time.perf_counter()

    @property
    def model(self) -> nn.Module:
        """The model to train, inside its wrappers."""
        return self._trainee.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer: always the same object."""
        return self._trainee.optimizer

    @property
    def plan(self) -> Plan:
        """The plan of the last switch, also after the model was recomposed; empty before the first switch."""
        return self._trainee.plan

    @property
    def roots(self) -> tuple[nn.Module, ...]:
        """The modules that switch together: the model without its wrappers, then the mirrors without theirs."""
        return self._trainee.root, *self._trainee.mirrors

    @property
    def phase(self) -> str:
        """The phase of the model: "dense", "factored", or "recomposed"."""
        return self._phase

    def end_epoch(self, epoch: int, *, accuracy: float | None = None) -> Event | None:
        """Record the end of an epoch (the first is 0), and decompose or recompose if that is due.

        Returns the event if there was one, and logs it; its text says what was done and why. ``accuracy`` goes to the
        history. The optimizer should have used its gradients already: exchanged parameters have none.
        """
        self.note_epoch(epoch, accuracy=accuracy)
        return self.switch()

    def note_epoch(self, epoch: int, *, accuracy: float | None = None) -> None:
        """Record the end of an epoch, and leave a switch that is due to ``switch`` or ``begin_epoch``.

        A trainer that saves after the end of an epoch then saves the weights that it has scored.
        """
        # The median from one step to the next leaves out pauses in the loop, such as an evaluation. A switch is judged
        # by it; the row has the seconds of the clock.
        seconds, steps = time.perf_counter() - self._mark, len(self._ends)
        step = statistics.median(b - a for a, b in pairwise(self._ends)) if steps > 1 else None
        if self.phase == "dense" and not self._decided and self._measured:
            self._spectra = self._spectra.add(self._stable_ranks())
        self._trainee.end_epoch()
        rank = self._spectra.mean if self.phase == "dense" else None
        self.history = self.history.add(EpochRow(epoch, self.phase, seconds, steps, accuracy, rank, None, step))
        self._due = _Due(epoch + 1, steps * step if step else seconds, steps)
        self._ends, self._mark = [], time.perf_counter()

    def switch(self) -> Event | None:
        """Decompose or recompose if that is due after the recorded epochs; return the event, if there was one."""
        due, self._due, start = self._due, _NOTHING, time.perf_counter()
        event = self._act(due) if due.done else None
        if event is not None:
            self.history = self.history.after_epoch(event)
        self._mark += time.perf_counter() - start  # the next epoch's seconds leave the switch out
        return event

    def begin_epoch(self) -> Event | None:
        """Switch if that is due, and start the clock of the next epoch, which leaves out the time before this call."""
        event = self.switch()
        self._ends, self._mark = [], time.perf_counter()
        return event

    def leave_out(self, seconds: float) -> None:
        """Subtract seconds that have just passed, such as those of a validation, from the running epoch."""
        self._mark += seconds

    def finish(self) -> Event | None:
        """End the run: recompose if ``recompose_at`` is "end", and remove the hooks from model and optimizer."""
        ends = self._schedule.recompose_at == "end"
        event = None if ends else self.switch()  # recomposing would undo a switch that is due at once
        if self.phase == "factored" and ends:
            event = self._recompose(len(self.history), "the training has ended")
            self.history = self.history.close(event)
        for handle in self._handles:
            handle.remove()
        self._trainee.release()
        self._ending.undone = False
        return event

    def mirror(self, copy: nn.Module) -> None:
        """Switch a dense copy of the model, such as an average of its weights, together with the model.

        The factors of the copy start from those of the model and are moved towards the weights of the copy as far as
        they come nearer. So both have the same basis, and averaging can continue. ``copy`` may be an AveragedModel.

        Raises:
            InputError: the model is already factored, or ``copy`` is not a copy of it.
        """
        if self.phase == "factored":
            raise InputError("the model is factored already", next_step="call mirror() before the switch")
        self._trainee.mirror(copy)

    def dense_state(self, root: nn.Module) -> dict[str, Any]:
        """Return the ``state_dict`` of one of ``roots`` in the dense architecture, with its factors composed."""
        inputs = inputs_for(root, self._trainee.root, self._trainee.inputs)
        return (recompose(root, inputs).model if self.phase == "factored" else root).state_dict()

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, with the states of model and optimizer, as tensors and plain values."""
        return {
            "version": _VERSION,
            "phase": self.phase,
            "decided": self._decided,
            "due": dataclasses.astuple(self._due),
            "plan": self.plan.to_json(),
            "formats": list(self._formats),
            "spectra": [dict(row) for row in self._spectra.rows],
            "history": self.history.to_values(),
            "model": self._trainee.root.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue, in a new run on a dense model and its optimizer, the run that the state was taken from.

        The model is given the structure in the state; then the states of model and optimizer are loaded. The caller
        loads schedulers, scalers, random states and mirrors afterwards.

        Raises:
            InputError: the run has already begun, or the state belongs to another model or version.
        """
        if state.get("version") != _VERSION:
            raise InputError("this is not a state of LowRankTraining", next_step="give what state_dict() returned")
        if self.phase != "dense" or len(self.history):
            raise InputError("this run has begun already", next_step="load the state into a new one, on a dense model")
        self._formats = [bool(form) for form in state["formats"]]
        self._trainee.channels_last = self._formats[0]
        # The structure comes first: the states of model and optimizer only fit a model that is factored like theirs.
        self._trainee.restore(Plan.from_json(state["plan"]), factored=state["phase"] == "factored")
        self._trainee.root.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._enter(state["phase"])
        self._decided, self._due = state["decided"], _Due(*state.get("due", ()))
        self._spectra = SpectrumLog(tuple(dict(row) for row in state["spectra"]))
        self.history = History.from_values(state["history"])
        self._ends, self._mark = [], time.perf_counter()

    def _enter(self, phase: str) -> None:
        self._phase = phase
        self._ending.undone = phase == "factored" and self._schedule.recompose_at is not None

    def _before_load(self, root: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
        """Recompose before a state of the dense model is loaded."""
        if self.phase == "factored" and has_dense(state, prefix, self._trainee.record):
            event = self._recompose(len(self.history), "a state of the dense model is loaded")
            self.history = self.history.between(event)

    def _count(self, *_: Any) -> None:
        self._ends.append(time.perf_counter())

    def _try_formats(self) -> None:
        trainee = self._trainee
        self._formats = trainee.agree(try_formats(trainee.root, trainee.inputs) if trainee.leads else None)
        trainee.use_format(self._formats[0])
        if self._formats[0]:
            _log.info("memory format: channels_last, in which the dense model measured faster")

    def _stable_ranks(self) -> dict[str, float]:
        return {site.name: stable_rank(site.operator) for site in self._trainee.sites}

    def _act(self, due: _Due) -> Event | None:
        # Phases go dense -> factored -> recomposed. A decision to stay dense is final (``_decided``), so that each run
        # measures a proposal once.
        if self.phase == "factored":
            reason = self._schedule.recompose_reason(due.done)
            if reason is not None:
                return self._recompose(due.done, reason)
            return self._redecompose(due.done) if due.done in self._schedule.redecompose_at else None
        reason = (
            None if self._decided else self._trainee.agree(self._schedule.decompose_reason(due.done, self._spectra))
        )
        return None if reason is None else self._decompose(due, reason)

    def _decompose(self, due: _Due, reason: str) -> Event:
        start, done = time.perf_counter(), due.done
        survey = self._trainee.survey()
        proposal: SwitchPlan = self._trainee.agree(self._propose(due, survey) if self._trainee.leads else None)
        self._decided, forecast = True, proposal.forecast  # the leading process measured it; all follow it
        if all(decision.dense for decision in proposal.plan):
            why = refused(proposal.plan, survey.left)
            return self._say(Event("stay", done, why, time.perf_counter() - start))
        if forecast is not None and not forecast.pays:
            return self._say(Event("stay", done, forecast.reason, time.perf_counter() - start, forecast=forecast))
        self._formats = [proposal.channels_last]
        self._trainee.channels_last = proposal.channels_last
        why = reason if forecast is None else f"{reason}; {forecast.reason}"
        event = self._factor("decompose", done, why, proposal, start)
        hooked = (f"stays dense: {name}: {reason}" for name, reason in survey.hooked.items())
        return self._say(dataclasses.replace(event, notes=(*event.notes, *hooked)))

    def _factor(self, kind: str, done: int, reason: str, proposal: SwitchPlan, start: float) -> Event:
        changes, notes = self._trainee.to_factors(proposal.plan)
        self._enter("factored")
        dense = [f"stays dense: {decision.site}: {decision.reason}" for decision in self.plan if decision.dense]
        told = (*notes, *dense)
        seconds, form = time.perf_counter() - start, proposal.channels_last
        return Event(kind, done, reason, seconds, changes, told, proposal.forecast, form)

    def _propose(self, due: _Due, survey: Survey) -> SwitchPlan:
        trainee, last = self._trainee, self._schedule.last
        request = self._request.without(survey.hooked)
        if not self._measured:
            plan = ForTraining(request).plan(survey.sites, TrainingEvidence(survey.untrained))
            return SwitchPlan(plan, self._formats[0])
        return propose(
            trainee.root,
            trainee.inputs,
            request,
            log=self._spectra,
            formats=self._formats,
            epoch=(due.seconds, due.steps),
            epochs_left=None if last is None else max(0, last - due.done),
            untrained=survey.untrained,
        )

    def _recompose(self, done: int, reason: str) -> Event:
        start = time.perf_counter()
        notes = self._trainee.to_dense()
        self._enter("recomposed")
        return self._say(Event("recompose", done, reason, time.perf_counter() - start, notes=tuple(notes)))

    def _redecompose(self, done: int) -> Event:
        """Compose all sites and factor them again, each at its new ranks if they are lower, and else at its old ones.

        Sites whose weights no longer train stay composed.
        """
        start, before = time.perf_counter(), self.plan
        notes = self._trainee.to_dense()
        if self._measured:
            self._spectra = self._spectra.add(self._stable_ranks())
        survey = self._trainee.survey()
        proposed = self._propose(_Due(done), survey).plan if self._trainee.leads else None
        plan = keep_dense(shrunk(before, self._trainee.agree(proposed)), survey.untrained)
        lower = "; ".join(before.diff(plan)) or "no site needs less than it has"
        event = self._factor("redecompose", done, lower, SwitchPlan(plan, self._trainee.channels_last), start)
        return self._say(dataclasses.replace(event, notes=(*notes, *event.notes)))

    def _say(self, event: Event) -> Event:
        _log.info("%r", event)
        return event
