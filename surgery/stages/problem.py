"""The question and the answer of planning stages: what has to be cut, and which operation goes to which stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from surgery.errors import InputError
from surgery.sites.network import Network

__all__ = ["Assignment", "Balance", "Problem", "Repeated", "Ties"]

Balance: TypeAlias = Literal["time", "params", "memory"]
Ties: TypeAlias = Literal["copy", "together"]


@dataclass(frozen=True, eq=False)
class Problem:
    """A network that is to be cut into stages, and what makes a cut a good one.

    ``seconds`` has the time of each operation. ``link`` is the speed between two stages in bytes a second; with None,
    sending costs nothing. ``memory`` is the most bytes that a stage may hold: its tensors, and the values that it takes
    and gives. The largest stage is made as small as can be, in the measure of ``balance``:

    - ``time``: seconds of its operations, plus the bytes that it receives and sends over the link;
    - ``params``: bytes of its tensors;
    - ``memory``: bytes of its tensors, and of the values that it takes and gives.

    A value that later stages read leaves its own stage once, however many they are (it is put where all can take it),
    and comes into each of them once; with ``relay``, it goes from stage to stage until the last that reads it, and each
    stage on its way takes it once and sends it once. All parts of planning count like this. A tensor that several
    operations read is in each of their stages, or, if ``ties`` is ``together``, those operations stay in one stage. The
    inputs and outputs of the whole network cost nothing.

    Raises:
        InputError: a number or a choice that cannot be used.
    """

    network: Network
    seconds: tuple[float, ...]
    stages: int
    link: float | None = None
    memory: int | None = None
    balance: Balance = "time"
    relay: bool = False
    ties: Ties = "copy"

    def __post_init__(self) -> None:
        if not self.network.operations:
            raise InputError("a network without operations", allowed="one operation or more")
        if len(self.seconds) != len(self.network.operations):
            what = f"{len(self.seconds)} times for {len(self.network.operations)} operations"
            raise InputError(what, allowed="one time an operation")
        if not all(math.isfinite(time) and time >= 0 for time in self.seconds):
            raise InputError("a time of an operation is negative or not finite", allowed="seconds, 0 or more")
        if self.stages < 1:
            raise InputError(f"stages={self.stages}", allowed="1 or more")
        if self.link is not None and not (math.isfinite(self.link) and self.link > 0):
            raise InputError(f"link={self.link}", allowed="bytes a second, more than 0, or None")
        if self.memory is not None and self.memory < 1:
            raise InputError(f"memory={self.memory}", allowed="bytes, 1 or more, or None")
        if self.balance not in get_args(Balance):
            raise InputError(f"balance={self.balance!r}", allowed=", ".join(get_args(Balance)))
        if self.ties not in get_args(Ties):
            raise InputError(f"ties={self.ties!r}", allowed=", ".join(get_args(Ties)))


@dataclass(frozen=True)
class Repeated:
    """A tensor that lies in several stages: its names, its size in bytes, and the numbers of these stages."""

    names: tuple[str, ...]
    bytes: int
    stages: tuple[int, ...]


@dataclass(frozen=True)
class Assignment:
    """The stage of each operation, and what each stage costs.

    ``seconds`` is the time of the operations of each stage. ``received`` and ``sent`` are the bytes that it takes from
    earlier stages and gives to later ones, ``tensors`` the bytes of its parameters, buffers and constants, and
    ``memory`` these and the values that it takes and gives. ``loads`` is each stage in the measure of the problem's
    ``balance``, in seconds or in bytes.
    No cut whatever has a largest load below ``bound``; with ``proven``, none is better than this one by more than two
    millionths. ``order`` names the order of operations, or the method, that led to it.
    """

    stage_of: tuple[int, ...]
    seconds: tuple[float, ...]
    received: tuple[int, ...]
    sent: tuple[int, ...]
    tensors: tuple[int, ...]
    memory: tuple[int, ...]
    loads: tuple[float, ...]
    bound: float
    proven: bool
    order: str
    repeated: tuple[Repeated, ...] = ()

    @property
    def bottleneck(self) -> float:
        """The largest load of a stage, in seconds or in bytes."""
        return max(self.loads)

    @property
    def gap(self) -> float | None:
        """How far the bottleneck lies above the bound, as a share of it: 0 if proven, None if the bound is 0."""
        if self.proven or self.bottleneck <= self.bound:
            return 0.0
        return self.bottleneck / self.bound - 1 if self.bound > 0 else None
