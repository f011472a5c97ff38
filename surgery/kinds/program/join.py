"""Put the stages of a program together again: the graph, the signature and the state that it had, by names.

The stages may come from files, so nothing is taken for granted. Each file has symbols and fake values of its own; those
of all stages become those of the first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.kinds.base import Pieces
from surgery.kinds.fx.cut import copy_node, is_operation
from surgery.kinds.program.whole import Whole

__all__ = ["join_program"]

_NEXT = "join the stages that were written together"


def join_program(pieces: Pieces, programs: Sequence[ExportedProgram]) -> ExportedProgram:
    """Return the program of which the pieces, with these models, are the stages, with the numbers that they have now.

    Raises:
        InputError: the pieces do not fit each other.
    """
    whole = Whole.from_json(pieces.whole)
    graph = _Joining(whole, programs).graph()
    first = programs[0]
    root = nn.Module()
    for program in programs:
        for node in program.graph.find_nodes(op="get_attr"):
            setattr(root, str(node.target), getattr(program.graph_module, str(node.target)))
    state = _gather([program.state_dict for program in programs], whole.state, "parameter or buffer")
    _tie(state, whole.ties)
    made = _build(
        root=root,
        graph=graph,
        graph_signature=whole.signature,
        state_dict=state,
        range_constraints={s: bounds for program in programs for s, bounds in program.range_constraints.items()},
        module_call_graph=whole.calls,
        example_inputs=_examples(whole, pieces),
        constants=_gather([program.constants for program in programs], whole.constants, "constant"),
        verifiers=first.verifiers,
    )
    made.graph_module.meta.update(first.graph_module.meta)
    if whole.kept is not None:
        made.graph_module.meta["surgery"] = whole.kept
    made._guards_code = list(whole.guards)
    return made


def _build(**parts: Any) -> ExportedProgram:
    try:
        return ExportedProgram(**parts)
    except Exception as error:  # torch's own checks of a program
        raise InputError(f"the stages do not make a valid program: {error}", next_step=_NEXT) from error


class _Joining:
    """The graph of the whole program, made node by node out of the stages'."""

    def __init__(self, whole: Whole, programs: Sequence[ExportedProgram]) -> None:
        self._whole = whole
        self._stages = [{node.name: node for node in program.graph.nodes} for program in programs]
        self._graph = Graph()
        self._made: dict[str, Node] = {}
        self._values = _Values(programs)

    def graph(self) -> Graph:
        """Return the graph."""
        whole = self._whole
        for spec in whole.signature.input_specs:
            self._copy(self._find(spec.arg.name, "placeholder"))
        # Invariant: before operation n, all attributes that stood before it are there, and ``_of`` finds each value
        # that it reads, or says that the order is wrong. So the graph is in an order in which it can run.
        rest = sorted(whole.attributes, key=lambda row: row[1])
        for number, (name, stage) in enumerate(whole.operations):
            while rest and rest[0][1] <= number:
                self._copy(self._find(rest.pop(0)[0], "get_attr"))
            node = self._stages[stage].get(name) if stage < len(self._stages) else None
            if node is None or not is_operation(node):
                raise InputError(f"stage {stage} has no operation {name}", next_step=_NEXT)
            self._copy(node)
        self._graph.output(tuple(map(self._output, whole.signature.output_specs)))
        self._check()
        return self._graph

    def _output(self, spec: Any) -> Any:
        return spec.arg.value if isinstance(spec.arg, ConstantArgument) else self._of(spec.arg.name)

    def _check(self) -> None:
        """Check that no operation of a stage is left over; a size may stand in several stages."""
        for stage, nodes in enumerate(self._stages):
            for name, node in nodes.items():
                if is_operation(node) and name not in self._made:
                    raise InputError(f"stage {stage} has an operation {name}, which the whole has not", next_step=_NEXT)

    def _find(self, name: str, op: str) -> Node:
        for nodes in self._stages:
            if name in nodes and nodes[name].op == op:
                return nodes[name]
        raise InputError(f"no stage has {name}", next_step=_NEXT)

    def _of(self, name: str) -> Node:
        if name not in self._made:
            raise InputError(f"{name} is read before it is given", next_step=_NEXT)
        return self._made[name]

    def _copy(self, node: Node) -> None:
        if node.name in self._made:
            raise InputError(f"{node.name} is given twice", next_step=_NEXT)
        made = copy_node(self._graph, node, lambda other: self._of(other.name))
        if "val" in made.meta:
            made.meta["val"] = self._values.here(made.meta["val"])
        self._made[node.name] = made


class _Values:
    """Brings the fake values of all stages into one fake mode, with one set of symbols."""

    def __init__(self, programs: Sequence[ExportedProgram]) -> None:
        values = (node.meta.get("val") for program in programs for node in program.graph.nodes)
        leaves = (leaf for value in values for leaf in pytree.tree_leaves(value))
        self._mode = next((leaf.fake_mode for leaf in leaves if isinstance(leaf, FakeTensor)), FakeTensorMode())

    def here(self, value: Any) -> Any:
        """Return the same value in the one mode."""
        return pytree.tree_map(self._leaf, value)

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, FakeTensor):
            return value if value.fake_mode is self._mode else self._tensor(value)
        return self._size(value) if isinstance(value, SymInt) else value

    def _tensor(self, value: FakeTensor) -> Tensor:
        sizes, strides = tuple(map(self._size, value.shape)), tuple(map(self._size, value.stride()))
        with self._mode:
            made = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        made = made.requires_grad_(value.requires_grad) if value.dtype.is_floating_point else made
        return nn.Parameter(made, requires_grad=value.requires_grad) if isinstance(value, nn.Parameter) else made

    def _size(self, size: Any) -> Any:
        env = self._mode.shape_env
        if not isinstance(size, SymInt) or env is None or size.node.shape_env is env:
            return size
        other = size.node.shape_env
        # Symbols of two files are one if they have one name: all stages were cut from a program that had it once.
        for symbol in size.node.expr.free_symbols:
            if symbol in other.backed_var_to_val and symbol not in env.backed_var_to_val:
                env.add_backed_var_to_val(symbol, int(other.backed_var_to_val[symbol]))
            if symbol in other.var_to_range and symbol not in env.var_to_range:
                bounds = other.var_to_range[symbol]
                env.constrain_symbol_range(symbol, compiler_min=bounds.lower, compiler_max=bounds.upper)
        return env.create_symintnode(size.node.expr, hint=size.node.hint)


def _gather(states: Sequence[Mapping[str, Any]], names: Sequence[str], what: str) -> dict[str, Any]:
    """Return the tensors of all stages by name, in the order of the whole.

    Raises:
        InputError: a name is missing or left over, or two stages have other numbers for one name.
    """
    found: dict[str, Any] = {}
    for state in states:
        for name, value in state.items():
            _check_equal(name, found.setdefault(name, value), value)
    if set(found) != set(names):
        name = min(set(found) ^ set(names))
        where = "the stages lack" if name in names else "the whole program does not have"
        raise InputError(f"{where} the {what} {name}", next_step=_NEXT)
    return {name: found[name] for name in names}


def _check_equal(name: str, first: Any, second: Any) -> None:
    if first is second or not isinstance(first, Tensor) or not isinstance(second, Tensor):
        return
    same = first.shape == second.shape and first.dtype == second.dtype and first.device == second.device
    if not same or not torch.equal(first, second):
        what = f"the stages have different numbers for {name}, which several of them read"
        raise InputError(what, allowed="equal numbers", next_step="train such tensors in one stage")


def _tie(state: dict[str, Any], ties: Sequence[Sequence[str]]) -> None:
    for first, *rest in ties:
        for name in rest:
            _check_equal(name, state[first], state[name])
            state[name] = state[first]


def _examples(whole: Whole, pieces: Pieces) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the example inputs of the whole program, if the stages have them."""
    found: dict[str, Any] = {}
    for piece in pieces.stages:
        if piece.model.example_inputs is not None:
            found |= dict(zip(piece.inputs, pytree.tree_leaves(piece.model.example_inputs), strict=False))
    names = [spec.arg.name for spec in whole.signature.input_specs if spec.kind is InputKind.USER_INPUT]
    if not names or not all(name in found for name in names):
        return None
    signature = whole.calls[0].signature
    assert signature is not None  # as it was read
    if signature.in_spec.num_leaves != len(names):
        raise InputError(f"the whole program takes {len(names)} inputs, and its form has others", next_step=_NEXT)
    args, kwargs = pytree.tree_unflatten([found[name] for name in names], signature.in_spec)
    return tuple(args), dict(kwargs)
