"""Cut an exported program into stages, each an exported program of its own.

A stage has the parameters, buffers and constants that it reads under their original names. Values from other stages are
inputs with the names of the nodes that give them. A symbolic size is computed again from an input of the stage that has
it, where there is one; else it is an input too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, OutputSpec
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.kinds.base import Cuttable, Piece, Pieces
from surgery.kinds.fx.cut import Facts, borders, check_stages, checks, is_operation, make_network
from surgery.kinds.fx.flow import macs_of
from surgery.kinds.fx.memory import kept_together, operator_aliases, operator_writes
from surgery.kinds.inputs import Inputs
from surgery.kinds.layers.untouched import kept_random
from surgery.kinds.program.read import memory_key, program_shapes, program_sizes, read_program
from surgery.kinds.program.run import bind_program
from surgery.kinds.program.stage import Stage, symbols_in
from surgery.kinds.program.whole import Whole
from surgery.sites.network import Network

__all__ = ["CutProgram"]

_KNOWN = (
    OutputKind.USER_OUTPUT,
    OutputKind.BUFFER_MUTATION,
    OutputKind.PARAMETER_MUTATION,
    OutputKind.USER_INPUT_MUTATION,
    OutputKind.TOKEN,
)
_NUMBER = 8  # bytes of a size


class CutProgram(Cuttable):
    """A program that is open to be cut; its stages share its tensors."""

    def __init__(self, program: ExportedProgram, inputs: Inputs) -> None:
        args, kwargs = inputs
        self._program = program
        given = inputs if args or kwargs else None
        self._shape, self._number = program_shapes(program, given), program_sizes(program, given)
        strange = [s.kind.name for s in program.graph_signature.output_specs if s.kind not in _KNOWN]
        if strange:
            raise InputError(f"the program has outputs of the kind {strange[0]}", allowed="programs without gradients")
        self._specs = {spec.arg.name: spec for spec in program.graph_signature.input_specs}
        placeholders = program.graph.find_nodes(op="placeholder")
        self._inputs = [n for n in placeholders if self._specs[n.name].kind is InputKind.USER_INPUT]
        self._lifted = [n for n in placeholders if self._specs[n.name].kind is not InputKind.USER_INPUT]
        self._operations = [node for node in program.graph.nodes if is_operation(node)]

    @property
    def network(self) -> Network:
        """The operations of the program, in the order of its graph."""
        return self._made[0]

    @cached_property
    def _made(self) -> tuple[Network, tuple[Node, ...]]:
        reader = read_program(self._program)
        facts = Facts(
            lambda node: [self._tensor_name(n) for n in node.all_input_nodes if n in self._carried],
            self._size,
            lambda node: macs_of(reader.numbers[node], node, reader, self._shape),
            {name: _bytes(tensor) for name, tensor in self._tensors.items()},
            {name: memory_key(tensor) for name, tensor in self._tensors.items()},
            lambda node: isinstance(node.meta.get("val"), Tensor | SymInt | int),
            self._together(),
            {
                number: [n for n, at in self._carried.items() if at == number and n in self._outputs]
                for number in range(len(self._operations))
            },
        )
        return make_network(self._operations, self._inputs, self._outputs, facts)

    @cached_property
    def _tensors(self) -> dict[str, Any]:
        return {**self._program.constants, **self._program.state_dict}

    def _tensor_name(self, node: Node) -> str:
        return str(self._specs[node.name].target or node.name)

    @cached_property
    def _carried(self) -> dict[Node, int]:
        """The number of the first operation that reads each parameter, buffer or constant; 0 if there is none."""
        numbers = {node: number for number, node in enumerate(self._operations)}
        return {n: min((numbers[user] for user in n.users if user in numbers), default=0) for n in self._lifted}

    @cached_property
    def _numbers(self) -> dict[Node, int]:
        return {node: number for number, node in enumerate(self._operations)}

    @cached_property
    def _named(self) -> dict[str, Node]:
        return {node.name: node for node in self._program.graph.nodes}

    def _ends(self, *kinds: OutputKind) -> list[OutputSpec]:
        return [spec for spec in self._program.graph_signature.output_specs if spec.kind in kinds]

    @cached_property
    def _outputs(self) -> list[Node]:
        ends = self._ends(OutputKind.USER_OUTPUT)
        return [self._named[spec.arg.name] for spec in ends if not isinstance(spec.arg, ConstantArgument)]

    def _size(self, node: Node) -> int:
        return sum(self._leaf_bytes(leaf) for leaf in pytree.tree_leaves(node.meta.get("val")))

    def _leaf_bytes(self, value: Any) -> int:
        if not isinstance(value, Tensor):
            return _NUMBER if isinstance(value, SymInt) else 0
        try:
            return math.prod(map(self._number, value.shape)) * value.element_size()
        except InputError:  # a size that depends on data
            return 0

    def _together(self) -> list[set[int] | frozenset[int]]:
        """Return the operations that share what they change: memory, buffers, tokens, sizes that depend on data."""
        numbers = {node: number for number, node in enumerate(self._operations)}
        memory = {
            n: memory_key(self._tensors[name]) for n in self._lifted if (name := self._tensor_name(n)) in self._tensors
        }
        groups: list[set[int] | frozenset[int]] = list(
            kept_together(self._operations, memory, writes=operator_writes, aliases=operator_aliases)
        )
        for spec in self._program.graph_signature.output_specs:
            if spec.kind is OutputKind.USER_OUTPUT:
                continue
            changed = [n for n in (*self._inputs, *self._lifted) if self._is_changed(n, spec)]
            # The write of an exported program is an output, after all reads. In stages a read in a later one would see
            # the new numbers: so whoever reads the old ones stays with what computes the new ones.
            readers = {numbers[user] for n in changed for user in n.users if user in numbers}
            groups.append(readers | {numbers[n] for n in [self._named[spec.arg.name]] if n in numbers})
        return [*groups, *self._unbacked(numbers).values(), *checks(self._operations)]

    def _is_changed(self, node: Node, spec: OutputSpec) -> bool:
        """Whether a placeholder stands for the memory that an output writes to; all tokens are one thing."""
        own = self._specs[node.name]
        if spec.kind in (OutputKind.USER_INPUT_MUTATION, OutputKind.TOKEN):
            return node.name == spec.target or (own.kind is InputKind.TOKEN and spec.kind is OutputKind.TOKEN)
        mine, other = self._tensors.get(str(own.target)), self._tensors.get(str(spec.target))
        return own.target == spec.target or (
            mine is not None and other is not None and memory_key(mine) == memory_key(other)
        )

    def _unbacked(self, numbers: Mapping[Node, int]) -> dict[str, set[int]]:
        """Return the operations that work with each size that depends on data; such a size is not sent."""
        groups: dict[str, set[int]] = {}
        for node in self._operations:
            for other in (node, *node.all_input_nodes):
                for symbol in symbols_in(other.meta.get("val")):
                    # torch names sizes that follow from input shapes s0, s1, ... and those that only a run
                    # tells, as of nonzero(), u0, ...
                    if symbol.startswith("u"):
                        groups.setdefault(symbol, set()).add(numbers[node])
        return groups

    def cut(self, stage_of: Sequence[int]) -> Pieces:
        """Return the stages, given the number of the stage of each operation.

        Raises:
            InputError: these are no stages of this program.
        """
        network, nodes = self._made
        check_stages(network, stage_of)
        changes = self._changes(stage_of)
        targets = {number: [n for n in self._inputs if n.name in _targets(row)] for number, row in changes.items()}
        touched = {node for row in targets.values() for node in row}
        idle = [at for at in network.inputs if at not in network.readers and nodes[at] not in touched]
        plain = borders(network, stage_of, idle)
        stages = []
        for number, border in enumerate(plain):
            # A stage that writes to an input takes it, whether one of its operations reads it or not.
            inputs = dict.fromkeys([*targets.get(number, []), *(nodes[v] for v in border.inputs)])
            operations = [n for n, at in zip(self._operations, stage_of, strict=True) if at == number]
            lifted = [n for n in self._lifted if self._is_in(n, number, stage_of, changes)]
            stages.append(Stage(self._program, operations, lifted, sorted(inputs, key=nodes.index)))
        sent = {node for stage in stages for node in stage.inputs}
        examples = self._examples(sent)
        made = []
        for number, (stage, border) in enumerate(zip(stages, plain, strict=True)):
            given = [nodes[v] for v in border.outputs if nodes[v] in sent or nodes[v] in self._outputs]
            given = given or stage.something()
            program = stage.build(given, changes.get(number, []), examples)
            made.append(Piece(program, tuple(n.name for n in stage.inputs), tuple(n.name for n in given)))
        taken, returned = (tuple(n.name for n in row) for row in (self._inputs, self._outputs))
        return Pieces(tuple(made), taken, returned, self._whole(stage_of).to_json())

    def _changes(self, stage_of: Sequence[int]) -> dict[int, list[OutputSpec]]:
        """Return what each stage writes to, besides giving outputs."""
        stages = dict(zip(self._operations, stage_of, strict=True))
        found: dict[int, list[OutputSpec]] = {}
        for spec in self._program.graph_signature.output_specs:
            if spec.kind is not OutputKind.USER_OUTPUT:
                found.setdefault(stages.get(self._named[spec.arg.name], 0), []).append(spec)
        return found

    def _is_in(
        self, node: Node, stage: int, stage_of: Sequence[int], changes: Mapping[int, Sequence[OutputSpec]]
    ) -> bool:
        """Whether a stage has a parameter, buffer or constant: it reads it, or changes it, or nobody does."""
        stages = {stage_of[self._numbers[user]] for user in node.users if user in self._numbers}
        name = str(self._specs[node.name].target)
        stages |= {number for number, row in changes.items() if name in _targets(row)}
        if node in self._outputs or not stages:
            stages.add(stage_of[self._carried[node]])
        return stage in stages

    def _examples(self, wanted: set[Node]) -> dict[Node, Any]:
        """Return the values of nodes in a run on the program's own example inputs; none if it has no such inputs."""
        if self._program.example_inputs is None:
            return {}
        args, kwargs = self._program.example_inputs
        run = _Recorder(self._program.graph_module, wanted)
        values = bind_program(self._program, read_program(self._program), (tuple(args), dict(kwargs)))
        # The run must not change the program: a buffer or an input that an operation writes to is given as a copy.
        own = [v if n in self._inputs and n not in self._changed_inputs else _copy(v) for n, v in values.items()]
        with torch.no_grad(), kept_random(self._program.graph_module):
            run.run(*own)
        return run.found

    @cached_property
    def _changed_inputs(self) -> set[Node]:
        return {other for node in self._operations for other in operator_writes(node)}

    def _whole(self, stage_of: Sequence[int]) -> Whole:
        program, numbers = self._program, {node: at for at, node in enumerate(self._operations)}
        rest = [node for node in program.graph.nodes if node.op == "get_attr"]
        ties: dict[Any, list[str]] = {}
        for name, tensor in program.state_dict.items():
            ties.setdefault(memory_key(tensor), []).append(name)
        return Whole(
            program.graph_signature,
            program.module_call_graph,
            [(node.name, stage) for node, stage in zip(self._operations, stage_of, strict=True)],
            # Where an attribute stood: before the operation with this number, the first after it in the graph.
            [(node.name, min(numbers[n] for n in _after(node) if n in numbers)) for node in rest],
            list(program.state_dict),
            list(program.constants),
            [names for names in ties.values() if len(names) > 1],
            list(program._guards_code),
            program.graph_module.meta.get("surgery"),
        )


class _Recorder(Interpreter):
    """Keeps the values of some nodes."""

    def __init__(self, module: GraphModule, wanted: set[Node]) -> None:
        super().__init__(module)
        self.wanted = wanted
        self.found: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.found[n] = value.detach() if isinstance(value, Tensor) else value
        return value


def _targets(changes: Sequence[OutputSpec]) -> set[str]:
    return {str(spec.target) for spec in changes}


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _after(node: Node) -> Iterator[Node]:
    while node.op != "output":
        node = node.next
        yield node


def _bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size() if isinstance(tensor, Tensor) else 0
