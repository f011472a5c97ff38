"""Count what each stage of a cut network computes, holds and sends, for the report of a split.

The strip of a network has its operations in the order of the stages, as layers, with the bytes that a cut would send.
An operation with weights begins a layer, named after the module that has them; what follows without weights, as a norm
without numbers, an activation or a sum, belongs to it.
"""

from __future__ import annotations

from collections.abc import Sequence

from surgery.sites.network import Network
from surgery.stages.problem import Assignment
from surgery.stages.report import Crossing, StageReport, StripLayer
from surgery.text import size

__all__ = ["crossings_of", "stages_of", "strip_of", "tied_notes"]


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


def strip_of(network: Network, stage_of: Sequence[int], times: Sequence[float]) -> tuple[StripLayer, ...]:
    """Return the layers of a network that was cut; ``times`` are the seconds of its operations."""
    order = sorted(range(len(network.operations)), key=lambda number: (stage_of[number], number))
    sent = _bytes_after(network, order)
    layers: list[StripLayer] = []
    for place, number in enumerate(order):
        name, stage = _layer(network, number), stage_of[number]
        last = layers[-1] if layers and layers[-1].stage == stage else None
        if last is not None and name in ("", last.name):
            layers[-1] = StripLayer(last.name, stage, last.seconds + times[number], sent[place])
        else:
            name = name or network.operations[number].name
            layers.append(StripLayer(name, stage, times[number], sent[place]))
    return tuple(layers)


def _layer(network: Network, number: int) -> str:
    """Return the module whose weights an operation reads; an empty text if it reads none."""
    operation = network.operations[number]
    if not operation.tensors:
        return ""
    return operation.tensors[0].rpartition(".")[0] or operation.name


def _bytes_after(network: Network, order: Sequence[int]) -> list[int]:
    """Return, for each place in an order, the bytes of the values that were given by then and are read later."""
    # A value counts from the place of its producer up to the last place before that of its last reader. For example
    # with order [a, b, c], a value of 8 bytes from a to c adds 8 at the places 0 and 1.
    place = {number: at for at, number in enumerate(order)}
    change = [0] * (len(order) + 1)
    for value, readers in network.readers.items():
        if value in network.producer:
            change[place[network.producer[value]]] += network.values[value].bytes
            change[max(place[number] for number in readers)] -= network.values[value].bytes
    found, held = [], 0
    for each in change[: len(order)]:
        held += each
        found.append(held)
    return found
