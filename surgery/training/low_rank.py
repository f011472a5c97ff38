"""Training that goes on in low rank: decompose a network in mid-run, train its factors, put it back at the end.

After Elhoushi et al. 2019, in one run and in the user's own loop. Nothing is lost at the switch but what the factors
leave out of the weights: the model and the optimizer stay the same objects, moments cross by the chain rule, schedulers
and scalers go on. What is decided is measured before, and told after.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from torch import nn
from torch.optim import Optimizer

from surgery.errors import InputError
from surgery.passes.decompose import RankSpec
from surgery.plans import Plan
from surgery.training.history import EpochRow, Event, History
from surgery.training.propose import Proposal, Sought, plan_for, propose, refused, shrunk, try_formats
from surgery.training.schedule import Schedule
from surgery.training.spectra import SpectrumLog, stable_rank
from surgery.training.trainee import Trainee

__all__ = ["LowRankTraining"]

_VERSION = 1
_log = logging.getLogger(__name__)


class LowRankTraining:
    """One training run that decomposes the model when that pays, and recomposes it at the end.

        run = LowRankTraining(model, optimizer, example_inputs, epochs=20)
        for epoch in range(20):
            train_one_epoch(run.model, run.optimizer)
            run.end_epoch(epoch)
        run.finish()

    ``model`` is edited in place and stays the same object; only a DistributedDataParallel wrapper is made anew, so take
    ``run.model`` in each epoch. ``phase`` is "dense", "factored" or "recomposed"; ``plan`` says what is factored.

    Args:
        model: an nn.Module; may be compiled, or distributed (then all processes make the same calls).
        optimizer: any; the state of SGD, Adam, AdamW, NAdam and RAdam crosses the switch, that of others starts anew.
        example_inputs: one batch as in training: a tensor, a tuple of arguments, or a dict of keyword arguments.
        decompose_at: epochs to train before the switch, or "auto": when the spectra of the weights have settled, and at
            the latest after a twentieth of the epochs.
        ranks: "auto" (by spectrum and measured time), or any of ``surgery.decompose``'s.
        factorization: "auto", or the name of one of ``surgery.FACTORIZATIONS``.
        redecompose_at: epochs done after which ranks are chosen anew, by the same rule, and lowered where they fell.
        recompose_at: "end" (after ``epochs``, or at ``finish()`` where they are not known), epochs done, or None.
        epochs: how many there will be. The forecast of what is saved needs it.
        include, exclude: glob patterns of site names.
        memory_format: "auto" (measured; may set channels_last on a model that is not), or None for the model's own.
        frobenius_decay: decay what the factors compose to, as the weight was before, in the place of the factors. None
            is yes for SGD, Adam, AdamW, NAdam and RAdam that are not fused, whose decay is known.

    With ``"auto"`` for the epoch or the ranks, a forecast is made first, and no switch where it would not pay.

    Raises:
        InputError: arguments that cannot be used; a sharded model.
        CaptureError: the graph of the model can be neither traced nor exported.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        example_inputs: Any,
        *,
        decompose_at: int | str = "auto",
        ranks: RankSpec = "auto",
        factorization: str = "auto",
        recompose_at: int | str | None = "end",
        redecompose_at: Sequence[int] = (),
        epochs: int | None = None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        memory_format: str | None = "auto",
        frobenius_decay: bool | None = None,
    ) -> None:
        start = time.perf_counter()
        if memory_format not in ("auto", None):
            raise InputError(f"memory_format={memory_format!r}", allowed="'auto', None")
        self._schedule = Schedule(decompose_at, recompose_at, epochs, tuple(redecompose_at))
        self._sought = Sought(ranks, factorization, tuple(include), tuple(exclude))
        self._trainee = Trainee(model, optimizer, example_inputs, frobenius_decay=frobenius_decay)
        self._measured = self._sought.automatic or decompose_at == "auto"
        self._decided, self.phase = False, "dense"
        self._formats = [self._trainee.channels_last]
        if memory_format == "auto" and self._measured and not self._trainee.channels_last:
            self._try_formats()
        self._spectra = SpectrumLog((self._stable_ranks(),) if self._measured else ())
        self.history = History(setup=time.perf_counter() - start)
        self._ends: list[float] = []
        self._handle = optimizer.register_step_post_hook(self._count)
        self._mark = time.perf_counter()

    @property
    def model(self) -> nn.Module:
        """The model to train, in its wrappers."""
        return self._trainee.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer: always the same object."""
        return self._trainee.optimizer

    @property
    def plan(self) -> Plan:
        """What is factored and how, or was before the model was recomposed; empty before the first switch."""
        return self._trainee.plan

    def end_epoch(self, epoch: int, *, accuracy: float | None = None) -> Event | None:
        """Note an epoch that is done (the first is 0), and decompose or recompose if it is time to.

        Returns the event, if there was one: its text says what was done and why; it is logged, too. ``accuracy`` is for
        the history. The optimizer's gradients should be used up: parameters that are exchanged have none.
        """
        seconds, steps, phase = time.perf_counter() - self._mark, len(self._ends), self.phase
        step = statistics.median(b - a for a, b in pairwise(self._ends)) if steps > 1 else None
        if self.phase == "dense" and not self._decided and self._measured:
            self._spectra = self._spectra.add(self._stable_ranks())
        self._trainee.end_epoch()
        event = self._act(epoch + 1, (steps * step if step else seconds, steps))
        rank = self._spectra.mean if phase == "dense" else None
        self.history = self.history.add(EpochRow(epoch, phase, seconds, steps, accuracy, rank, event, step))
        self._ends, self._mark = [], time.perf_counter()
        return event

    def finish(self) -> Event | None:
        """End the run: recompose if that was to be done at the end, and take the hooks off the optimizer."""
        event = None
        if self.phase == "factored" and self._schedule.recompose_at == "end":
            event = self._recompose(len(self.history), "the training has ended")
            self.history = self.history.close(event)
        self._handle.remove()
        self._trainee.release()
        return event

    def mirror(self, copy: nn.Module) -> None:
        """Take along a dense copy of the model, as an average of its weights: it gets the same structure at a switch.

        Its factors start from the model's and are moved to the copy's own weights, so that they can be averaged on.

        Raises:
            InputError: the model is not dense any more.
        """
        if self.phase == "factored":
            raise InputError("the model is factored already", next_step="call mirror() before the switch")
        self._trainee.mirror(copy)

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs, the state of model and optimizer included; tensors and plain values."""
        return {
            "version": _VERSION,
            "phase": self.phase,
            "decided": self._decided,
            "plan": self.plan.to_json(),
            "formats": list(self._formats),
            "spectra": [dict(row) for row in self._spectra.rows],
            "history": self.history.to_values(),
            "model": self._trainee.root.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make this run, just made on a dense model and its optimizer, the one that the state was taken from.

        The model gets the structure that it had, then model and optimizer their states. Schedulers, scalers, random
        states and mirrors are the user's to load, afterwards.

        Raises:
            InputError: the run has already begun, or the state is of another model or version.
        """
        if state.get("version") != _VERSION:
            raise InputError("this is no state of a LowRankTraining", next_step="give what state_dict() returned")
        if self.phase != "dense" or len(self.history):
            raise InputError("this run has begun already", next_step="load the state into a new one, on a dense model")
        self._formats = [bool(form) for form in state["formats"]]
        self._trainee.channels_last = self._formats[0]
        self._trainee.restore(Plan.from_json(state["plan"]), factored=state["phase"] == "factored")
        self._trainee.root.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.phase, self._decided = state["phase"], state["decided"]
        self._spectra = SpectrumLog(tuple(dict(row) for row in state["spectra"]))
        self.history = History.from_values(state["history"])
        self._ends, self._mark = [], time.perf_counter()

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

    def _act(self, done: int, epoch: tuple[float, int]) -> Event | None:
        if self.phase == "factored":
            reason = self._schedule.recompose_reason(done)
            if reason is not None:
                return self._recompose(done, reason)
            return self._redecompose(done) if done in self._schedule.redecompose_at else None
        reason = None if self._decided else self._trainee.agree(self._schedule.decompose_reason(done, self._spectra))
        return None if reason is None else self._decompose(done, reason, epoch)

    def _decompose(self, done: int, reason: str, epoch: tuple[float, int]) -> Event:
        start = time.perf_counter()
        proposal: Proposal = self._trainee.agree(self._propose(done, epoch) if self._trainee.leads else None)
        self._decided, forecast = True, proposal.forecast
        if all(decision.dense for decision in proposal.plan):
            return self._say(Event("stay", done, refused(proposal.plan), time.perf_counter() - start))
        if forecast is not None and not forecast.pays:
            return self._say(Event("stay", done, forecast.reason, time.perf_counter() - start, forecast=forecast))
        self._formats = [proposal.channels_last]
        self._trainee.channels_last = proposal.channels_last
        why = reason if forecast is None else f"{reason}; {forecast.reason}"
        return self._switch("decompose", done, why, proposal, start)

    def _switch(self, kind: str, done: int, reason: str, proposal: Proposal, start: float) -> Event:
        changes, notes = self._trainee.down(proposal.plan)
        self.phase = "factored"
        dense = [f"stays dense: {decision.site}: {decision.reason}" for decision in self.plan if decision.dense]
        told = (*notes, *dense)
        seconds, form = time.perf_counter() - start, proposal.channels_last
        return self._say(Event(kind, done, reason, seconds, changes, told, proposal.forecast, form))

    def _propose(self, done: int, epoch: tuple[float, int]) -> Proposal:
        trainee, last = self._trainee, self._schedule.last
        if not self._measured:
            return Proposal(plan_for(trainee.sites, self._sought), self._formats[0])
        return propose(
            trainee.root,
            trainee.inputs,
            self._sought,
            log=self._spectra,
            formats=self._formats,
            epoch=epoch,
            epochs_left=None if last is None else max(0, last - done),
        )

    def _recompose(self, done: int, reason: str) -> Event:
        start = time.perf_counter()
        notes = self._trainee.up()
        self.phase = "recomposed"
        return self._say(Event("recompose", done, reason, time.perf_counter() - start, notes=tuple(notes)))

    def _redecompose(self, done: int) -> Event:
        """Compose, and factor again: at the new ranks where they are lower, and at the old ones elsewhere."""
        start, before = time.perf_counter(), self.plan
        notes = self._trainee.up()
        if self._measured:
            self._spectra = self._spectra.add(self._stable_ranks())
        proposed = self._propose(done, (0.0, 0)).plan if self._trainee.leads else None
        plan = shrunk(before, self._trainee.agree(proposed))
        lower = "; ".join(before.diff(plan)) or "no site needs less than it has"
        event = self._switch("redecompose", done, lower, Proposal(plan, self._trainee.channels_last), start)
        return dataclasses.replace(event, notes=(*notes, *event.notes))

    def _say(self, event: Event) -> Event:
        _log.info("%r", event)
        return event
