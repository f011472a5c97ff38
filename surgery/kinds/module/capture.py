"""Find the calls of a module's layers: by torch.fx, by torch.export, or by watching a run.

A captured graph serves to find the calls and to prove the dataflow; then it is thrown away. If neither torch.fx nor
torch.export can capture the model, one run on the example inputs shows which modules are called, and nothing is proved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node
from torch.nn.parameter import is_lazy

from surgery.algebra import Conv, Operator, Shape
from surgery.errors import CaptureError, InputError, Refusal
from surgery.kinds.fx.flow import ChainCall, fake_shapes
from surgery.kinds.fx.read import Reader
from surgery.kinds.fx.trace import export_program, trace_module, watch
from surgery.kinds.layers.carried import copy_module, held_skip
from surgery.kinds.layers.factored import is_chain
from surgery.kinds.layers.modules import is_operator_module, read_module, weight_path
from surgery.kinds.layers.recurrent_forms import loop_of
from surgery.kinds.layers.steps import is_link_module
from surgery.kinds.layers.untouched import kept_random
from surgery.kinds.layers.within import Within, within_of
from surgery.kinds.program.read import program_shapes, read_program
from surgery.sites import Call, Skip, site_name

__all__ = ["Captured", "capture", "has_lazy", "trace_only"]


@dataclass(frozen=True, eq=False)
class Captured:
    """The reader of a module's graph, the shapes of its values, the calls of chains, and whether it proves dataflow."""

    reader: Reader
    shape: Callable[[Node], Shape]
    chains: tuple[ChainCall, ...]
    proves: bool = True


def capture(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    """Return the calls of a module's layers.

    Raises:
        InputError: the model does not run on the example inputs, or it needs example inputs and has none.
    """
    with kept_random(root):  # user code may draw random numbers while it is traced
        return _captured(root, args, kwargs)


def _captured(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    given = bool(args or kwargs)
    # lazy layers get their weights in the first run, so a model with them can only be watched
    if not (given and has_lazy(root)):
        traced = trace_only(root, args, kwargs)
        if traced is not None:
            return traced
        if not given:
            raise InputError("torch.fx cannot trace this model", next_step="give example_inputs")
        try:
            return _exported(root, args, kwargs)
        except CaptureError:
            pass  # a run shows the calls, or why the inputs do not fit
    return _watched(root, args, kwargs)


def trace_only(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured | None:
    """Return the calls that torch.fx's tracing finds; None if it fails, or if its graph does not run on the inputs."""
    traced = trace_module(root, args, kwargs)
    if traced is None:
        return None
    module, values = traced
    parameters = dict(root.named_parameters(remove_duplicate=False))
    reads = {node: str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    reader = Reader(
        module.graph,
        parameters,
        {node: name for node, name in reads.items() if name in parameters},
        frozenset(node for node, name in reads.items() if name not in parameters),
        root.get_submodule,
        partial(_own_call, root),
        loop=partial(loop_of, root),
    )
    # fake tensors check that the traced graph fits the inputs; a trace may have taken a branch that does not
    if args or kwargs:
        try:
            shape = fake_shapes(module, values)
        except InputError:
            return None
    else:
        shape = _no_shape
    return Captured(reader, shape, _chain_calls(root, reader.graph))


def _no_shape(node: Node) -> Shape:
    raise InputError("sites have no costs without input shapes", next_step="give example_inputs")


def _chain_calls(root: nn.Module, graph: Graph) -> tuple[ChainCall, ...]:
    nodes = [node for node in graph.find_nodes(op="call_module") if is_chain(root.get_submodule(str(node.target)))]
    return tuple(ChainCall(node, node.all_input_nodes[0], str(node.target)) for node in nodes)


def _own_call(root: nn.Module, call: Call, reader: Reader) -> Call | Skip:
    """Refuse the call of a function: in a tree of modules, only modules can be changed."""
    return _functional_skip(root, call) if call.path is None else _whole_call(root, call, reader)


def _whole_call(root: nn.Module, call: Call, reader: Reader) -> Call | Skip:
    """Refuse the call of a layer that has to stay, or that is called with more than its input."""
    node = reader.node(call.value)
    more = node.op == "call_module" and len(node.args) + len(node.kwargs) != 1
    reason = "it is called with more than its input" if more else None
    return held_skip(root, call, reason) or call


def _functional_skip(root: nn.Module, call: Call) -> Skip:
    try:
        layer = within_of(root.get_submodule(site_name(call.weight)))
    except AttributeError:  # the weight is not that of a layer
        layer = None
    why = "a function in forward() uses it, not a module of its own"
    reason = f"{layer.reason if isinstance(layer, Refusal) else why}; factor an exported program instead"
    return Skip(site_name(call.weight), call.operator.description, reason, call.operator.parameters)


def has_lazy(root: nn.Module) -> bool:
    """Whether a layer has weights that are not initialised yet."""
    return any(map(is_lazy, root.parameters()))


def _watched(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    seen = watch(copy_module(root) if has_lazy(root) else root, args, kwargs)
    parameters = dict(root.named_parameters(remove_duplicate=False))
    adapt, loop = partial(_whole_call, root), partial(loop_of, root)
    reader = Reader(seen.graph, parameters, {}, frozenset(), root.get_submodule, adapt, loop=loop)
    return Captured(reader, seen.shapes.__getitem__, _chain_calls(root, seen.graph), proves=False)


def _exported(root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Captured:
    program = export_program(root, args, kwargs)
    parameters = dict(root.named_parameters(remove_duplicate=False))
    groups = _groups(root, program.graph.nodes, is_chain)
    calls = [ChainCall(rows[0], source, path) for path, rows, source in groups if source is not None]
    within = [row for row in _groups(root, program.graph.nodes, _is_within) if _is_read(root, row)]
    inside = frozenset(node for _, rows, _ in (*groups, *within) for node in rows)
    own = _Exported(root, parameters)
    reader = replace(
        read_program(program),
        parameters=parameters,
        adapt=own.own_call,
        owner=own.link_path,
        loop=partial(loop_of, root),
        outlined=inside,
        given=partial(_within_calls, root, within),
        module=root.get_submodule,
    )
    return Captured(reader, program_shapes(program, None), tuple(calls))


_CallGroup = tuple[str, list[Node], Node | None]


def _groups(root: nn.Module, nodes: Any, wanted: Callable[[nn.Module], bool]) -> list[_CallGroup]:
    """Return, for each call of a wanted module, its path, the nodes that the call made, and the node of its input."""
    groups: dict[tuple[str, str], list[Node]] = {}
    for node in nodes:
        # the outermost wanted module counts, and each call of it is a group of its own: keys have the name of the call
        key = next((key for key in _stack(node).items() if _is_at(root, key[1], wanted)), None)
        if key is not None:
            groups.setdefault(key, []).append(node)
    found = []
    for (_, path), group in groups.items():
        outside = (n for node in group for n in node.all_input_nodes if n not in group)
        # placeholders with these prefixes are parameters, buffers and constants, not inputs
        sources = [n for n in outside if n.op != "placeholder" or not n.name.startswith(("p_", "b_", "c_"))]
        found.append((path, group, next(iter(sources), None)))
    return found


def _is_within(module: nn.Module) -> bool:
    return isinstance(within_of(module), Within)


def _is_read(root: nn.Module, group: _CallGroup) -> bool:
    """Whether a layer that does more than its operator has one input and an operator that can be read."""
    path, _, source = group
    return source is not None and isinstance(read_module(root.get_submodule(path)), Operator)


def _within_calls(root: nn.Module, groups: Sequence[_CallGroup], reader: Reader) -> dict[int, Call]:
    """Return one call for each call of a layer that does more than its operator, by its last value."""
    found = {}
    for path, rows, source in groups:
        module = root.get_submodule(path)
        operator = read_module(module)
        assert source is not None  # _is_read has checked it
        assert isinstance(operator, Operator)  # likewise
        bias = None if operator.bias is None else f"{path}.bias"
        *inside, last = (reader.numbers[node] for node in rows)
        weight = f"{path}.{weight_path(module)}"
        call = Call(last, reader.numbers[source], operator, weight, bias, path=path, inside=tuple(inside))
        found[last] = call
    return found


def _stack(node: Node) -> dict[str, str]:
    """Return the paths of the modules in whose forward a node was made, outermost first, by the names of the calls."""
    stack = node.meta.get("nn_module_stack") or {}
    return {str(call): str(path).split("@")[0] for call, (path, _) in stack.items()}


def _is_at(root: nn.Module, path: str, wanted: Callable[[nn.Module], bool]) -> bool:
    try:
        return wanted(root.get_submodule(path))
    except AttributeError:
        return False


@dataclass(frozen=True, eq=False)
class _Exported:
    """Reads the calls of an exported graph as calls of the modules that made them."""

    root: nn.Module
    parameters: Mapping[str, nn.Parameter]

    def link_path(self, node: Node) -> str | None:
        """Return the path of the reshape module whose forward made a node; None if there is none."""
        path = _caller(self.root, node)
        return path if path is not None and is_link_module(self.root.get_submodule(path)) else None

    def own_call(self, call: Call, reader: Reader) -> Call | Skip:
        """Turn a call in an exported graph into the call of the module whose forward made it, or refuse it."""
        if call.path is not None:
            return _whole_call(self.root, call, reader)
        path = _caller(self.root, reader.node(call.value))
        owner = None if path is None else self.root.get_submodule(path)
        # a module's forward may call a function on a weight of another module
        owns = owner is not None and owner._parameters.get("weight") is self.parameters[call.weight]
        if path is None or owner is None or not is_operator_module(owner) or not owns:
            return _functional_skip(self.root, call)
        operator = read_module(owner)
        reason = operator.reason if isinstance(operator, Refusal) else _refuse(operator, call.operator)
        if reason is not None:
            return Skip(path, call.operator.description, reason, call.operator.parameters)
        assert isinstance(operator, Operator)  # else there is a reason
        weight = f"{path}.weight"  # torch.export gives tied weights the name of one of them
        call = replace(call, operator=operator, weight=weight, path=path, computed_bias=None)
        skip = held_skip(self.root, call)
        return skip or (_without_views(call, reader) if call.stored == "in_out" else call)


def _refuse(operator: Operator, called: Operator) -> str | None:
    if not isinstance(operator, Conv) or not isinstance(called, Conv):
        return None
    if operator.geometry.padding_mode != "zeros" and operator.geometry.padded:
        return f"its padding mode {operator.geometry.padding_mode} is a node of its own in an exported graph"
    other = operator.geometry.output_padding != called.geometry.output_padding
    return "it is called with more than its input" if other else None


def _without_views(call: Call, reader: Reader) -> Call:
    """Widen the product of a Conv1D to the whole module, which flattens its input and restores the shape afterwards."""
    users, source = list(reader.node(call.value).users), reader.node(call.source)
    if not _is_view(source) or len(users) != 1 or not _is_view(users[0]):
        return call
    # view -> addmm -> view is one call of the module: it reads what the first view reads and gives the last view
    outer, last = (reader.numbers[node] for node in (source.all_input_nodes[0], users[0]))
    return replace(call, source=outer, value=last, reader=call.value, inside=(call.source, call.value))


def _is_view(node: Node) -> bool:
    return node.target in (torch.ops.aten.view.default, torch.ops.aten.reshape.default)


def _caller(root: nn.Module, node: Node) -> str | None:
    """Return the path of the innermost module in whose forward a node was made; None if the root has no such module."""
    path = next(reversed(_stack(node).values()), None)
    try:
        return None if path is None or root.get_submodule(path) is None else path
    except AttributeError:
        return None
