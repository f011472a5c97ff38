"""Loads: what each stage of a cut costs, kept right while single blocks move from stage to stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from surgery.stages.blocks import Blocks
from surgery.stages.problem import Problem

__all__ = ["Loads"]


class Loads:
    """The stages of blocks, and the costs of these stages. ``move`` changes only what the moved block touches.

    The numbers that the costs are made of are sums over values and tensors; a move takes the part of each of the
    block's values and tensors out, and puts it in again as it is afterwards.
    """

    def __init__(self, problem: Problem, blocks: Blocks, stage_of: Sequence[int]) -> None:
        self.problem, self.blocks, self.stage_of = problem, blocks, list(stage_of)
        stages = problem.stages
        self.seconds, self.count = [0.0] * stages, [0] * stages
        self.received, self.sent, self.held, self.tensors = ([0] * stages for _ in range(4))
        self._values: list[list[int]] = [[] for _ in range(len(blocks))]
        self._tensors: list[list[int]] = [[] for _ in range(len(blocks))]
        self._readers = [Counter(self.stage_of[b] for b in tensor.blocks) for tensor in blocks.tensors]
        for block, time in enumerate(blocks.seconds):
            self.seconds[self.stage_of[block]] += time
            self.count[self.stage_of[block]] += 1
        for number, value in enumerate(blocks.values):
            self._add(number, 1)
            for block in value.blocks:
                self._values[block].append(number)
        for number, tensor in enumerate(blocks.tensors):
            for stage in self._readers[number]:
                self.tensors[stage] += tensor.bytes
            for block in tensor.blocks:
                self._tensors[block].append(number)

    def _ends(self, number: int) -> tuple[Iterable[int], Iterable[int]]:
        """Return the stages that send a value, and those that receive it."""
        first, *later = (self.stage_of[block] for block in self.blocks.values[number].blocks)
        if self.problem.relay:
            # Example of a value from stage 0 to 2: stages 0 and 1 send it, 1 and 2 receive it, and 1 holds it once.
            last = max(later)
            return range(first, last), range(first + 1, last + 1)
        targets = set(later) - {first}
        return ([first] if targets else []), targets

    def _add(self, number: int, sign: int) -> None:
        size = sign * self.blocks.values[number].bytes
        sources, targets = self._ends(number)
        for stage in sources:
            self.sent[stage] += size
        for stage in targets:
            self.received[stage] += size
        for stage in {*sources, *targets}:
            self.held[stage] += size

    def move(self, block: int, stage: int) -> None:
        """Move a block to a stage. That no value then goes backwards is for the caller to see to."""
        old, time = self.stage_of[block], self.blocks.seconds[block]
        for number in self._values[block]:
            self._add(number, -1)
        self.stage_of[block] = stage
        for number in self._values[block]:
            self._add(number, 1)
        for number in self._tensors[block]:
            readers, size = self._readers[number], self.blocks.tensors[number].bytes
            # The first reader brings the tensor into a stage, and the last one takes it away.
            self.tensors[stage] += size * (not readers[stage])
            readers[stage] += 1
            readers[old] -= 1
            self.tensors[old] -= size * (not readers[old])
        self.seconds[old] -= time
        self.seconds[stage] += time
        self.count[old] -= 1
        self.count[stage] += 1

    def memory(self, stage: int) -> int:
        """Return the bytes that a stage holds: its tensors, and the values that it takes and gives."""
        return self.tensors[stage] + self.held[stage]

    def load(self, stage: int) -> float:
        """Return the cost of a stage in the measure of the problem."""
        if self.problem.balance == "params":
            return self.tensors[stage]
        if self.problem.balance == "memory":
            return self.memory(stage)
        link = self.problem.link
        return self.seconds[stage] + ((self.received[stage] + self.sent[stage]) / link if link else 0.0)

    def excess(self) -> int:
        """Return the bytes above the problem's memory, of all stages together."""
        most = self.problem.memory
        return 0 if most is None else sum(max(0, self.memory(s) - most) for s in range(self.problem.stages))

    def score(self) -> tuple[int, float, int]:
        """Return what is minimised: the bytes above the memory, the largest load, and all bytes sent and received."""
        largest = max(self.load(stage) for stage in range(self.problem.stages))
        return self.excess(), largest, sum(self.sent) + sum(self.received)
