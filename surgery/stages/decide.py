"""Decide which operation goes into which stage: what was asked, checked, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from surgery.errors import InputError
from surgery.sites.network import Network
from surgery.stages.costs import Times
from surgery.stages.named import stages_at
from surgery.stages.problem import Balance, Problem, Ties
from surgery.stages.report import BALANCES, SplitReport
from surgery.stages.solve import assess, solve
from surgery.stages.tally import crossings_of, stages_of, strip_of, tied_notes
from surgery.system.progress import Progress
from surgery.system.units import read_bytes, read_rate

__all__ = ["TIES", "Asked", "Decided", "decide"]

TIES: tuple[Ties, ...] = get_args(Ties)
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
        if at and (prove or ties != "copy"):
            what = "at together with " + ("prove" if prove else f"ties={ties!r}")
            raise InputError(what, allowed="one of them: with cuts at named values nothing is searched for")
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
    progress("cut", 0, 1)
    named = stages_at(network, asked.at) if asked.at else None
    problem = Problem(
        network,
        costs.seconds,
        asked.stages if named is None else max(named, default=0) + 1,
        link=asked.link,
        memory=asked.memory,
        balance=asked.balance,
        relay=asked.relay,
        ties=asked.ties,
    )
    found = solve(problem, prove_seconds=asked.prove) if named is None else assess(problem, named)
    report = SplitReport(
        stages=tuple(stages_of(network, found)),
        crossings=crossings_of(network, found.stage_of),
        layers=strip_of(network, found.stage_of, costs.seconds),
        balance=asked.balance,
        link=asked.link,
        relay=asked.relay,
        memory=asked.memory,
        bottleneck=found.bottleneck,
        bound=found.bound,
        notes=(*costs.notes, *tied_notes(found)),
    )
    return Decided(found.stage_of, report)
