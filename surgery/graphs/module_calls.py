"""Edits of the calls of submodules in an fx graph, for the graph kinds that have them beside function calls."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.fx import GraphModule, Node

from surgery.chain import Chain
from surgery.errors import Refusal
from surgery.graphs.functional_edit import FunctionalKind, current_source, erase, first_source
from surgery.graphs.items import Item
from surgery.graphs.module_edit import fuse_modules, is_whole_sequential, refuse_outside, splice_modules
from surgery.graphs.recurrent_forms import loop_of
from surgery.graphs.runs import Run
from surgery.graphs.view import Spot
from surgery.neighbours import Loop
from surgery.steps import Branches, Step

__all__ = ["ModuleCallsKind"]


class ModuleCallsKind(FunctionalKind):
    """Base of the kinds in whose graphs submodules of ``root`` are called, too."""

    root: GraphModule

    def loop(self, item: Item) -> Loop | None:
        """Return the loop of a recurrent layer in which an item runs, if any."""
        return loop_of(self.root, item.path)

    def splice(self, spot: Spot, chain: Chain) -> None:
        """Put a chain where an operator stands, at all its calls."""
        if spot.calls[0].path is None:
            self.splice_functions(spot, chain)
            return
        splice_modules(self.root, spot, chain, self.shared)
        for name in (spot.site.name, *spot.site.aliases):
            self.note(name, chain, weight=f"{name}.weight")
        for call in spot.calls:
            node = current_source(call)
            for i, step in enumerate(chain.steps):
                node = self._insert_step(step, f"{call.path}.{i}", node, call.node)
            self.replace(call.node, node)

    def put_back(self, run: Run) -> None:
        """Put one operator where a run stands, at all its calls."""
        if run.calls[0][0].path is None:
            self.put_back_functions(run)
            return
        for site in run.sites:
            self.record.pop(site, None)
        targets = [_fused_path(self.root, items) for items in run.rows]
        fuse_modules(self.root, run)
        for items, target in zip(run.rows, targets, strict=True):
            like = items[-1].node
            node = self._insert_module(target, first_source(items), like)
            self.replace(like, node)
            erase(self.graph, items, keep=like)
        for path in {str(item.path) for items in run.rows for item in items[1:]}:
            self.root.delete_submodule(path)

    def _insert_step(self, step: Step, path: str, source: Node, like: Node) -> Node:
        """Insert the call of a step's module; branches are called one by one, and added up."""
        if not isinstance(step, Branches):
            return self._insert_module(path, source, like)
        total: Node | None = None
        for j, row in enumerate(step.rows):
            node = source
            for k in range(len(row)):
                node = self._insert_module(f"{path}.{j}.{k}", node, like)
            total = node if total is None else self.write_sum(total, node, like=like)
        assert total is not None  # there are rows
        return total

    def _insert_module(self, path: str, source: Node, like: Node) -> Node:
        with self.graph.inserting_before(like):
            node = self.graph.call_module(path, (source,))
        self.stamp(node, like)
        return node

    def refuse_run(self, runs: Sequence[Sequence[Item]]) -> Refusal | None:
        """Refuse modules that are also called outside of the run."""
        return super().refuse_run(runs) or refuse_outside(runs, self.view.calls)


def _fused_path(root: nn.Module, items: Sequence[Item]) -> str:
    paths = [str(item.path) for item in items]
    return paths[0].rpartition(".")[0] if is_whole_sequential(root, paths) else paths[0]
