"""The history of a run: one frozen row for each epoch, with the event after that epoch if there was one; and a plot."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import InputError
from surgery.passes.results import Change
from surgery.system.tables import table
from surgery.text import rank_text, seconds, shown
from surgery.training.propose import Forecast

__all__ = ["EpochRow", "Event", "History"]


@dataclass(frozen=True, repr=False)
class Event:
    """One decision: ``kind`` is "decompose", "redecompose", "recompose" or "stay" (dense to the end).

    ``reason`` says why. ``epoch`` is the number of epochs done. ``seconds`` is the time that the decision took,
    including measurements. ``changes`` lists the factored sites with their weight errors. ``notes`` say which state
    could not be carried over, and which sites stay dense.
    """

    kind: str
    epoch: int
    reason: str
    seconds: float = 0.0
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()
    forecast: Forecast | None = None
    channels_last: bool = False

    def __repr__(self) -> str:
        """Return in a few lines what was done and why."""
        head = f"{self.kind} after epoch {self.epoch}: {self.reason}; took {seconds(self.seconds)}"
        rows = [["site", "method", "rank", "weight error"]]
        rows += [[c.site, c.factorization, rank_text(c.rank), f"{c.error:.3f}"] for c in self.changes]
        formats = ["memory format: channels_last"] if self.channels_last else []
        return "\n".join([shown(head), *formats, *([table(rows)] if self.changes else []), *map(shown, self.notes)])


@dataclass(frozen=True)
class EpochRow:
    """One epoch: its seconds, its optimizer steps, the mean stable rank after it relative to the start, and its event.

    ``phase`` is the phase of the model in this epoch: "dense", "factored" or "recomposed". ``seconds`` runs from the
    end of the last ``end_epoch``, or from ``begin_epoch``, to the start of this ``end_epoch``, with all that the loop
    does in between; it does not include the seconds of the event. ``step`` is the median time in seconds from one
    optimizer step to the next; evaluation between epochs does not affect it.
    """

    epoch: int
    phase: str
    seconds: float
    steps: int
    accuracy: float | None = None
    stable_rank: float | None = None
    event: Event | None = None
    step: float | None = None

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step: the median, or else the epoch's seconds over its steps; None without steps."""
        return self.step or (self.seconds / self.steps if self.steps else None)


@dataclass(frozen=True, repr=False)
class History:
    """The rows so far; ``setup`` is the seconds before the first epoch, ``closing`` is the event of ``finish()``.

    ``others`` are the events that did not come at the end of an epoch, such as loading a dense state.
    """

    rows: tuple[EpochRow, ...] = ()
    setup: float = 0.0
    closing: Event | None = None
    others: tuple[Event, ...] = ()

    def __iter__(self) -> Iterator[EpochRow]:
        """Iterate over the rows."""
        return iter(self.rows)

    def __len__(self) -> int:
        """Return the number of epochs."""
        return len(self.rows)

    def __getitem__(self, index: int) -> EpochRow:
        """Return a row."""
        return self.rows[index]

    def __repr__(self) -> str:
        """Return the rows as a table, then each event."""
        head = ["epoch", "phase", "seconds", "step", "accuracy", "stable rank"]
        cells = [head]
        for row in self.rows:
            numbers = [f"{row.seconds:.2f}", seconds(row.step_seconds), _number(row.accuracy), _number(row.stable_rank)]
            cells.append([str(row.epoch), row.phase, *numbers])
        outcome = [self.outcome] if self.outcome else []
        return "\n".join([table(cells), *(repr(event) for event in self.events), *outcome])

    @property
    def events(self) -> tuple[Event, ...]:
        """All events, in order."""
        after_epochs = [row.event for row in self.rows if row.event is not None]
        closing = () if self.closing is None else (self.closing,)
        return (*sorted((*after_epochs, *self.others), key=lambda event: event.epoch), *closing)

    @property
    def seconds(self) -> float:
        """Seconds of the whole run: set-up, epochs and events."""
        return self.setup + sum(row.seconds for row in self.rows) + sum(event.seconds for event in self.events)

    @property
    def outcome(self) -> str:
        """The forecast step time and the measured one, in words; empty before both are known."""
        forecast = next((e.forecast for e in self.events if e.kind == "decompose" and e.forecast), None)
        factored = [row for row in self.rows if row.phase == "factored" and row.steps]
        if forecast is None or not factored:
            return ""
        step = statistics.median(row.step_seconds or 0.0 for row in factored)
        return f"forecast: a step of {seconds(forecast.factored_step)}; outcome: {seconds(step)}"

    def add(self, row: EpochRow) -> History:
        """Return the history with one more row."""
        return replace(self, rows=(*self.rows, row))

    def after_epoch(self, event: Event) -> History:
        """Return the history with the event of the last epoch."""
        return replace(self, rows=(*self.rows[:-1], replace(self.rows[-1], event=event)))

    def between(self, event: Event) -> History:
        """Return the history with an event that did not come at the end of an epoch."""
        return replace(self, others=(*self.others, event))

    def close(self, event: Event) -> History:
        """Return the history with the event after the last epoch."""
        return replace(self, closing=event)

    def plot(self, path: str | Path) -> None:
        """Write a plot of accuracy against wall-clock seconds, with a line at each event, to a file.

        Raises:
            InputError: no accuracy was given to ``end_epoch``, or matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InputError("plots need matplotlib", next_step="pip install matplotlib") from error
        if all(row.accuracy is None for row in self.rows):
            raise InputError("the history has no accuracy", next_step="call end_epoch(epoch, accuracy=...)")
        figure = Figure(figsize=(7, 4), layout="constrained")
        axes = figure.add_subplot(xlabel="wall-clock seconds", ylabel="accuracy")
        times, now = [], self.setup
        for row in self.rows:
            now += row.seconds
            times.append(now)
            if row.event is not None:
                axes.axvline(now, color="0.6", linestyle="--")
                axes.annotate(row.event.kind, (now, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right")
                now += row.event.seconds
        known = [(time, row.accuracy) for time, row in zip(times, self.rows, strict=True) if row.accuracy is not None]
        axes.plot([time for time, _ in known], [value for _, value in known], marker="o")
        axes.grid(alpha=0.3)
        figure.savefig(path)

    def to_values(self) -> dict[str, Any]:
        """Return the history as plain values, for a checkpoint or JSON."""
        return asdict(self)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> History:
        """Return the history from the values that ``to_values`` returned."""
        rows = tuple(EpochRow(**{**row, "event": _event(row["event"])}) for row in values["rows"])
        others = tuple(map(_made, values.get("others", ())))
        return cls(rows, values["setup"], _event(values["closing"]), others)


def _event(row: Mapping[str, Any] | None) -> Event | None:
    return None if row is None else _made(row)


def _made(row: Mapping[str, Any]) -> Event:
    changes = tuple(Change(**{**change, "rank": tuple(change["rank"])}) for change in row["changes"])
    forecast = None if row["forecast"] is None else Forecast(**row["forecast"])
    return Event(**{**row, "changes": changes, "notes": tuple(row["notes"]), "forecast": forecast})


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
