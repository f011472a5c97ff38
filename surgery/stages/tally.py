"""Count what each stage of a cut network computes, holds and sends, for the report of a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from surgery.sites.network import Network
from surgery.stages.report import Crossing, StageReport
from surgery.text import size

__all__ = ["Traffic", "crossings_of", "stages_of", "tied_notes", "traffic_of"]


@dataclass(frozen=True)
class Traffic:
    """The bytes that come into a stage and that leave it, in one run."""

    bytes_in: int
    bytes_out: int


def crossings_of(network: Network, stage_of: Sequence[int]) -> tuple[Crossing, ...]:
    """Return the values that are given in one stage and read in later ones, in the order of the graph."""
    found = []
    for value, readers in sorted(network.readers.items()):
        if value in network.producer:
            source = stage_of[network.producer[value]]
            targets = sorted({stage_of[reader] for reader in readers} - {source})
            if targets:
                each = network.values[value]
                found.append(Crossing(each.name, each.bytes, source, tuple(targets)))
    return tuple(found)


def traffic_of(crossings: Sequence[Crossing], stages: int, *, relay: bool) -> list[Traffic]:
    """Return what each stage receives and sends: each value once to each stage that takes it, or to the next one."""
    received, sent = [0] * stages, [0] * stages
    for each in crossings:
        hops = [(each.source, target) for target in each.targets]
        if relay:
            hops = [(at, at + 1) for at in range(each.source, max(each.targets))]
        for source, target in hops:
            sent[source] += each.bytes
            received[target] += each.bytes
    return [Traffic(*pair) for pair in zip(received, sent, strict=True)]


def stages_of(
    network: Network, stage_of: Sequence[int], times: Sequence[float], traffic: Sequence[Traffic]
) -> list[StageReport]:
    """Return what is to be said of each stage; ``times`` are the predicted seconds of the operations."""
    found = []
    for at, moved in enumerate(traffic):
        numbers = [number for number, stage in enumerate(stage_of) if stage == at]
        own = [network.operations[number] for number in numbers]
        found.append(
            StageReport(
                operations=len(own),
                first=own[0].name if own else "",
                last=own[-1].name if own else "",
                macs=sum(operation.macs for operation in own),
                tensor_bytes=sum(_tensors(network, numbers).values()),
                bytes_in=moved.bytes_in,
                bytes_out=moved.bytes_out,
                predicted_s=sum(times[number] for number in numbers),
            )
        )
    return found


def _tensors(network: Network, numbers: Sequence[int]) -> dict[object, int]:
    """Return the bytes of the tensors that operations read, by their keys, so that each counts once."""
    names = (name for number in numbers for name in network.operations[number].tensors)
    return {network.keys.get(name, name): network.bytes_of.get(name, 0) for name in names}


def tied_notes(network: Network, stage_of: Sequence[int]) -> list[str]:
    """Return one line for each tensor that is in several stages, so that it counts in each."""
    where: dict[object, set[int]] = {}
    names: dict[object, str] = {}
    for number, operation in enumerate(network.operations):
        for name in operation.tensors:
            key = network.keys.get(name, name)
            where.setdefault(key, set()).add(stage_of[number])
            names.setdefault(key, name)
    return [
        f"{names[key]}, {size(network.bytes_of.get(names[key], 0))}, is in the stages "
        f"{' and '.join(map(str, sorted(stages)))}, and counts in each"
        for key, stages in where.items()
        if len(stages) > 1
    ]
