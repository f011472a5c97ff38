"""Open GraphModules: nodes are rewritten, whether they call modules or functions."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from surgery.errors import InputError
from surgery.kinds.base import Access
from surgery.kinds.fx.computed import Constants, lift
from surgery.kinds.fx.flow import lazy_shapes
from surgery.kinds.fx.graph import read_record, write_record
from surgery.kinds.fx.module_calls import GraphEdits
from surgery.kinds.fx.nodes import add_outline, drop_outline
from surgery.kinds.fx.packed import pack, unpack
from surgery.kinds.fx.read import Reader
from surgery.kinds.fx.recurrence import Recurrence, is_kernel, read_kernels
from surgery.kinds.fx.run import ObservedGraph, bind_graph
from surgery.kinds.layers.carried import copy_module, held_skip
from surgery.kinds.layers.modules import is_outlined
from surgery.kinds.layers.recurrent_forms import loop_of
from surgery.kinds.layers.unpacking import has_packed, is_packed, pack_all, unpack_all
from surgery.kinds.observed import Observed

__all__ = ["OpenGraphModule"]


class OpenGraphModule(GraphEdits):
    """An open GraphModule."""

    def observe(self) -> Observed:
        """Return the graph, to be interpreted node by node."""
        buffer = self.root.get_buffer
        bind = partial(bind_graph, self.graph)
        return ObservedGraph(self, self.root, bind, lambda node: (str(node.target), buffer(str(node.target))))

    def __init__(self, model: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], access: Access) -> None:
        packed = has_packed(model) or _is_packed(model)
        self.root = copy_module(model) if access.copies or (packed and not access.inplace) else model
        self._packed = unpack_all(self.root)
        self.graph = self.root.graph
        for node in self.graph.find_nodes(op="call_module"):
            # recurrent layers that are called as modules are unpacked already; each gets its outline before its call
            if is_outlined(self.root.get_submodule(str(node.target))):
                source = node.args[0] if node.args else node.kwargs["input"]
                add_outline(self.root, str(node.target), source, node)
        self._holders: dict[str, nn.Module] = {}
        self.recurrences = self._find_recurrences()
        self.record = read_record(self.root)
        self.shape = lazy_shapes(self.root, lambda: _placeholder_values(self.root, args, kwargs))
        self.shared = {}
        self._dropped: set[str] = set()
        self.reread()
        # unpacking of packed projections needs a reader, and changes the graph that was read
        if unpack(self):
            self.reread()

    def look(self) -> Reader:
        """Return a reader of the graph as it is now."""
        parameters, providers, others = self._reads()
        inside = frozenset(node for layer in self.recurrences for node in layer.inside)
        reader = Reader(
            self.graph,
            parameters,
            providers,
            others,
            self.root.get_submodule,
            lambda call, _: call if call.path is None else held_skip(self.root, call) or call,
            loop=partial(loop_of, self.root),
            outlined=inside,
            start=self.start,
        )
        return lift(reader, Constants(self._read_constant), self.values)

    def _read_constant(self, node: Node) -> tuple[str, Tensor] | None:
        """Return the name and the tensor that a node reads if it is not a parameter; else None."""
        if node.op != "get_attr":
            return None
        path, _, leaf = str(node.target).rpartition(".")
        value = getattr(self.root.get_submodule(path), leaf, None)
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter):
            return None
        return str(node.target), value

    def constants(self) -> dict[str, Tensor]:
        """Return all tensors of the module that are not parameters, by name."""
        found: dict[str, Tensor] = {}
        for path, module in self.root.named_modules():
            plain = {**vars(module), **module._buffers}.items()
            found |= {f"{path}.{name}".lstrip("."): value for name, value in plain if isinstance(value, Tensor)}
        return found

    def constant(self, name: str, user: Node) -> Node:
        """Return a get_attr node just before ``user``."""
        return self.parameter_node(name, user)

    def _reads(self) -> tuple[dict[str, nn.Parameter], dict[Node, str], frozenset[Node]]:
        """Return all parameters, the nodes that read them with the names, and the nodes that read other attributes."""
        parameters = dict(self.root.named_parameters(remove_duplicate=False))
        reads = {node: str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        providers = {node: name for node, name in reads.items() if name in parameters}
        return parameters, providers, frozenset(reads.keys() - providers.keys())

    def _find_recurrences(self) -> list[Recurrence]:
        """Read the calls of recurrent kernels, put a module where their weights are held, and add the outlines."""
        parameters, providers, _ = self._reads()
        found = []
        for layer in read_kernels(self.graph, providers, parameters):
            holder = self.root.get_submodule(layer.path)
            # the module can stand in the holder's place only if the kernel reads all that the holder has
            if layer.names == {f"{layer.path}.{name}" for name in [*holder._parameters, *holder._modules]}:
                self._holders[layer.path] = holder
                vars(layer.module).update(holder._parameters)  # the kernel reads these names until it is replaced
                self.root.add_submodule(layer.path, layer.module)
                add_outline(self.root, layer.path, layer.source, layer.inside[0])
                found.append(layer)
        return found

    def _write(self, layer: Recurrence) -> None:
        """Write the call of a layer's module in the place of the kernel's call."""
        for name in self._holders[layer.path]._parameters:
            vars(layer.module).pop(name)
        # the new call stands where the first output is made: all its inputs come before
        like = next(node for node in layer.inside if node in layer.outputs)
        pair = layer.module.mode == "LSTM"
        with self.graph.inserting_before(like):
            node = self.graph.call_module(layer.path, (layer.source, layer.states if pair else layer.states[0]))
            out, last = (self.graph.call_function(operator.getitem, (node, at)) for at in range(2))
            ends = [self.graph.call_function(operator.getitem, (last, at)) for at in range(2)] if pair else [last]
        for old, new in zip(layer.outputs, [out, *ends], strict=True):
            self.stamp(new, like)
            if old is not None:
                self.replace(old, new)
        kernel = layer.inside[0]
        reads = [read for read in kernel.all_input_nodes if read.op == "get_attr"]
        for old in [kernel, *reads]:
            if not old.users:
                self.graph.erase_node(old)

    def add_parameter(self, names: Sequence[str], parameter: nn.Parameter) -> None:
        """Add one parameter under all its names, with empty modules along the paths where there are none."""
        for name in names:
            path, _, leaf = name.rpartition(".")
            module: nn.Module = self.root
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
        """Delete the attribute, and the modules that become empty."""
        if name in self._dropped:
            return
        self._dropped.add(name)
        path, _, leaf = name.rpartition(".")
        delattr(self.root.get_submodule(path), leaf)
        # modules that were made for factors alone go with the last of these
        while path and _is_empty(self.root.get_submodule(path)):
            path, _, leaf = path.rpartition(".")
            delattr(self.root.get_submodule(path), leaf)

    def is_dropped(self, node: Node) -> bool:
        """Whether the node reads an attribute that was deleted."""
        return node.op == "get_attr" and node.target in self._dropped

    def finish(self) -> GraphModule:
        """Drop the outlines, pack what is whole again, write the record, check the graph and recompile it."""
        drop_outline(self.graph)
        for layer in self.recurrences:
            if layer.changed:
                self._write(layer)
            else:
                self.root.add_submodule(layer.path, self._holders[layer.path])
        pack_all(self.root, self._packed)
        pack(self)
        write_record(self.root, self.record)
        self.graph.lint()
        self.root.recompile()
        return self.root


def _is_packed(model: GraphModule) -> bool:
    # models like these are copied even if nothing is to be changed, since opening unpacks them
    attends = any(is_packed(name) for name, _ in model.named_parameters())
    return attends or any(is_kernel(node) for node in model.graph.nodes)


def _is_empty(module: nn.Module) -> bool:
    return type(module) is nn.Module and not (module._parameters or module._modules or module._buffers)


def _placeholder_values(module: GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the inputs in the order of the placeholders, flattened if the graph was exported with a tree of inputs."""
    if not args and not kwargs:
        raise InputError("sites have no costs without input shapes", next_step="give example_inputs")
    # a graph from torch.export has one placeholder for each leaf of the inputs; a traced graph has one for each
    # argument
    codegen = module.graph._codegen
    if hasattr(codegen, "pytree_info"):
        order = codegen.pytree_info.in_spec.child(1).context or []
        named = {name: kwargs[name] for name in order} if set(order) == set(kwargs) else kwargs
        return tuple(torch.utils._pytree.tree_leaves((args, named)))
    names = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    return (*args, *(kwargs[name] for name in names[len(args) :] if name in kwargs))
