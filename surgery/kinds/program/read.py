"""Read an exported program: the signature tells its parameters, and the inputs tell its symbolic sizes.

Copy the parts of an exported program for a new one: its graph, the names in its signatures, and its state.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, ModuleCallEntry
from torch.export.graph_signature import ConstantArgument, ExportGraphSignature, InputKind
from torch.fx import Graph, Node

from surgery.algebra import Shape
from surgery.errors import InputError
from surgery.kinds.fx.read import Reader
from surgery.kinds.layers.tensors import key_of

__all__ = [
    "copy_graph",
    "final_names",
    "input_arguments",
    "memory_key",
    "own_state",
    "program_shapes",
    "program_sizes",
    "read_program",
    "rename_entry",
]


def memory_key(value: Any) -> Any:
    """Return a key that parameters, buffers and constants share exactly if they are one."""
    return key_of(value) if isinstance(value, Tensor) else id(value)


def copy_graph(graph: Graph) -> Graph:
    """Copy a graph and keep the names of its nodes, to which the signature refers; fx would rename a node ``input``."""
    copied = copy.deepcopy(graph)
    for old, new in zip(graph.nodes, copied.nodes, strict=True):
        new.name = old.name
    return copied


def final_names(renamed: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the final name for each replaced node; a replacement may have been replaced as well.

    >>> final_names([("a", "b"), ("b", "c")])
    {'b': 'c', 'a': 'c'}
    """
    names: dict[str, str] = {}
    for before, after in reversed(renamed):
        names[before] = names.get(after, after)
    return names


def rename_entry(entry: ModuleCallEntry, names: dict[str, str]) -> ModuleCallEntry:
    """Copy the entry of a module call, with new names for the nodes that its signature refers to."""
    if entry.signature is None:
        return entry
    inputs, outputs = copy.deepcopy((entry.signature.inputs, entry.signature.outputs))
    for argument in (*inputs, *outputs):
        if not isinstance(argument, ConstantArgument):
            argument.name = names.get(argument.name, argument.name)
    return replace(entry, signature=replace(entry.signature, inputs=inputs, outputs=outputs))


def own_state(state: dict[str, Tensor], old: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors that the new state shares with the old one; each is copied once, so tied weights stay tied."""
    copies: dict[tuple[Any, ...], Tensor] = {}
    others = {key_of(tensor) for tensor in old.values()}
    for name, tensor in state.items():
        key = key_of(tensor)
        if key not in copies:
            # new factors belong to the new program alone; only shared tensors are copied
            mine = tensor.detach().clone() if key in others else tensor
            trains = isinstance(tensor, nn.Parameter)
            copies[key] = nn.Parameter(mine, requires_grad=tensor.requires_grad) if trains else mine
        state[name] = copies[key]
    return state


def read_program(program: ExportedProgram, graph: Graph | None = None) -> Reader:
    """Return the reader of a program, or of ``graph``, a copy of its graph; the signature tells the parameters."""
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
    return Reader(graph, parameters, providers, frozenset(buffers))


def input_arguments(signature: ExportGraphSignature) -> list[Any]:
    """Return what a signature says of each input, by name; ``user_inputs`` of torch does not name constants."""
    return [spec.arg for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT]


def program_shapes(
    program: ExportedProgram, inputs: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> Callable[[Node], Shape]:
    """Return a function from nodes to concrete shapes; see ``program_sizes``."""
    size = program_sizes(program, inputs)
    return lambda node: tuple(map(size, node.meta["val"].shape))


def program_sizes(
    program: ExportedProgram, inputs: tuple[tuple[Any, ...], dict[str, Any]] | None
) -> Callable[[Any], int]:
    """Return a function from sizes, which may be symbolic, to numbers.

    Symbolic sizes have the values that follow from the inputs, or those at the export if there are no inputs.

    Raises:
        InputError: an input has a size that the program does not accept, or there are too many or too few inputs. The
            function itself raises it for a size that the inputs do not determine.
    """
    values = {} if inputs is None else _solve_symbols(program, inputs)

    def size(dim: Any) -> int:
        if isinstance(dim, int):
            return dim
        # without inputs, the hint is the size at the export
        known = dim.node.expr.subs(values) if values else dim.node.hint
        if known is None or not getattr(known, "is_number", True):
            raise InputError(f"the program does not say how large {dim} is", next_step="give example_inputs")
        return int(known)

    return size


def _solve_symbols(program: ExportedProgram, inputs: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[Any, int]:
    """Return the values of symbolic sizes that follow from the sizes of the inputs."""
    names = [arg.name for arg in input_arguments(program.graph_signature)]
    wanted = [node for node in program.graph.find_nodes(op="placeholder") if node.name in names]
    given = torch.utils._pytree.tree_leaves(inputs)
    if len(given) != len(wanted):  # what is None may be left out
        given = [leaf for leaf in given if leaf is not None]
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
    # a plain symbol takes the size of the first input that has it; an expression such as 2*s0 has to agree with it
    if expression.is_Symbol:
        return values.setdefault(expression, size) == size
    # Example of 2*s0 with s0 = 4: size 8 fits, 6 does not. With s0 not yet known nothing can be said, and it passes.
    return not expression.subs(values).is_number or int(expression.subs(values)) == size
