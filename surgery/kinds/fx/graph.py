"""Open fx graphs: what all kinds of models with an fx graph have in common, and the small steps that edits consist of.

Each kind says how a parameter is added, provided to a node, and dropped. All else is the same for graphs that read
parameters by get_attr nodes and for graphs that read them by placeholders.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from surgery.algebra import Chain, Layout, Operator
from surgery.errors import FileError
from surgery.kinds.base import OpenModel
from surgery.kinds.fx.computed import Values
from surgery.kinds.fx.functional import is_aten, transposed_source, write_call
from surgery.kinds.fx.read import Reader
from surgery.kinds.fx.recurrence import Recurrence
from surgery.kinds.layers.edit import Shared
from surgery.sites import Entry, Record

__all__ = ["OpenGraph", "read_record", "write_record"]


def read_record(module: GraphModule) -> Record:
    """Return the record that a graph carries; an empty record if there is none, or none that can be read."""
    try:
        return Record.from_json(module.meta.get("surgery"))
    except FileError:
        return Record()


def write_record(module: GraphModule, record: Record) -> None:
    """Store the record where ``surgery.save`` finds it; an empty record is not stored."""
    module.meta.pop("surgery", None)
    if record:
        module.meta["surgery"] = record.to_json()


class OpenGraph(OpenModel):
    """Base of the open models that are fx graphs.

    ``recurrences`` are the recurrent layers. While the graph is observed, the module of such a layer runs in the place
    of the nodes that compute the layer.
    """

    graph: Graph
    record: Record
    shared: Shared
    reader: Reader
    recurrences: Sequence[Recurrence] = ()

    @cached_property
    def values(self) -> Values:
        """The computed weights that were computed so far, or why they could not be, by node."""
        return {}

    @cached_property
    def notes(self) -> dict[str, str]:
        """What the user should know about recomposed sites, by name."""
        return {}

    @cached_property
    def waiting(self) -> dict[str, Any]:
        """The records of computed weights that stand as plain parameters while their chains are cut again, by name."""
        return {}

    @abstractmethod
    def constants(self) -> Mapping[str, Tensor]:
        """Return all buffers and constants, by name."""

    @abstractmethod
    def constant(self, name: str, user: Node) -> Node:
        """Return a node that provides a buffer or a constant, placed so that it comes before ``user``."""

    def note(self, site: str, chain: Chain, entry: Entry) -> None:
        """Record that a site is factored, and what its weight was called."""
        self.record = self.record.with_site(site, replace(entry, origin=chain.origin))

    @cached_property
    def _readers(self) -> list[Reader]:
        """All readers that the graph has had, so that the values of each can still be looked up and replaced."""
        return []

    @property
    def start(self) -> int:
        """The first number that no value has yet."""
        return self._readers[-1].start + len(self._readers[-1].nodes) if self._readers else 0

    def reread(self) -> None:
        """Read the graph as it is now; the numbers of earlier values stay valid."""
        self.reader = self.look()
        self.reader.settle()
        self._readers.append(self.reader)
        vars(self).pop("flow", None)

    def node(self, value: int) -> Node:
        """Return the node that gives a value now."""
        return self._reader_of(value).node(value)

    def original(self, value: int) -> Node:
        """Return the node that gave a value when the graph was read."""
        reader = self._reader_of(value)
        return reader.original[value - reader.start]

    def _reader_of(self, value: int) -> Reader:
        # each reader numbers its values from its own start, so the number tells the reader
        return next(reader for reader in reversed(self._readers) if reader.start <= value)

    @abstractmethod
    def look(self) -> Reader:
        """Return a reader of the graph as it is now."""

    @abstractmethod
    def add_parameter(self, names: Sequence[str], parameter: nn.Parameter) -> None:
        """Add one parameter under all its names."""

    @abstractmethod
    def parameter_node(self, name: str, user: Node) -> Node:
        """Return a node that provides a parameter, placed so that it comes before ``user``."""

    @abstractmethod
    def drop_parameter(self, name: str) -> None:
        """Forget a parameter; ``sweep`` erases the nodes that provided it once nothing uses them."""

    def stamp(self, node: Node, like: Node) -> None:
        """Give a new node the metadata of the node that it replaces, except for the values."""
        node.meta = {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta", "example_value")}

    def write_sum(self, first: Node, second: Node, *, like: Node) -> Node:
        """Insert an addition before ``like``, in the style (torch or ATen) of ``like``."""
        with self.graph.inserting_before(like):
            target = torch.ops.aten.add.Tensor if is_aten(like) else torch.add
            node = self.graph.call_function(target, (first, second))
        self.stamp(node, like)
        return node

    def insert(
        self,
        operator: Operator,
        source: Node,
        names: tuple[str | Node, str | Node | None],
        *,
        like: Node,
        stored: Layout,
        style: Node | None = None,
    ) -> Node:
        """Insert the call of an operator before ``like``, in the style (torch or ATen) of ``style`` or else ``like``.

        ``names`` has the names of weight and bias; a weight or a bias that the graph computes is given as its node.
        """
        weight, bias = (self.parameter_node(name, like) if isinstance(name, str) else name for name in names)
        assert weight is not None  # names[0] is a str
        with self.graph.inserting_before(like):
            call = style or like
            node = write_call(self.graph, operator, source=source, weight=weight, bias=bias, style=call, stored=stored)
        self.stamp(node, like)
        return node

    def replace(self, old: Node, new: Node) -> None:
        """Replace a node by a new one everywhere: in the graph, in the readers and in the recurrent layers."""
        # three places know nodes: the graph, the readers by number, and the recurrent layers
        for layer in self.recurrences:
            layer.moved(old, new)
        for reader in self._readers:
            reader.replaced(old, new)
        old.replace_all_uses_with(new)
        self.graph.erase_node(old)

    def sweep(self) -> None:
        """Erase the nodes that provide dropped parameters, and their transposes."""
        for node in reversed(list(self.graph.nodes)):
            origin = transposed_source(node) or node
            if not node.users and self.is_dropped(origin):
                self.graph.erase_node(node)

    @abstractmethod
    def is_dropped(self, node: Node) -> bool:
        """Whether the node provides a parameter that was dropped."""
