"""Count what each stage of a cut network computes, holds and sends, for the report of a split."""

from __future__ import annotations

from collections.abc import Sequence

from surgery.sites.network import Network
from surgery.stages.problem import Assignment
from surgery.stages.report import Crossing, StageReport
from surgery.text import size

__all__ = ["crossings_of", "stages_of", "tied_notes"]


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


def stages_of(network: Network, found: Assignment) -> list[StageReport]:
    """Return what is to be said of each stage."""
    rows = []
    for at, seconds in enumerate(found.seconds):
        own = [operation for operation, stage in zip(network.operations, found.stage_of, strict=True) if stage == at]
        rows.append(
            StageReport(
                operations=len(own),
                first=own[0].name if own else "",
                last=own[-1].name if own else "",
                macs=sum(operation.macs for operation in own),
                tensor_bytes=found.tensors[at],
                bytes_in=found.received[at],
                bytes_out=found.sent[at],
                predicted_s=seconds,
            )
        )
    return rows


def tied_notes(found: Assignment) -> list[str]:
    """Return one line for each tensor that is in several stages, so that it counts in each."""
    return [
        f"{each.names[0]}, {size(each.bytes)}, is in stages {' and '.join(map(str, each.stages))}, and counts in each"
        for each in found.repeated
    ]
