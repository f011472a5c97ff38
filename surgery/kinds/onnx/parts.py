"""Nodes and weights that are taken apart while a graph is open: which can be, and the whole ones that come back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnx_ir as ir
from torch import Tensor

from surgery.kinds.onnx.graph import EditedGraph, parameter_of
from surgery.kinds.onnx.kept_node import described, first_output
from surgery.kinds.onnx.origin import describe

__all__ = ["Apart", "Parts", "Wholes", "closed", "like"]

Parts = tuple[ir.Value, ...]
_K = TypeVar("_K")


class Wholes:
    """The whole of each row of weights, as long as these hold the numbers that they held at first."""

    def __init__(self) -> None:
        self._known: dict[Parts, ir.Value] = {}
        self._numbers: dict[ir.Value, Any] = {}

    def note(self, parts: Parts, whole: ir.Value) -> None:
        """Note the parts of a weight."""
        self._known[parts] = whole
        self._numbers.update({part: part.const_value for part in parts})

    def of(self, parts: Parts) -> ir.Value | None:
        """Return the weight of which these are the parts; None if they are of none, or have changed."""
        whole = self._known.get(parts)
        same = whole is not None and all(self._numbers[part] is part.const_value for part in parts)
        return whole if same else None


@dataclass(frozen=True, eq=False)
class Apart:
    """The nodes that were taken apart, by the name of their first output, and the wholes of their weights."""

    nodes: dict[str, ir.Node] = field(default_factory=dict)
    wholes: Wholes = field(default_factory=Wholes)

    def keep(self, graph: EditedGraph, node: ir.Node) -> None:
        """Keep a node for the end of this session, and what it says in the record for others."""
        self.nodes[first_output(node)] = node
        graph.record = graph.record.with_layer(first_output(node), described(node))


def like(numbers: Tensor, old: ir.Value, name: str | None = None) -> ir.Value:
    """Return a value with numbers, of which is said what is said of an initializer; no graph lists it yet."""
    new = parameter_of(name or old.name or "", numbers)
    describe(new, old)
    describe(new.const_value, old.const_value)  # type: ignore[arg-type]  # it is an initializer
    return new


def closed(reads: Mapping[_K, Collection[tuple[ir.Value, ir.Node]]]) -> list[_K]:
    """Return the keys whose weights nothing reads but the nodes of such keys.

    Example: of {a: (W, m), b: (W, n), c: (V, m)} all stay if no other node reads W or V; if another reads V, c goes.
    """
    chosen, before = list(reads), -1
    while len(chosen) != before:
        before = len(chosen)
        own = {pair for key in chosen for pair in reads[key]}
        chosen = [
            key for key in chosen if all((value, use.node) in own for value, _ in reads[key] for use in value.uses())
        ]
    return chosen
