"""Edits of the calls of submodules in an fx graph, for the graph kinds that have them beside function calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.fx import Graph, GraphModule, Node

from surgery.algebra.chain import Chain
from surgery.errors import CheckError, Refusal
from surgery.kinds.base import AnyRun
from surgery.kinds.fx.chains import ChainSpot
from surgery.kinds.fx.items import Item
from surgery.kinds.fx.runs import Run
from surgery.kinds.fx.view import Spot, identity
from surgery.kinds.fx.write import FunctionalKind, erase, first_source
from surgery.kinds.layers.edit import (
    fuse_modules,
    is_whole_sequential,
    refuse_hooks,
    refuse_outside,
    splice_modules,
)
from surgery.kinds.layers.factored import Factored, is_chain
from surgery.kinds.layers.known import ModuleCall, ModuleRun, empty_known, find_known, known_spots, put_back_known
from surgery.kinds.layers.recurrent_forms import loop_of
from surgery.sites.epilogue import Loop
from surgery.sites.site import Skip

__all__ = ["ModuleCallsKind"]


class ModuleCallsKind(FunctionalKind):
    """Base of the kinds in whose graphs submodules of ``root`` are called, too."""

    root: GraphModule

    def loop(self, item: Any) -> Loop | None:
        """Return the loop of a recurrent layer in which an item runs, if any."""
        return loop_of(self.root, item.path)

    def known_runs(self) -> tuple[list[ModuleRun], list[Skip]]:
        """Return the chains that decompose has made of submodules."""
        return find_known(self.root)

    def chain_spots(self) -> tuple[list[ChainSpot], list[Skip]]:
        """Return the chains that are called as sites, and those that cannot be cut again."""
        runs, changed = self.known_runs()
        calls = (node for node in self.graph.find_nodes(op="call_module") if self._is_chain(node))
        found = [ModuleCall(node, node.all_input_nodes[0], str(node.target)) for node in calls]
        spots, skips = known_spots(runs, found, self.shape)
        return spots, [*skips, *changed]

    def _is_chain(self, node: Node) -> bool:
        return is_chain(self.root.get_submodule(str(node.target)))

    @property
    def recorded(self) -> frozenset[str]:
        """The sites that decompose has factored, by the record, and by what stands there."""
        return super().recorded | _sites_by_stack(self.graph)

    def splice(self, spot: Spot, chain: Chain) -> None:
        """Put a chain where an operator stands: a module's call goes on calling what stands in its place."""
        if not spot.calls or spot.calls[0].path is None:
            self.splice_functions(spot, chain)
            return
        splice_modules(self.root, spot, chain, self.shared)
        for name in (spot.site.name, *spot.site.aliases):
            self.note(name, chain, weight=f"{name}.weight")

    def put_back(self, run: AnyRun) -> None:
        """Put one operator where a run stands, at all its calls."""
        for site in run.sites if isinstance(run, ModuleRun) or run.calls[0][0].path is not None else ():
            self.record.pop(site, None)
        if isinstance(run, ModuleRun):
            put_back_known(self.root, run, run.operators, self.notes)
        elif run.calls[0][0].path is None:
            self.put_back_functions(run)
        else:
            self._fuse(run)

    def _fuse(self, run: Run) -> None:
        targets = [_fused_path(self.root, items) for items in run.rows]
        fuse_modules(self.root, run)
        for items, target in zip(run.rows, targets, strict=True):
            like = items[-1].node
            node = self._insert_module(target, first_source(items), like)
            self.replace(like, node)
            erase(self.graph, items, keep=like)
        for path in {str(item.path) for items in run.rows for item in items[1:]}:
            self.root.delete_submodule(path)

    def reopen(self, spots: Sequence[ChainSpot]) -> dict[str, Spot]:
        """Put an operator without numbers where each chain stands, and return the spots for splicing, by name."""
        modules = [spot for spot in spots if isinstance(spot.run, ModuleRun)]
        for spot in modules:
            empty_known(self.root, spot)
        found = super().reopen([spot for spot in spots if spot not in modules])
        if modules:
            self.view = self.look()
        calls = {call.path: call for call in self.view.calls}
        return found | {s.site.name: Spot(s.site, (calls[s.item.path],)) for s in modules}

    def _insert_module(self, path: str, source: Node, like: Node) -> Node:
        with self.graph.inserting_before(like):
            node = self.graph.call_module(path, (source,))
        self.stamp(node, like)
        return node

    def refuse_run(self, runs: Sequence[Sequence[Item]]) -> Refusal | None:
        """Refuse modules that have hooks, or are also called outside of the run."""
        return refuse_hooks(self.root, runs) or super().refuse_run(runs) or refuse_outside(runs, self.view.calls)

    def verify(self) -> dict[str, str]:
        """See that the graph uses what every chain is made of; it says itself what runs."""
        called = {str(node.target) for node in self.graph.find_nodes(op="call_module")}
        view = self.look()
        used = {name for node, name in view.providers.items() if node.users}
        for site, entry in self.record.items():
            factors = [name for name in view.parameters if name.startswith(f"{site}.") and name.endswith(".weight")]
            tied = {alias for name in used for alias in view.names[identity(view.parameters[name])]}
            runs = site in called or "parts" in entry or any(name in tied for name in factors)
            if not runs and factors:
                raise CheckError(f"the chain of {site} is in the model, and nothing calls it")
        return {}


def _fused_path(root: nn.Module, items: Sequence[Item]) -> str:
    paths = [str(item.path) for item in items]
    return paths[0].rpartition(".")[0] if is_whole_sequential(root, paths) else paths[0]


def _sites_by_stack(graph: Graph) -> frozenset[str]:
    """Return the factored layers of the module that a graph was made from: each node says in whose forward it was made.

    Names are those of that module, without the mark of a call.
    """
    rows = (node.meta.get("nn_module_stack") or {} for node in graph.nodes)
    entries = (entry for row in rows for entry in row.values())
    return frozenset(str(path).split("@")[0] for path, kind in entries if _is_factored(kind))


# graphs in files may name the class as it was called before
_FACTORED = (f"{Factored.__module__}.{Factored.__qualname__}", "surgery.graphs.factored.Factored")


def _is_factored(kind: Any) -> bool:
    return kind is Factored or kind in _FACTORED
