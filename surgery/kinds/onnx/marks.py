"""What the nodes of a chain's reshapes say in their metadata, so that they are read back as steps of a chain.

Reshape {surgery: flatten -2 -1}                                                      one node is the step
Unsqueeze {surgery: first of two}, Reshape {surgery: last of two: unflatten -3 4 2}   two nodes are
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from surgery.algebra import Flatten, Transpose, Unflatten
from surgery.kinds.onnx.weights import is_plain

__all__ = ["FIRST", "MARK", "SHIFT", "SIZED", "link_of", "words_of"]

MARK = "surgery"  # the key in the metadata of a node
SHIFT = "shift"  # an Add that belongs to a chain
SIZED = ("Reshape", "Unsqueeze", "Squeeze")  # the operators of reshapes that read their sizes or axes
FIRST = "first of two"
_LAST = "last of two: "
# the operators of the nodes that may be a step
_ONE = ("Reshape",)
_TWO = {"unflatten": ("Unsqueeze", "Reshape"), "flatten": ("Reshape", "Squeeze")}


def words_of(step: Unflatten | Flatten, *, two: bool = False) -> str:
    """Return what a node says that is a step, or the last of ``two`` that are.

    >>> words_of(Unflatten(-3, (4, 2)), two=True)
    'last of two: unflatten -3 4 2'
    """
    if isinstance(step, Unflatten):
        words: Sequence[object] = ("unflatten", step.dim, *step.sizes)
    else:
        words = ("flatten", step.start, step.end)
    return (_LAST if two else "") + " ".join(map(str, words))


def link_of(node: ir.Node) -> tuple[Unflatten | Flatten | Transpose, tuple[ir.Node, ...]] | None:
    """Return the reshape or transpose whose last node this is, with all of its nodes; None for any other node."""
    if node.op_type == "Transpose":
        step = _transpose(node)
        return None if step is None else (step, (node,))
    said = node.metadata_props.get(MARK, "")
    two = said.startswith(_LAST)
    words = said.removeprefix(_LAST).split()
    read = _read(words)
    if read is None:
        return None
    nodes = (node,) if not two else _with_first(node)
    wanted = _TWO[words[0]] if two else _ONE
    return (read, nodes) if tuple(each.op_type for each in nodes) == wanted else None


def _transpose(node: ir.Node) -> Transpose | None:
    order = list(node.attributes["perm"].value) if "perm" in node.attributes else []
    # Example of the order 0 2 1: places 1 and 2 have moved, and have changed places: the step is Transpose(-2, -1).
    moved = [at for at, axis in enumerate(order) if at != axis]
    if len(moved) != 2 or order[moved[0]] != moved[1]:
        return None
    return Transpose(moved[0] - len(order), moved[1] - len(order))


def _read(words: Sequence[str]) -> Unflatten | Flatten | None:
    try:
        numbers = tuple(map(int, words[1:]))
    except ValueError:  # a file may say anything
        return None
    if len(words) > 1 and words[0] == "unflatten":
        return Unflatten(numbers[0], numbers[1:])
    return Flatten(*numbers) if len(words) == 3 and words[0] == "flatten" else None


def _with_first(node: ir.Node) -> tuple[ir.Node, ...]:
    """Return a node with the one before it, if that is its first and nothing else reads what it gives."""
    value = node.inputs[0]
    first = None if value is None else value.producer()
    if value is None or first is None or first.graph is not node.graph or not is_plain(first):
        return (node,)
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return (first, node) if alone and first.metadata_props.get(MARK) == FIRST else (node,)
