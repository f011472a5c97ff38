"""Edits of an fx graph that calls submodules as well as functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

from torch.fx import Graph, GraphModule, Node

from surgery.algebra import Chain, Shape
from surgery.errors import CheckError
from surgery.kinds.fx.flow import ChainCall, Extras, make_flow
from surgery.kinds.fx.nodes import erase
from surgery.kinds.fx.write import FunctionEdits
from surgery.kinds.layers.edit import (
    Known,
    empty_known,
    find_known,
    fuse_modules,
    layers_of,
    restore_known,
    splice_modules,
)
from surgery.kinds.layers.factored import Factored, is_chain
from surgery.kinds.layers.tensors import key_of
from surgery.sites import (
    Edit,
    Entry,
    Flow,
    FusableChain,
    FusableModule,
    Layers,
    Part,
    Placement,
    Replace,
    Skip,
    is_whole_sequential,
)

__all__ = ["GraphEdits"]


class GraphEdits(FunctionEdits):
    """Base of the open graphs that call functions and submodules of ``root``."""

    root: GraphModule
    shape: Callable[[Node], Shape]

    @cached_property
    def _known(self) -> tuple[list[Known], tuple[Skip, ...]]:
        """The chains that stand as modules, and those that are broken."""
        return find_known(self.root)

    def _known_as(self, names: tuple[str, ...]) -> Known:
        return next(known for known in self._known[0] if known.chain.names == names)

    def reread(self) -> None:
        """Read the graph as it is now; the numbers of earlier values stay valid."""
        super().reread()
        vars(self).pop("_known", None)

    @cached_property
    def flow(self) -> Flow:
        """The graph as it is when this is read first after it was opened, or reopened. Replacing does not need it."""
        known, broken = self._known
        calls = [node for node in self.graph.find_nodes(op="call_module") if self._is_chain(node)]
        chain_calls = [ChainCall(node, node.all_input_nodes[0], str(node.target)) for node in calls]
        recorded = frozenset(self.record.sites) | _sites_by_stack(self.graph)
        extras = Extras(known, chain_calls, broken, layers_of(self.root), self.record.origins, recorded)
        return make_flow(self.reader, self.shape, extras)

    def _is_chain(self, node: Node) -> bool:
        return is_chain(self.root.get_submodule(str(node.target)))

    def apply(self, edit: Edit) -> None:
        """Carry out an edit. A module is replaced under its own path, so that its call nodes can stay as they are."""
        if isinstance(edit, Replace):
            self._replace(edit.placement, edit.chain)
            return
        # a chain is of modules or of function calls, never of both
        functions = isinstance(edit.chain, FusableChain) and edit.chain.calls[0][0].path is None
        for site in () if functions else edit.chain.sites:
            self.record = self.record.without_site(site)
        if isinstance(edit.chain, FusableModule):
            restore_known(self.root, self._known_as(edit.chain.sites), edit.chain.operators, self.notes)
        elif functions:
            self.fuse_functions(edit.chain)
        else:
            self._fuse_modules(edit.chain)

    def _replace(self, placement: Placement, chain: Chain) -> None:
        site, calls = placement.site, placement.calls
        if not calls or calls[0].path is None:
            self.replace_functions(site, calls, chain)
            return
        splice_modules(self.root, site, chain, self.shared)
        for name in (site.name, *site.aliases):
            self.note(name, chain, Entry(weight=f"{name}.weight"))

    def _fuse_modules(self, chain: FusableChain) -> None:
        layers = self.flow.layers
        # a whole nn.Sequential becomes one module at its own path; otherwise the first module of the row is replaced
        targets = [_fused_path(layers, row) for row in chain.rows]
        fuse_modules(self.root, chain, layers)
        for row, target in zip(chain.rows, targets, strict=True):
            like, inside = self.node(row[-1].value), self._nodes_of(row)
            node = self._insert_module(target, self._source(row), like)
            self.replace(like, node)
            erase(self.graph, inside, keep=like)
        for path in {str(part.path) for row in chain.rows for part in row[1:]}:
            self.root.delete_submodule(path)

    def reopen(self, placements: Sequence[Placement]) -> dict[str, Placement]:
        """Put operators without numbers in the place of chains, and return their new placements by site name."""
        modules = [placement for placement in placements if isinstance(placement.chain, FusableModule)]
        for placement in modules:
            site = placement.site
            empty_known(self.root, self._known_as((site.name, *site.aliases)), site.operator)
        found = super().reopen([placement for placement in placements if placement not in modules])
        if modules:
            self.reread()
        calls = {call.path: call for call in self.reader.calls.values()}
        for placement in modules:
            site = placement.site
            own = (calls[name] for name in (site.name, *site.aliases) if name in calls)
            found[site.name] = Placement(site, (next(own),))
        return found

    def _insert_module(self, path: str, source: Node, like: Node) -> Node:
        with self.graph.inserting_before(like):
            node = self.graph.call_module(path, (source,))
        self.stamp(node, like)
        return node

    def verify(self) -> dict[str, str]:
        """Check that the graph uses the factors of every chain; a graph itself tells what runs, so no run is needed.

        Raises:
            CheckError: a chain is in the model, but nothing calls it.
        """
        called = {str(node.target) for node in self.graph.find_nodes(op="call_module")}
        reader = self.look()
        # a factor is used if a node reads it under any of its names
        used = {name for node, name in reader.providers.items() if node.users}
        for site in self.record.factored:
            factors = [name for name in reader.parameters if name.startswith(f"{site}.") and name.endswith(".weight")]
            tied = {alias for name in used for alias in reader.names[key_of(reader.parameters[name])]}
            runs = site in called or site in self.record.layers or any(name in tied for name in factors)
            if not runs and factors:
                raise CheckError(f"the chain of {site} is in the model, but nothing calls it")
        return {}


def _fused_path(layers: Layers, row: Sequence[Part]) -> str:
    paths = [str(part.path) for part in row]
    return paths[0].rpartition(".")[0] if is_whole_sequential(layers, paths) else paths[0]


def _sites_by_stack(graph: Graph) -> frozenset[str]:
    """Return the paths of factored layers in the module that a graph was made from.

    They are known because each node records the modules in whose forward it was made.
    """
    rows = (node.meta.get("nn_module_stack") or {} for node in graph.nodes)
    entries = (entry for row in rows for entry in row.values())
    return frozenset(str(path).split("@")[0] for path, kind in entries if _is_factored(kind))


# graphs in files may have the name that the class had in earlier versions
_FACTORED = (f"{Factored.__module__}.{Factored.__qualname__}", "surgery.graphs.factored.Factored")


def _is_factored(kind: Any) -> bool:
    return kind is Factored or kind in _FACTORED
