"""Decide which operation goes into which stage: what was asked, checked, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from surgery.errors import InputError
from surgery.sites.network import Network
from surgery.stages.line import cut_in_line
from surgery.stages.measure import Times
from surgery.stages.named import stages_at
from surgery.stages.report import BALANCES, Balance, SplitReport
from surgery.stages.strip import strip_of
from surgery.stages.tally import crossings_of, stages_of, tied_notes, traffic_of
from surgery.system.progress import Progress
from surgery.system.units import read_bytes, read_rate

__all__ = ["TIES", "Asked", "Decided", "Ties", "decide"]

Ties: TypeAlias = Literal["together", "copies"]
TIES: tuple[Ties, ...] = ("together", "copies")
_MOST = 4096


@dataclass(frozen=True)
class Asked:
    """What a split is to be: into how many stages, or at which values, over which link, within how many bytes."""

    stages: int
    at: tuple[str, ...]
    link: float
    memory: int | None
    balance: Balance
    relay: bool
    ties: Ties
    prove: float

    @classmethod
    def read(
        cls,
        *,
        stages: int | None,
        at: Sequence[str],
        link: str | float,
        memory: str | int | None,
        balance: str,
        relay: bool,
        ties: str,
        prove: float,
    ) -> Asked:
        """Return what a user asked for.

        Raises:
            InputError: a value that cannot be used, with what is allowed.
        """
        if stages is not None and (isinstance(stages, bool) or not isinstance(stages, int) or not 1 <= stages <= _MOST):
            raise InputError(f"stages={stages!r}", allowed=f"whole numbers from 1 to {_MOST}")
        if isinstance(at, str) or not all(isinstance(name, str) for name in at):
            raise InputError(f"at={at!r}", allowed="a list of names of values")
        if stages is not None and at:
            raise InputError("stages and at together", allowed="one of them: cuts say how many stages there are")
        known_balance = next((each for each in BALANCES if each == balance), None)
        if known_balance is None:
            raise InputError(f"balance={balance!r}", allowed=", ".join(BALANCES))
        known_ties = next((each for each in TIES if each == ties), None)
        if known_ties is None:
            raise InputError(f"ties={ties!r}", allowed=", ".join(TIES))
        if isinstance(prove, bool) or not isinstance(prove, int | float) or not 0 <= prove < 1e9:
            raise InputError(f"prove={prove!r}", allowed="seconds from 0")
        speed, most = read_rate(link, "link"), None if memory is None else read_bytes(memory, "memory")
        return cls(stages or 2, tuple(at), speed, most, known_balance, bool(relay), known_ties, float(prove))


@dataclass(frozen=True)
class Decided:
    """The number of the stage of each operation, and what it comes to."""

    stage_of: tuple[int, ...]
    report: SplitReport


def decide(network: Network, asked: Asked, costs: Times, progress: Progress) -> Decided:
    """Return the stages of a network.

    Raises:
        InputError: there are no such stages.
    """
    times = costs.seconds
    progress("cut", 0, 1)
    stage_of = stages_at(network, asked.at) if asked.at else _in_line(network, times, asked)
    stages = max(stage_of, default=0) + 1
    crossings = crossings_of(network, stage_of)
    traffic = traffic_of(crossings, stages, relay=asked.relay)
    rows = stages_of(network, stage_of, times, traffic)
    dearest = max(row.predicted_s + (row.bytes_in + row.bytes_out) / asked.link for row in rows)
    report = SplitReport(
        stages=tuple(rows),
        crossings=crossings,
        layers=strip_of(network, stage_of, times),
        balance=asked.balance,
        link=asked.link,
        relay=asked.relay,
        memory=asked.memory,
        bottleneck=dearest,
        bound=max(sum(times) / stages, max(times)),
        notes=(*costs.notes, *tied_notes(network, stage_of)),
    )
    return Decided(tuple(stage_of), report)


def _in_line(network: Network, times: Sequence[float], asked: Asked) -> tuple[int, ...]:
    """Return the stages that are best in the order of the graph."""
    costs = _segment_costs(network, times, asked)
    groups = list(network.together)
    if asked.ties == "together":
        tied: dict[object, set[int]] = {}
        for number, operation in enumerate(network.operations):
            for name in operation.tensors:
                tied.setdefault(network.keys.get(name, name), set()).add(number)
        groups += [frozenset(numbers) for numbers in tied.values()]
    return cut_in_line(network, costs, groups, asked.stages)


def _segment_costs(network: Network, times: Sequence[float], asked: Asked) -> npt.NDArray[np.float64]:
    """Return the cost of the operations from i to before j as one stage; infinite for none, or too many bytes."""
    count = len(network.operations)
    weights = np.array([sum(network.bytes_of.get(name, 0) for name in op.tensors) for op in network.operations])
    spent, held = (np.concatenate([[0.0], np.cumsum(each)]) for each in (np.array(times), weights))
    seconds, size = spent[None, :] - spent[:, None], held[None, :] - held[:, None]
    moved = np.zeros((count + 1, count + 1))
    for value, readers in network.readers.items():
        if value not in network.producer:
            continue
        source, each = network.producer[value], network.values[value].bytes
        moved[: source + 1, source + 1 : max(readers) + 1] += each
        for before, reader in zip((source, *readers), readers, strict=False):
            moved[before + 1 : reader + 1, reader + 1 :] += each
    found = seconds + moved / asked.link if asked.balance == "time" else size
    too_large = np.tril(np.ones_like(moved, dtype=bool)) | (size > (asked.memory or np.inf))
    return np.where(too_large, np.inf, found)
