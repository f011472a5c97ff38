"""Copy the parts of an exported program for a new one: its graph, the names in its signatures, and its state."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.export import ModuleCallEntry
from torch.export.graph_signature import ConstantArgument
from torch.fx import Graph

from surgery.kinds.layers.tensors import key_of

__all__ = ["copy_graph", "final_names", "own_state", "rename_entry"]


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
