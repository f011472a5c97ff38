"""The network: what a graph computes, operation by operation, as plain values. Stages are cut out of it.

A flow tells which operators can be factored; a network tells what has to run, in which order, and what would have to be
sent between two stages. Values are numbered; an operation reads values that are inputs or were given before it:

    Operation("conv", "aten.conv2d", reads=(0,), gives=(1,), tensors=("conv.weight", "conv.bias"), macs=1000)
    Operation("relu", "aten.relu", reads=(1,), gives=(2,))

Parameters, buffers and constants are not values: they lie where they are read, and are never sent.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

__all__ = ["Network", "Operation", "Value"]


@dataclass(frozen=True)
class Value:
    """A value that operations read and give: its name in the graph, and its size in bytes for the example inputs."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Operation:
    """One node of a graph, which a cut leaves whole.

    ``kind`` is the name of its operator. ``tensors`` are the names of the parameters, buffers and constants that it
    reads. ``macs`` counts multiply-accumulates, 0 where none are known.
    """

    name: str
    kind: str
    reads: tuple[int, ...]
    gives: tuple[int, ...]
    tensors: tuple[str, ...] = ()
    macs: int = 0


@dataclass(frozen=True, eq=False)
class Network:
    """The operations of a graph in its own order, each after those whose values it reads.

    ``inputs`` and ``outputs`` are values; an output may be an input, and may stand twice. ``bytes_of`` has the size in
    bytes of each tensor by name, and ``keys`` its key: names with one key are one tensor in memory, as tied weights
    are. ``together`` are groups of operations, by number, that have to stay in one stage: those that read a buffer and
    those that change it, for instance.
    """

    operations: tuple[Operation, ...]
    values: tuple[Value, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    bytes_of: Mapping[str, int] = field(default_factory=dict)
    keys: Mapping[str, Hashable] = field(default_factory=dict)
    together: tuple[frozenset[int], ...] = ()

    @cached_property
    def producer(self) -> Mapping[int, int]:
        """The number of the operation that gives each value; inputs have none."""
        return {value: number for number, operation in enumerate(self.operations) for value in operation.gives}

    @cached_property
    def readers(self) -> Mapping[int, tuple[int, ...]]:
        """The numbers of the operations that read each value, in order, each once."""
        # Example of add(x, x) as operation 2: value x is read by (2,), although it stands twice in ``reads``.
        found: dict[int, list[int]] = {}
        for number, operation in enumerate(self.operations):
            for value in dict.fromkeys(operation.reads):
                found.setdefault(value, []).append(number)
        return {value: tuple(numbers) for value, numbers in found.items()}
