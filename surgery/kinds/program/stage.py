"""Build one stage of an exported program: a graph, its signature and its state.

(parameters, buffers, constants, inputs) -> sizes that are computed again -> operations -> (changes, outputs)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymIntArgument,
    TensorArgument,
)
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from surgery.kinds.fx.cut import copy_node, is_operation
from surgery.kinds.program.read import input_arguments, memory_key

__all__ = ["Stage", "argument_of", "symbols_in"]


class Stage:
    """One stage to be built: its operations, what it reads of the program's state, and its inputs."""

    def __init__(
        self, program: ExportedProgram, operations: Sequence[Node], lifted: Sequence[Node], inputs: Sequence[Node]
    ) -> None:
        self._program, self._operations, self._lifted = program, operations, lifted
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        # size -> what computes it again here: an input and its axis, or the node itself on sizes that are at hand
        self._again: dict[Node, tuple[Node, int] | None] = {}
        tensors = [node for node in inputs if isinstance(node.meta.get("val"), Tensor)]
        sent = [n for n in inputs if n.op == "placeholder" or n in tensors or not self._is_computed(n, tensors)]
        self.inputs: tuple[Node, ...] = tuple(sent)

    def _is_computed(self, node: Node, tensors: Sequence[Node]) -> bool:
        """Whether a size of another stage can be computed in this one; if so, remember how."""
        value = node.meta.get("val")
        if not isinstance(value, SymInt | int) or not is_operation(node):
            return False
        if node in self._again:
            return True
        # Example of a stage that gets x (s0, 8) and needs s0 * 8: s0 has the place (x, 0) and becomes
        # sym_size(x, 0), and s0 * 8 has no place, but all that it reads is computed here, so that its node is
        # copied. No place and no inputs: sent.
        place = next(_places(value, tensors), None)
        if place is None and not all(self._is_computed(other, tensors) for other in node.all_input_nodes):
            return False
        if place is None and not node.all_input_nodes:
            return False
        self._again[node] = place
        return True

    def something(self) -> list[Node]:
        """Return one value, for a stage of which nobody needs any: torch saves no program without outputs."""
        values = [
            n
            for n in (*self._operations, *self.inputs, *self._lifted)
            if isinstance(n.meta.get("val"), Tensor | SymInt)
        ]
        return values[:1]

    def build(
        self, given: Sequence[Node], changes: Sequence[OutputSpec], examples: Mapping[Node, Any]
    ) -> ExportedProgram:
        """Return the program of the stage; ``given`` are its outputs, and ``changes`` say what else it writes to."""
        program = self._program
        graph = Graph()
        made: dict[Node, Node] = {}
        for node in (*self._lifted, *self.inputs):
            made[node] = _placeholder(graph, node)
        self._compute_sizes(graph, made)
        for node in self._operations:
            for other in node.all_input_nodes:
                if other.op == "get_attr" and other not in made:
                    made[other] = copy_node(graph, other, made.__getitem__)
            made[node] = copy_node(graph, node, made.__getitem__)
        named = {node.name: node for node in program.graph.nodes}
        ends = [*(named[spec.arg.name] for spec in changes), *given]
        graph.output(tuple(made[node] for node in ends))
        signature = ExportGraphSignature(
            [*(copy.copy(self._specs[n.name]) for n in self._lifted), *map(self._input_spec, self.inputs)],
            [*map(copy.copy, changes), *(OutputSpec(OutputKind.USER_OUTPUT, argument_of(n), None) for n in given)],
        )
        return self._program_of(graph, signature, examples)

    def _compute_sizes(self, graph: Graph, made: dict[Node, Node]) -> None:
        for node in self._program.graph.nodes:
            if node not in self._again:
                continue
            place = self._again[node]
            if place is None:
                made[node] = copy_node(graph, node, made.__getitem__)
                continue
            source, axis = place
            made[node] = graph.call_function(torch.ops.aten.sym_size.int, (made[source], axis))
            made[node].name, made[node].meta = node.name, copy.copy(node.meta)

    def _input_spec(self, node: Node) -> InputSpec:
        own = self._specs.get(node.name) if node.op == "placeholder" else None
        return InputSpec(InputKind.USER_INPUT, argument_of(node), None) if own is None else copy.copy(own)

    def _program_of(
        self, graph: Graph, signature: ExportGraphSignature, examples: Mapping[Node, Any]
    ) -> ExportedProgram:
        old = self._program
        symbols = {symbol for node in graph.nodes for symbol in symbols_in(node.meta.get("val"))}
        root = GraphModule(old.graph_module, graph)
        root.meta.update({key: value for key, value in old.graph_module.meta.items() if key != "surgery"})
        read = {str(self._specs[node.name].target) for node in self._lifted}
        keys = {memory_key(old.state_dict[name]) for name in read if name in old.state_dict}
        full = all(node in examples for node in self.inputs)
        made = ExportedProgram(
            root=root,
            graph=graph,
            graph_signature=signature,
            # a tensor comes under all its names
            state_dict={name: tensor for name, tensor in old.state_dict.items() if memory_key(tensor) in keys},
            range_constraints={s: bounds for s, bounds in old.range_constraints.items() if str(s) in symbols},
            module_call_graph=self._calls(signature),
            example_inputs=(tuple(examples[node] for node in self.inputs), {}) if full else None,
            constants={name: value for name, value in old.constants.items() if name in read},
            verifiers=old.verifiers,
        )
        made._guards_code = []  # they compare inputs of the whole program
        return made

    def _calls(self, signature: ExportGraphSignature) -> list[ModuleCallEntry]:
        inputs = [argument.name for argument in input_arguments(signature)]
        outputs = signature.user_outputs
        taken = pytree.tree_structure(((0,) * len(inputs), {}))
        own = ModuleCallSignature([], [], taken, pytree.tree_structure((0,) * len(outputs)), inputs)
        stacks = [node.meta.get("nn_module_stack") or {} for node in self._operations]
        paths = {str(row[0]) for stack in stacks for row in stack.values()}
        rest = self._program.module_call_graph[1:]
        return [ModuleCallEntry("", own), *(ModuleCallEntry(entry.fqn) for entry in rest if entry.fqn in paths)]


def _placeholder(graph: Graph, node: Node) -> Node:
    made = graph.placeholder(node.name)
    made.name = made.target = node.name
    kept = (
        node.meta if node.op == "placeholder" else {k: v for k, v in node.meta.items() if k in ("val", "tensor_meta")}
    )
    made.meta = copy.copy(kept)
    return made


def _places(value: int | SymInt, tensors: Sequence[Node]) -> Iterator[tuple[Node, int]]:
    """Yield the tensors and axes that have a symbolic size."""
    if not isinstance(value, SymInt):
        return
    for node in tensors:
        for axis, size in enumerate(node.meta["val"].shape):
            if isinstance(size, SymInt) and size.node.expr == value.node.expr:
                yield node, axis


def argument_of(node: Node) -> TensorArgument | SymIntArgument:
    """Return how a signature refers to a node's value."""
    return TensorArgument(node.name) if isinstance(node.meta.get("val"), Tensor) else SymIntArgument(node.name)


def symbols_in(value: Any) -> Iterator[str]:
    """Yield the names of the symbols in the sizes of a value."""
    for leaf in pytree.tree_leaves(value):
        for size in leaf.shape if isinstance(leaf, Tensor) else [leaf]:
            if isinstance(size, SymInt | torch.SymFloat | torch.SymBool):
                yield from map(str, size.node.expr.free_symbols)
