"""Open programs of torch.export: ATen nodes are rewritten, and a new valid program is built at the end.

Parameters are placeholders: each edit keeps placeholders, input specs and state dict consistent. A new node gets its
fake value by a run on the fake values of its inputs, so that dynamic shapes stay dynamic. While a program is open, its
recurrent layers exist as modules too, in addition to the nodes that compute them (see ``recurrence``).
"""

from __future__ import annotations

import copy
import itertools
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Interpreter, Node

from surgery.errors import CheckError
from surgery.kinds.fx.computed import Constants, lift
from surgery.kinds.fx.graph import read_record, write_record
from surgery.kinds.fx.module_calls import GraphEdits
from surgery.kinds.fx.nodes import add_outline, drop_outline, in_outline
from surgery.kinds.fx.packed import pack, unpack
from surgery.kinds.fx.read import Reader
from surgery.kinds.fx.recurrence import (
    Recurrence,
    describe,
    export_layer,
    is_kernel,
    kernel_values,
    read_factored,
    read_kernels,
    write_kernel,
)
from surgery.kinds.fx.run import ObservedGraph
from surgery.kinds.layers.recurrent_forms import loop_of
from surgery.kinds.observed import Observed
from surgery.kinds.program.read import copy_graph, final_names, own_state, program_shapes, read_program, rename_entry
from surgery.kinds.program.run import bind_program, buffer_of

__all__ = ["OpenProgram"]


class OpenProgram(GraphEdits):
    """An open ExportedProgram: it edits a copy of the graph, and shares tensors with the program until ``finish``."""

    def observe(self) -> Observed:
        """Return the program, to be interpreted node by node."""
        bind, buffer = partial(bind_program, self._program, self.reader), partial(buffer_of, self._program)
        return ObservedGraph(self, self.root, bind, buffer)

    def __init__(self, program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The graph is copied, and tensors are shared. The signature refers to nodes by name, so names are kept.
        # _state, _specs and _nodes always describe the same parameters.
        self._program = program
        self.root = GraphModule(program.graph_module, copy_graph(program.graph))
        self.graph = self.root.graph
        self.record = read_record(program.graph_module)
        self._state = dict(program.state_dict)
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self._first = read_program(program, self.graph)
        self._nodes = {name: node for node, name in self._first.providers.items()}
        self.shared = {}
        self._gone: set[Node] = set()
        self._renamed: list[tuple[str, str]] = []
        given = (args, kwargs) if args or kwargs else None
        self.shape = program_shapes(program, given)
        self.recurrences = self._find_recurrences()
        self.reread()
        if unpack(self):
            self.reread()

    def look(self) -> Reader:
        """Return a reader of the graph as it is now; recurrent layers have the weights of their modules."""
        hidden = {name for layer in self.recurrences for name in layer.names}
        providers = {node: name for name, node in self._nodes.items() if name not in hidden}
        parameters = {name: self._state[name] for name in self._nodes if name not in hidden}
        for layer in self.recurrences:
            parameters |= layer.parameters
        inside = frozenset(node for layer in self.recurrences for node in layer.inside)
        buffers, module = self._first.buffers, self.root.get_submodule
        loop = partial(loop_of, self.root)
        reader = Reader(
            self.graph, parameters, providers, buffers, module, loop=loop, outlined=inside, start=self.start
        )
        updated = frozenset(self._program.graph_signature.buffers_to_mutate.values())
        return lift(reader, Constants(self._read_constant, updated), self.values)

    def _read_constant(self, node: Node) -> tuple[str, Tensor] | None:
        """Return the name and the tensor of the buffer or constant that a placeholder provides; else None."""
        spec = self._specs.get(node.name) if node in self._first.buffers else None
        name = "" if spec is None else str(spec.target)
        value = self._state[name] if name in self._state else self._program.constants.get(name)
        return (name, value) if isinstance(value, Tensor) else None

    def constants(self) -> dict[str, Tensor]:
        """Return all buffers and constants, by name."""
        return dict(found for node in self._first.buffers if (found := self._read_constant(node)) is not None)

    def constant(self, name: str, user: Node) -> Node:
        """Return the placeholder of a buffer or a constant."""
        return next(node for node in self._first.buffers if self._specs[node.name].target == name)

    def _find_recurrences(self) -> list[Recurrence]:
        """Read the recurrent layers, attach their modules and add their outlines."""
        parameters = {name: self._state[name] for name in self._nodes}
        found = [
            *read_kernels(self.graph, self._first.providers, parameters),
            *read_factored(self.graph, self.root, self._nodes, parameters, self.record),
        ]
        for layer in found:
            self.root.add_submodule(layer.path, layer.module)
            for node in add_outline(self.root, layer.path, layer.source, layer.inside[0]):
                node.meta["val"] = self._value_of(node)
        return found

    def _write(self, layer: Recurrence) -> None:
        """Write a recurrent layer that has changed: as the call of a kernel, or as torch exports its module."""
        like = next(node for node in layer.inside if node in layer.outputs)
        # a layer that is whole again needs no record
        self.record = self.record.without_layer(layer.path)
        made: Sequence[Node | None]
        used: set[str] = set()
        parameter = self._layer_parameter(layer, used)
        if (kernel := write_kernel(self.graph, layer, parameter, like)) is not None:
            self.stamp(kernel, like)
            made = [self._insert_item(kernel, at, like) for at in range(len(layer.outputs))]
        else:
            made = self._write_export(layer, parameter, like)
            self.record = self.record.with_layer(layer.path, describe(layer.module))
        for old, new in zip(layer.outputs, made, strict=True):
            if old is not None and new is not None:
                self.replace(old, new)
        for node in reversed([node for node in layer.inside if node not in layer.outputs]):
            self.graph.erase_node(node)
        for name in layer.names - used:
            self.drop_parameter(name)

    def _insert_item(self, node: Node, at: int, like: Node) -> Node:
        with self.graph.inserting_before(like):
            item = self.graph.call_function(operator.getitem, (node, at))
        self.stamp(item, like)
        return item

    def _layer_parameter(self, layer: Recurrence, used: set[str]) -> Callable[[str], Node]:
        """Return a function from the names of a layer's parameters to their nodes.

        The function adds parameters that the program does not have yet, and puts all names that it gets into ``used``.
        """
        own = layer.parameters

        def node(name: str) -> Node:
            used.add(name)
            path, _, leaf = name.rpartition(".")
            part = f"{path}.{leaf.removeprefix('weight_')}.weight" if leaf.startswith("weight_") else name
            # the kernel reads weight_ih_l0; the module has it as ih_l0.weight, and it may be another tensor now
            if self._state.get(name) is not own[part]:
                self.drop_parameter(name)
                self.add_parameter([name], own[part])
            return self._nodes[name]

        return node

    def _write_export(self, layer: Recurrence, parameter: Callable[[str], Node], like: Node) -> list[Node]:
        program = export_layer(layer.module, layer.source.meta["val"], [state.meta["val"] for state in layer.states])
        given = iter([layer.source, *layer.states])
        made: dict[Node, Node] = {}
        # placeholders of the export become nodes of this graph: parameters by name, inputs in order
        specs = iter(program.graph_signature.input_specs)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                spec = next(specs)
                inner = spec.kind is InputKind.PARAMETER
                made[node] = parameter(f"{layer.path}.{spec.target}") if inner else next(given)
            elif node.op == "output":
                outputs: Any = node.args[0]
                return [made[output] for output in outputs]
            else:
                with self.graph.inserting_before(like):
                    made[node] = new = self.graph.node_copy(node, made.__getitem__)
                if node.op == "get_attr":
                    new.target = self._add_body(getattr(program.graph_module, str(node.target)))
                self.stamp(new, like)
                # a scan's body is a graph of its own; its nodes come with the fake values of the layer's export
                if isinstance(body := new.args and new.args[0], Node) and body.op == "get_attr":
                    self._stamp_body(new, body)
        raise CheckError("an exported graph has no output")

    def _stamp_body(self, scan: Node, body: Node) -> None:
        """Give the nodes of a loop's body the fake values that they have in this program."""
        given: Any = torch.fx.map_arg(scan.args, lambda n: n.meta["val"])
        # scan(body, states, xs, additional inputs): the body gets one slice of each xs, without its first axis.
        _, states, parts, others = given
        module = self.root.get_submodule(str(body.target))
        assert isinstance(module, GraphModule)  # as torch exports it
        with self._mode, torch.no_grad():
            _Stamping(module).run(*states, *(part[0] for part in parts), *others)

    def _add_body(self, body: GraphModule) -> str:
        """Attach the body of a loop under a free name, and return the name."""
        name = next(name for n in itertools.count() if not hasattr(self.root, name := f"scan_combine_graph_{n}"))
        setattr(self.root, name, body)
        return name

    @cached_property
    def _mode(self) -> FakeTensorMode:
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        raise CheckError("the program's nodes have no fake values", next_step="export it again")

    def add_parameter(self, names: Sequence[str], parameter: nn.Parameter) -> None:
        """Add one parameter under all its names; each name gets an entry in the state, a placeholder and a spec."""
        # torch.export lists parameters first: new ones go before the first placeholder that is not one
        others = (n for n in self.graph.find_nodes(op="placeholder") if self._specs[n.name].kind != InputKind.PARAMETER)
        anchor = next(others, None) or next(n for n in self.graph.nodes if n.op != "placeholder")
        for name in names:
            with self.graph.inserting_before(anchor):
                node = self.graph.placeholder("p_" + name.replace(".", "_"))
            node.target = node.name
            node.meta["val"] = self._mode.from_tensor(parameter, static_shapes=True)
            self._specs[node.name] = InputSpec(InputKind.PARAMETER, TensorArgument(node.name), name, None)
            self._state[name], self._nodes[name] = parameter, node

    def parameter_node(self, name: str, user: Node) -> Node:
        """Return the placeholder of a parameter."""
        return self._nodes[name]

    def drop_parameter(self, name: str) -> None:
        """Remove the parameter from the state; ``sweep`` erases its placeholder."""
        if name in self._state:
            del self._state[name]
            self._gone.add(self._nodes.pop(name))

    def is_dropped(self, node: Node) -> bool:
        """Whether the node is the placeholder of a dropped parameter."""
        return node in self._gone

    def stamp(self, node: Node, like: Node) -> None:
        """Copy the metadata of ``like``, and compute the fake value of the node."""
        super().stamp(node, like)
        node.meta["val"] = self._value_of(node)

    def _value_of(self, node: Node) -> Any:
        """Return the fake value of a node, by a run on the fake values of its inputs."""
        if node.op == "get_attr":
            return self.root.get_submodule(str(node.target))
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        shape_env = self._mode.shape_env
        kept = nullcontext() if shape_env is None else shape_env.suppress_guards()
        with self._mode, torch.no_grad(), kept:  # a guard on the choice of a kernel would narrow dynamic sizes
            if is_kernel(node):
                return kernel_values(args)
            if callable(node.target):
                return node.target(*args, **kwargs)
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            module = self.root.get_submodule(str(node.target))
            # a module in an outline runs on fake copies of its parameters
            fakes: dict[str, Tensor] = {
                name: self._mode.from_tensor(p, static_shapes=True) for name, p in module.named_parameters()
            }
            return torch.func.functional_call(module, fakes, args, kwargs)

    def replace(self, old: Node, new: Node) -> None:
        """Replace a node by a new one, and remember both names for the signature.

        Raises:
            CheckError: the values of the two nodes differ in shape or dtype.
        """
        if in_outline(old):
            super().replace(old, new)
            return
        was, now = old.meta["val"], new.meta["val"]
        if tuple(map(str, was.shape)) != tuple(map(str, now.shape)) or was.dtype != now.dtype:
            raise CheckError(f"{old.name} was {was.dtype} {tuple(was.shape)} and became {now.dtype} {tuple(now.shape)}")
        self._renamed.append((old.name, new.name))
        super().replace(old, new)

    def finish(self) -> ExportedProgram:
        """Build a new program from the rewritten graph, with its own signature, state and module call graph."""
        # Recurrent layers that changed are written first, since they still need their modules. Packing comes after the
        # sweep, and the signature at last, when all names are final.
        drop_outline(self.graph)
        for layer in self.recurrences:
            if layer.changed:
                self._write(layer)
            self.root.delete_submodule(layer.path)
        self.sweep()
        pack(self)
        old = self._program
        self.graph.lint()
        inputs = [self._specs[node.name] for node in self.graph.find_nodes(op="placeholder")]
        signature = ExportGraphSignature(inputs, copy.deepcopy(old.graph_signature.output_specs))
        for before, after in self._renamed:
            signature.replace_all_uses(before, after)
        calls = [rename_entry(entry, final_names(self._renamed)) for entry in old.module_call_graph]
        self.root.meta.update(old.graph_module.meta)
        write_record(self.root, self.record)
        return ExportedProgram(
            root=self.root,
            graph=self.graph,
            graph_signature=signature,
            state_dict=own_state(self._state, old.state_dict),
            range_constraints=copy.copy(old.range_constraints),
            module_call_graph=calls,
            example_inputs=old.example_inputs,
            constants=old.constants,
            verifiers=old.verifiers,
        )


class _Stamping(Interpreter):
    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        n.meta = {k: v for k, v in n.meta.items() if k != "tensor_meta"} | ({} if n.op == "output" else {"val": value})
        return value
