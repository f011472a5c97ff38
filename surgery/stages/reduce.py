"""Reduce a problem: operations that take hardly any time are planned with the operation before or after them.

Two kinds of operations can be moved into the stage of another without a stage becoming dearer by more than their own
seconds, whatever the cut is:

    forward    v reads one value a that is computed, nothing else reads a, and v gives one value that is no larger:
               v can go where a is given, and then v's value is sent in the place of a
    backward   u reads nothing that is computed, gives one value, and one of its readers comes before all others:
               u can go where that reader is, and then its value is sent no further than before

    linear -> view -> transpose -> matmul becomes [linear view transpose] -> matmul

Neither reads a tensor. So the best cut that keeps such operations together is dearer than the best of all cuts by their
seconds in sum at most, and that sum is held below a share of the bound. A stage may lose all its operations in this
way: to bound all cuts, those into fewer stages count too.
"""

from __future__ import annotations

from dataclasses import replace

from surgery.sites.network import Network
from surgery.stages.problem import Problem

__all__ = ["reduced"]


def reduced(problem: Problem, *, loss: float) -> tuple[Problem, float]:
    """Return a problem that keeps cheap operations together with others, and by how much its optimum may be dearer.

    ``loss`` is the most seconds that this may be. In other measures than time nothing is lost.
    """
    network = problem.network
    fixed = frozenset().union(*network.together)  # these cannot be moved alone
    pairs = {one: other for one, other in (_forward(network) | _backward(network)).items() if one not in fixed}
    groups, lost = [], 0.0
    for number in sorted(pairs, key=lambda one: (problem.seconds[one], one)):
        seconds = problem.seconds[number] if problem.balance == "time" else 0.0
        if lost + seconds > loss:
            break
        lost += seconds
        groups.append(frozenset({number, pairs[number]}))
    return replace(problem, network=replace(network, together=(*network.together, *groups))), lost


def _small(network: Network, number: int) -> bool:
    """Whether an operation reads no tensors and gives one value."""
    operation = network.operations[number]
    return not operation.tensors and len(operation.gives) == 1


def _forward(network: Network) -> dict[int, int]:
    """Return the operations that can go to the one before them, and which that is."""
    found = {}
    outputs = set(network.outputs)
    for number, operation in enumerate(network.operations):
        reads = {value for value in operation.reads if value in network.producer}
        if not _small(network, number) or len(reads) != 1:
            continue
        (value,), (given,) = reads, operation.gives
        alone = network.readers[value] == (number,) and value not in outputs
        if alone and network.values[given].bytes <= network.values[value].bytes:
            found[number] = network.producer[value]
    return found


def _backward(network: Network) -> dict[int, int]:
    """Return the operations that can go to the first that reads them, and which that is."""
    behind = _behind(network)
    found = {}
    for number, operation in enumerate(network.operations):
        if not _small(network, number) or any(value in network.producer for value in operation.reads):
            continue
        # The first reader has the least number, so that no other can be before it. Bit n of ``behind`` is operation n:
        # of a -> b -> c they are 110, 100 and 000.
        readers = network.readers.get(operation.gives[0], ())
        if readers and all(behind[readers[0]] >> other & 1 for other in readers[1:]):
            found[number] = readers[0]
    return found


def _behind(network: Network) -> list[int]:
    """Return the operations that depend on each operation, as the bits of a number."""
    behind = [0] * len(network.operations)
    for number in reversed(range(len(network.operations))):
        for value in network.operations[number].gives:
            for reader in network.readers.get(value, ()):
                behind[number] |= behind[reader] | 1 << reader
    return behind
