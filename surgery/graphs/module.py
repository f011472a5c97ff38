"""The graph kind of nn.Modules: submodules are replaced, and the model stays the user's own class.

A graph (torch.fx's, or torch.export's where tracing fails) serves to find the calls and to prove the dataflow; it is
thrown away. What cannot be changed by replacing a submodule (functional calls in ``forward``) is skipped with that
reason.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.fx import Node

from surgery.chain import Chain
from surgery.errors import InputError, Refusal
from surgery.graphs.chains import ChainSpot, Origin
from surgery.graphs.exported import program_shapes, program_view
from surgery.graphs.items import Item
from surgery.graphs.kind import GraphKind
from surgery.graphs.links import is_link_module
from surgery.graphs.module_edit import (
    FACTORED,
    ORIGIN,
    Shared,
    fuse_modules,
    is_whole_sequential,
    refuse_outside,
    splice_modules,
)
from surgery.graphs.modules import is_operator_module, read_module
from surgery.graphs.recurrent_forms import loop_of
from surgery.graphs.runs import Run
from surgery.graphs.shapes import lazy_shapes
from surgery.graphs.trace import export_program, trace_module
from surgery.graphs.unpacking import has_packed, pack_all, unpack_all
from surgery.graphs.view import Call, Spot, View, site_name
from surgery.neighbours import Loop
from surgery.operators import Conv
from surgery.sites import Skip, describe

__all__ = ["ModuleKind"]


class ModuleKind(GraphKind):
    """Adapter of an nn.Module."""

    kind = "module"

    def __init__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, copies: bool, inplace: bool
    ) -> None:
        root = copy.deepcopy(model) if copies or (has_packed(model) and not inplace) else model
        self._holder = nn.ModuleList([root])  # in which the root can be replaced too, unless it is to stay the same
        self._packed = unpack_all(root if inplace else self._holder)
        self._root = self._holder[0]
        self._shared: Shared = {}
        try:
            self._open(args, kwargs)
        except BaseException:
            self.finish()  # the model may be the caller's own
            raise

    def _open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        traced = trace_module(self._root, args, kwargs)
        parameters = dict(self._root.named_parameters(remove_duplicate=False))
        if traced is None:
            self._open_export(parameters, args, kwargs)
            return
        module, values = traced
        reads = {node: str(node.target) for node in module.graph.find_nodes(op="get_attr")}
        self.view = View(
            module.graph,
            parameters,
            {node: name for node, name in reads.items() if name in parameters},
            frozenset(node for node, name in reads.items() if name not in parameters),
            self._root.get_submodule,
            lambda call: call if call.path is not None else _functional_skip(call),
        )

        def inputs() -> tuple[Any, ...]:
            if not args and not kwargs:
                raise InputError("sites have no costs without input shapes", next_step="give example_inputs")
            return values

        self.shape = lazy_shapes(module, inputs)

    def _open_export(
        self, parameters: Mapping[str, nn.Parameter], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not args and not kwargs:
            raise InputError("torch.fx cannot trace this model", next_step="give example_inputs for torch.export")
        program = export_program(self._root, args, kwargs)
        self.shape = program_shapes(program, None)
        view = program_view(program)
        self.view = replace(view, parameters=parameters, adapt=self._own_call, owner=self._link_path)

    def _link_path(self, node: Node) -> str | None:
        """Return the path of the link module whose forward made a node."""
        path = _caller(self._root, node)
        return path if path is not None and is_link_module(self._root.get_submodule(path)) else None

    def _own_call(self, call: Call) -> Call | Skip:
        """Turn a call of an exported graph into that of the module whose forward made it."""
        path = _caller(self._root, call.node)
        owner = None if path is None else self._root.get_submodule(path)
        if path is None or owner is None or not is_operator_module(owner) or not self._owns(owner, call):
            return _functional_skip(call)
        operator = read_module(owner)
        if isinstance(operator, Refusal):
            return Skip(path, describe(call.operator), operator.reason, call.operator.parameters)
        if isinstance(operator, Conv) and operator.geometry.padding_mode != "zeros" and operator.geometry.padded:
            reason = f"its padding mode {operator.geometry.padding_mode} is a node of its own in an exported graph"
            return Skip(path, describe(operator), reason, operator.parameters)
        weight = f"{path}.weight"  # torch.export calls weights that are tied by the name of one of them
        call = replace(call, operator=operator, weight=weight, path=path, weight_node=None, bias_node=None)
        return _without_views(call) if call.stored == "in_out" else call

    def _owns(self, owner: nn.Module, call: Call) -> bool:
        """Whether a call uses the weight of this module."""
        return owner._parameters.get("weight") is self.view.parameters[call.weight]

    def loop(self, item: Item) -> Loop | None:
        """Return the loop of a recurrent layer in which an item runs, if any."""
        return loop_of(self._root, item.path)

    def splice(self, spot: Spot, chain: Chain) -> None:
        """Put a chain where an operator stands, at all its calls."""
        splice_modules(self._root, spot, chain, self._shared)

    def put_back(self, run: Run) -> None:
        """Put one operator where a run stands, at all its calls."""
        fuse_modules(self._root, run)

    def refuse_run(self, runs: Sequence[Sequence[Item]]) -> Refusal | None:
        """Refuse modules that are also called outside of the run, and reshapes that forward() makes itself."""
        for items in runs:
            paths = [str(item.path) for item in items]
            if any(item.path is None for item in items):
                return Refusal("a function in forward() is part of the chain; recompose an exported program instead")
            if not all(isinstance(item, Call) for item in items) and not is_whole_sequential(self._root, paths):
                return Refusal("its modules are not those of one nn.Sequential")
        return super().refuse_run(runs) or refuse_outside(runs, self.view.calls)

    @property
    def recorded(self) -> frozenset[str]:
        """The sites that decompose has factored, by the mark on what stands there."""
        modules = self._root.named_modules(remove_duplicate=False)
        return frozenset(name for name, module in modules if hasattr(module, FACTORED))

    @property
    def origins(self) -> Mapping[str, Origin]:
        """The factorization and the ranks of each factored site, by the mark on what stands there."""
        modules = self._root.named_modules(remove_duplicate=False)
        marks = ((name, getattr(module, ORIGIN, None)) for name, module in modules)
        return {name: origin for name, origin in marks if origin is not None}

    def reopen(self, spots: Sequence[ChainSpot]) -> dict[str, Spot]:
        """Put an operator without numbers where each chain stands, and return the spots for splicing, by name."""
        for spot in spots:
            self.put_back(spot.run)
        return {spot.site.name: Spot(spot.site, ()) for spot in spots}

    def finish(self) -> nn.Module:
        """Return the changed model, with packed weights where nothing has changed."""
        pack_all(self._holder, self._packed)
        return self._holder[0]


def _without_views(call: Call) -> Call:
    """Widen a Conv1D's product of matrices to the whole module, which flattens its input and shapes its output."""
    users = list(call.node.users)
    if _is_view(call.source) and len(users) == 1 and _is_view(users[0]):
        within = (call.source, call.node)
        return replace(call, source=call.source.all_input_nodes[0], node=users[0], inner=call.node, within=within)
    return call


def _is_view(node: Node) -> bool:
    return node.target in (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def _functional_skip(call: Call) -> Skip:
    reason = "a function in forward() uses it, not a module of its own; factor an exported program instead"
    return Skip(site_name(call.weight), describe(call.operator), reason, call.operator.parameters)


def _caller(root: nn.Module, node: Node) -> str | None:
    """Return the path of the innermost module in whose forward the node was made."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return None
    path = str(list(stack.values())[-1][0]).split("@")[0]
    try:
        root.get_submodule(path)
    except AttributeError:
        return None
    return path
