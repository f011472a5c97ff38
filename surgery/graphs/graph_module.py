"""The graph kind of torch.fx.GraphModules: nodes are rewritten, module calls and function calls alike."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from surgery.chain import Chain
from surgery.errors import InputError, Refusal
from surgery.graphs.functional_edit import (
    FunctionalKind,
    current_source,
    erase,
    first_source,
    read_record,
    write_record,
)
from surgery.graphs.items import Item
from surgery.graphs.module_edit import fuse_modules, is_whole_sequential, refuse_outside, splice_modules
from surgery.graphs.outline import drop_outline, outline
from surgery.graphs.packed import pack, unpack
from surgery.graphs.recurrent import step_shapes
from surgery.graphs.runs import Run
from surgery.graphs.shapes import lazy_shapes
from surgery.graphs.unpacking import has_packed, pack_all, unpack_all
from surgery.graphs.view import Spot, View
from surgery.operators import Shape
from surgery.steps import Branches, Step

__all__ = ["GraphModuleKind"]


class GraphModuleKind(FunctionalKind):
    """Adapter of a GraphModule."""

    kind = "graph"

    def __init__(
        self, model: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], *, copies: bool, inplace: bool
    ) -> None:
        packed = has_packed(model) or _attends(model)
        self._root = _copy(model) if copies or (packed and not inplace) else model
        self._packed = unpack_all(self._root)
        self.graph = self._root.graph
        outline(self._root)
        self.record = read_record(self._root)
        self.shape = lazy_shapes(self._root, lambda: _placeholder_values(self._root, args, kwargs))
        self.shared = {}
        self._dropped: set[str] = set()
        self.view = self.look()
        if unpack(self):
            self.view = self.look()

    def look(self) -> View:
        """Return a view of the graph as it is now."""
        parameters = dict(self._root.named_parameters(remove_duplicate=False))
        reads = {node: str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        return View(
            self.graph,
            parameters,
            {node: name for node, name in reads.items() if name in parameters},
            frozenset(node for node, name in reads.items() if name not in parameters),
            self._root.get_submodule,
        )

    def input_shapes(self, item: Item) -> tuple[Shape, ...]:
        """Return the shapes of an item's input: one for each step where it is in the loop of a recurrent layer."""
        return step_shapes(self._root, item.path, self.shape(item.source))

    def splice(self, spot: Spot, chain: Chain) -> None:
        """Put a chain where an operator stands, at all its calls."""
        if spot.calls[0].path is None:
            self.splice_functions(spot, chain)
            return
        splice_modules(self._root, spot, chain, self.shared)
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
        targets = [_fused_path(self._root, items) for items in run.rows]
        fuse_modules(self._root, run)
        for items, target in zip(run.rows, targets, strict=True):
            like = items[-1].node
            node = self._insert_module(target, first_source(items), like)
            self.replace(like, node)
            erase(self.graph, items, keep=like)
        for path in {str(item.path) for items in run.rows for item in items[1:]}:
            self._root.delete_submodule(path)

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

    def add_parameter(self, names: Sequence[str], parameter: nn.Parameter) -> None:
        """Add one parameter under all its names, making empty modules on the way."""
        for name in names:
            path, _, leaf = name.rpartition(".")
            module: nn.Module = self._root
            for part in path.split(".") if path else []:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, parameter)
            self._dropped.discard(name)

    def parameter_node(self, name: str, user: Node) -> Node:
        """Return a get_attr node just before ``user``."""
        with self.graph.inserting_before(user):
            return self.graph.get_attr(name)

    def drop_parameter(self, name: str) -> None:
        """Delete the attribute, and the modules that this leaves empty."""
        if name in self._dropped:
            return
        self._dropped.add(name)
        path, _, leaf = name.rpartition(".")
        delattr(self._root.get_submodule(path), leaf)
        while path and _is_empty(self._root.get_submodule(path)):
            path, _, leaf = path.rpartition(".")
            delattr(self._root.get_submodule(path), leaf)

    def is_dropped(self, node: Node) -> bool:
        """Whether the node gets an attribute that is gone."""
        return node.op == "get_attr" and node.target in self._dropped

    def finish(self) -> GraphModule:
        """Lint and recompile."""
        drop_outline(self.graph)
        pack_all(self._root, self._packed)
        pack(self)
        write_record(self._root, self.record)
        self.graph.lint()
        self._root.recompile()
        return self._root


def _copy(model: GraphModule) -> GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch copies its own tree specs in a way that it deprecates
        return copy.deepcopy(model)


def _attends(model: GraphModule) -> bool:
    return any(name.endswith("in_proj_weight") for name, _ in model.named_parameters())


def _is_empty(module: nn.Module) -> bool:
    return type(module) is nn.Module and not (module._parameters or module._modules or module._buffers)


def _fused_path(root: nn.Module, items: Sequence[Item]) -> str:
    paths = [str(item.path) for item in items]
    return paths[0].rpartition(".")[0] if is_whole_sequential(root, paths) else paths[0]


def _placeholder_values(module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Order the inputs as the graph's placeholders are; flatten them where the graph was exported with a tree."""
    if not args and not kwargs:
        raise InputError("sites have no costs without input shapes", next_step="give example_inputs")
    codegen = module.graph._codegen
    if hasattr(codegen, "pytree_info"):
        order = codegen.pytree_info.in_spec.child(1).context or []
        named = {name: kwargs[name] for name in order} if set(order) == set(kwargs) else kwargs
        return tuple(torch.utils._pytree.tree_leaves((args, named)))
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    return (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
