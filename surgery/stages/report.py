"""What came of a split, as values: the time, the bytes and the weights of each stage, and how near the bound it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

from surgery.stages.problem import Balance
from surgery.system.tables import table
from surgery.text import seconds, size

__all__ = ["BALANCES", "Crossing", "SplitReport", "StageReport", "StripLayer"]

BALANCES: tuple[Balance, ...] = get_args(Balance)
_EQUAL = 5e-4  # a share that is printed as 0.0 %


@dataclass(frozen=True)
class StageReport:
    """One stage. ``predicted_s`` and ``measured_s`` are the seconds of one run, without transfers.

    ``first`` and ``last`` name two of its ``operations``. ``tensor_bytes`` are those of its parameters, buffers and
    constants; one that is read in several stages counts in each. ``measured_s`` is None unless the stage was run.
    """

    operations: int
    first: str
    last: str
    macs: int
    tensor_bytes: int
    bytes_in: int
    bytes_out: int
    predicted_s: float
    measured_s: float | None = None


@dataclass(frozen=True)
class Crossing:
    """A value that is sent: its name, its bytes, the stage that gives it, and the stages that take it."""

    value: str
    bytes: int
    source: int
    targets: tuple[int, ...]


@dataclass(frozen=True)
class StripLayer:
    """A layer with what is computed right after it, in the order of the stages.

    ``bytes_after`` are those of all values that a cut behind it would send on.
    """

    name: str
    stage: int
    seconds: float
    bytes_after: int


@dataclass(frozen=True)
class SplitReport:
    """The stages of a split, what crosses between them, and what it was made for.

    ``bottleneck`` is the cost of the dearest stage: by ``balance``, its predicted seconds with its transfers over a
    link of ``link`` bytes a second; the bytes of its parameters; or the bytes that it needs in all. ``bound`` is
    proven: no split into as many stages costs less. It is None where none was sought. A ``relay`` sends each value
    through all stages on its way. ``notes`` say what else one should know, as of weights that are in two stages.
    """

    stages: tuple[StageReport, ...]
    crossings: tuple[Crossing, ...]
    layers: tuple[StripLayer, ...]
    balance: Balance
    link: float
    relay: bool
    memory: int | None
    bottleneck: float
    bound: float | None
    notes: tuple[str, ...] = ()

    @property
    def gap(self) -> float | None:
        """The share by which the bottleneck is above the bound; None without a bound."""
        if self.bound is None or not self.bound > 0:
            return None if self.bound is None else 0.0
        return max(0.0, self.bottleneck / self.bound - 1)

    @property
    def slowest(self) -> int:
        """The number of the stage that takes longest, by prediction and with its transfers."""
        return max(range(len(self.stages)), key=lambda at: self.period(at))

    def period(self, at: int) -> float:
        """Return the predicted seconds of a stage with its transfers: a pipeline gives one result in each."""
        stage = self.stages[at]
        return stage.predicted_s + (stage.bytes_in + stage.bytes_out) / self.link

    @property
    def verdict(self) -> str:
        """The bottleneck in words, and how far it is above the bound."""
        said = seconds(self.bottleneck) if self.balance == "time" else size(self.bottleneck)
        what = {
            "time": f"slowest stage, with transfers at {size(self.link)}/s",
            "params": "most parameters in a stage",
            "memory": "most memory of a stage",
        }[self.balance]
        if self.gap is None:
            return f"{what}: {said}; no bound was sought"
        share = f"{100 * self.gap:.1f}" if self.gap < 0.1 else f"{100 * self.gap:.0f}"
        near = "proven to be the least" if self.gap < _EQUAL else f"{share} % above the proven bound"
        return f"{what}: {said}, {near}"

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table of the stages, headings first; numbers have their units."""
        timed = any(stage.measured_s is not None for stage in self.stages)
        head = ("stage", "from", "to", "operations", "weights", "in", "out", "predicted", *["measured"] * timed)
        found = [head]
        for at, stage in enumerate(self.stages):
            sizes = (size(each) for each in (stage.tensor_bytes, stage.bytes_in, stage.bytes_out))
            times = (stage.predicted_s, *[stage.measured_s] * timed)
            found.append((str(at), stage.first, stage.last, str(stage.operations), *sizes, *map(seconds, times)))
        return found

    def lines(self) -> list[str]:
        """Return what is said beneath the table: what crosses, the verdict, and the notes."""
        found = []
        for each in self.crossings:
            targets = " and ".join(map(str, each.targets))
            found.append(f"{each.value}, {size(each.bytes)}, goes from stage {each.source} to {targets}")
        return [*found, self.verdict, *self.notes]

    def __str__(self) -> str:
        return "\n".join([table(self.rows()), "", *self.lines()])

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values; times in seconds, sizes in bytes."""
        return asdict(self) | {"gap": self.gap}
