"""The graph kind of torch.export's programs: ATen nodes are rewritten, and a valid program is built anew.

Parameters are placeholders: each edit keeps placeholders, input specs and state dict together. New nodes get their fake
values by running them on the fake values of their inputs, so that dynamic shapes stay dynamic.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import ConstantArgument, ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import Graph, GraphModule, Node

from surgery.chain import Chain
from surgery.errors import CheckError, InputError
from surgery.graphs.functional_edit import FunctionalKind, read_record, write_record
from surgery.graphs.packed import pack, unpack
from surgery.graphs.runs import Run
from surgery.graphs.view import Spot, View, identity
from surgery.operators import Shape

__all__ = ["ProgramKind", "program_shapes", "program_view"]


def program_view(program: ExportedProgram, graph: Graph | None = None) -> View:
    """Return the view of a program (or of a copy of its graph): its parameters are what its signature says."""
    graph = program.graph if graph is None else graph
    specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs if hasattr(spec.arg, "name")}
    providers, buffers = {}, set()
    for node in graph.find_nodes(op="placeholder"):
        spec = specs.get(node.name)
        if spec is None or spec.target is None:
            continue
        if spec.kind is InputKind.PARAMETER:
            providers[node] = spec.target
        else:
            buffers.add(node)
    parameters = {name: program.state_dict[name] for name in program.graph_signature.parameters}
    return View(graph, parameters, providers, frozenset(buffers))


def program_shapes(
    program: ExportedProgram, inputs: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> Callable[[Node], Shape]:
    """Return a function from nodes to concrete shapes, with symbols as in the inputs or in the export's examples.

    Raises:
        InputError: an input has another size than the program fixes, or there are more or fewer inputs.
    """
    values = {} if inputs is None else _solve_symbols(program, inputs)

    def size(dim: Any) -> int:
        if isinstance(dim, int):
            return dim
        known = dim.node.expr.subs(values) if values else dim.node.hint
        if known is None or not getattr(known, "is_number", True):
            raise InputError(f"the program does not say how large {dim} is", next_step="give example_inputs")
        return int(known)

    return lambda node: tuple(size(dim) for dim in node.meta["val"].shape)


def _solve_symbols(program: ExportedProgram, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[Any, int]:
    """Match the inputs' sizes with the symbolic sizes of the program's placeholders."""
    wanted = [n for n in program.graph.find_nodes(op="placeholder") if n.name in program.graph_signature.user_inputs]
    given = [leaf for leaf in torch.utils._pytree.tree_leaves(inputs) if leaf is not None]
    wanted = [node for node in wanted if node.meta.get("val") is not None]
    if len(given) != len(wanted):
        raise InputError(f"{len(given)} inputs were given", allowed=f"{len(wanted)}, as the program was exported")
    values: dict[Any, int] = {}
    for node, value in zip(wanted, given, strict=True):
        fake = node.meta["val"]
        if not isinstance(value, Tensor) or not isinstance(fake, Tensor):
            continue
        shape = tuple(value.shape)
        fits = len(shape) == fake.dim() and all(_match(d, s, values) for d, s in zip(fake.shape, shape, strict=True))
        if not fits:
            says = ",".join(map(str, fake.shape))
            raise InputError(
                f"input {node.name} has shape {','.join(map(str, shape))}",
                allowed=f"{says}, as the program was exported",
                next_step="export again with dynamic_shapes for other sizes",
            )
    return values


def _match(dim: Any, size: int, values: dict[Any, int]) -> bool:
    if isinstance(dim, int):
        return dim == size
    expression = dim.node.expr
    if expression.is_Symbol:
        return values.setdefault(expression, size) == size
    return not expression.subs(values).is_number or int(expression.subs(values)) == size


class ProgramKind(FunctionalKind):
    """Adapter of an ExportedProgram; it works on a copy of the graph, and shares tensors until ``finish``."""

    kind = "program"

    def __init__(self, program: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._program = program
        self._module = GraphModule(program.graph_module, _copy_graph(program.graph))
        self.graph = self._module.graph
        self.record = read_record(program.graph_module)
        self._state = dict(program.state_dict)
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        self._first = program_view(program, self.graph)
        self._nodes = {name: node for node, name in self._first.providers.items()}
        self.shared = {}
        self._gone: set[Node] = set()
        self._renamed: list[tuple[str, str]] = []
        given = (args, kwargs) if args or kwargs else None
        self.shape = program_shapes(program, given)
        self.view = self._first
        if unpack(self):
            self.view = self.look()

    def look(self) -> View:
        """Return a view of the graph as it is now."""
        parameters = {name: self._state[name] for name in self._nodes}
        providers = {node: name for name, node in self._nodes.items()}
        return View(self.graph, parameters, providers, self._first.buffers)

    def splice(self, spot: Spot, chain: Chain) -> None:
        """Put a chain where an operator stands, at all its calls."""
        self.splice_functions(spot, chain)

    def put_back(self, run: Run) -> None:
        """Put one operator where a run stands, at all its calls."""
        self.put_back_functions(run)

    @cached_property
    def _mode(self) -> FakeTensorMode:
        for node in self.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, FakeTensor):
                return value.fake_mode
        raise CheckError("the program's nodes have no fake values", next_step="export it again")

    def add_parameter(self, names: Sequence[str], parameter: nn.Parameter) -> None:
        """Add one parameter under all its names: state, placeholder and input spec each."""
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
        """Forget the state; the placeholder goes when it is swept."""
        if name in self._state:
            del self._state[name]
            self._gone.add(self._nodes.pop(name))

    def is_dropped(self, node: Node) -> bool:
        """Whether the node is the placeholder of a dropped parameter."""
        return node in self._gone

    def stamp(self, node: Node, like: Node) -> None:
        """Copy the metadata, and run the node on fake values."""
        super().stamp(node, like)
        values = torch.fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        shape_env = self._mode.shape_env
        kept = nullcontext() if shape_env is None else shape_env.suppress_guards()
        with self._mode, torch.no_grad(), kept:  # a guard on which kernel runs would narrow the sizes that are dynamic
            node.meta["val"] = node.target(*values[0], **values[1])  # type: ignore[operator] # it is a call_function

    def replace(self, old: Node, new: Node) -> None:
        """Check that both values have the same shape and dtype, replace, and remember the name."""
        was, now = old.meta["val"], new.meta["val"]
        if tuple(map(str, was.shape)) != tuple(map(str, now.shape)) or was.dtype != now.dtype:
            raise CheckError(f"{old.name} was {was.dtype} {tuple(was.shape)} and became {now.dtype} {tuple(now.shape)}")
        self._renamed.append((old.name, new.name))
        super().replace(old, new)

    def finish(self) -> ExportedProgram:
        """Build and validate a new program: signature, state and call graph that belong to the rewritten nodes."""
        pack(self)
        old = self._program
        self.graph.lint()
        inputs = [self._specs[node.name] for node in self.graph.find_nodes(op="placeholder")]
        signature = ExportGraphSignature(inputs, copy.deepcopy(old.graph_signature.output_specs))
        for before, after in self._renamed:
            signature.replace_all_uses(before, after)
        calls = [_rename_entry(entry, _final_names(self._renamed)) for entry in old.module_call_graph]
        self._module.meta.update(old.graph_module.meta)
        write_record(self._module, self.record)
        return ExportedProgram(
            root=self._module,
            graph=self.graph,
            graph_signature=signature,
            state_dict=_own_state(self._state, old.state_dict),
            range_constraints=copy.copy(old.range_constraints),
            module_call_graph=calls,
            example_inputs=old.example_inputs,
            constants=old.constants,
            verifiers=old.verifiers,
        )


def _copy_graph(graph: Graph) -> Graph:
    """Copy a graph with the names of its nodes, to which the signature refers; fx would rename an ``input``."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        new.name = old.name
    return copied


def _final_names(renamed: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the last name of each node that was replaced; what took its place may have been replaced as well."""
    names: dict[str, str] = {}
    for before, after in reversed(renamed):
        names[before] = names.get(after, after)
    return names


def _rename_entry(entry: ModuleCallEntry, names: dict[str, str]) -> ModuleCallEntry:
    """Copy the part of a call's signature that names nodes, with the new names."""
    if entry.signature is None:
        return entry
    inputs, outputs = copy.deepcopy((entry.signature.inputs, entry.signature.outputs))
    for argument in (*inputs, *outputs):
        if not isinstance(argument, ConstantArgument):
            argument.name = names.get(argument.name, argument.name)
    return replace(entry, signature=replace(entry.signature, inputs=inputs, outputs=outputs))


def _own_state(state: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors that the old program has too, each once, so that tied weights stay tied."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    others = {identity(tensor) for tensor in old.values()}
    for name, tensor in state.items():
        key = identity(tensor)
        if key not in copies:
            mine = tensor.detach().clone() if key in others else tensor
            trains = isinstance(tensor, nn.Parameter)
            copies[key] = nn.Parameter(mine, requires_grad=tensor.requires_grad) if trains else mine
        state[name] = copies[key]
    return state
