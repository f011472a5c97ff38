"""Check the graphs of an ONNX model: each name is given once, before it is read, and functions end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeAlias

import onnx

from surgery.errors import FileError
from surgery.files.guard.onnx_nodes import nodes_of
from surgery.system.opening import shown_name

__all__ = ["check_graphs"]

_AGAIN = "export the model again"
_MOST_NODES = 10**6  # with the nodes of functions in the place of their calls
_Name: TypeAlias = tuple[str, str, str]  # of an operator: its domain, its name there, and which of these it is
_Scopes: TypeAlias = tuple[set[str], ...]  # the names of values in the graphs around one


def check_graphs(model: onnx.ModelProto) -> None:
    """Raise FileError if a graph, a body or a function of a model cannot be right."""
    _check_graph(model.graph, ())
    functions: dict[_Name, onnx.FunctionProto] = {}
    for function in model.functions:
        name = (function.domain, function.name, function.overload)
        if name in functions:
            raise FileError(f"has two functions {shown_name(function.name)}", next_step=_AGAIN)
        functions[name] = function
        known = set(function.input)
        if len(known) < len(function.input):
            raise FileError(f"has a function {shown_name(function.name)} with two inputs of a name", next_step=_AGAIN)
        _check_nodes(function.node, known, ())
        if lost := [output for output in function.output if output not in known]:
            raise FileError(f"gives {shown_name(lost[0])}, which nothing computes", next_step=_AGAIN)
    _check_calls(model, functions)


def _check_graph(graph: onnx.GraphProto, outside: _Scopes) -> None:
    """Raise FileError if a node reads a value that nothing before it gives, or a name is given twice.

    ``outside`` are the values of the graphs around this one, which its nodes may read.
    """
    weights = [*(tensor.name for tensor in graph.initializer), *(t.values.name for t in graph.sparse_initializer)]
    inputs = [value.name for value in graph.input]
    for names, what in ((weights, "weight"), (inputs, "input")):
        if not all(names):
            raise FileError(f"has {'an' if what == 'input' else 'a'} {what} without a name", next_step=_AGAIN)
        if len(set(names)) < len(names):
            (twice, _), *_ = Counter(names).most_common(1)
            raise FileError(f"has two {what}s named {shown_name(twice)}", next_step=_AGAIN)
    known = {*weights, *inputs}
    _check_nodes(graph.node, known, outside)
    for output in graph.output:
        if not _is_known(output.name, (known, *outside)):
            raise FileError(f"gives {shown_name(output.name)}, which nothing computes", next_step=_AGAIN)


def _check_nodes(nodes: Iterable[onnx.NodeProto], known: set[str], outside: _Scopes) -> None:
    """Check nodes in order; what they give is added to ``known``."""
    for node in nodes:
        for name in node.input:
            if name and not _is_known(name, (known, *outside)):
                what = f"has a {shown_name(node.op_type)} that reads {shown_name(name)}, which nothing before it gives"
                raise FileError(what, next_step=_AGAIN)
        for graph in _bodies(node):
            _check_graph(graph, (known, *outside))
        for name in node.output:
            if name and name in known:
                raise FileError(f"computes {shown_name(name)} twice", next_step=_AGAIN)
            known.add(name)


def _is_known(name: str, scopes: _Scopes) -> bool:
    return any(name in scope for scope in scopes)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        yield from attribute.graphs
        if attribute.HasField("g"):
            yield attribute.g


def _check_calls(model: onnx.ModelProto, functions: Mapping[_Name, onnx.FunctionProto]) -> None:
    """Raise FileError if a function calls itself, or if calls of calls add up to too many nodes."""
    # ``sizes`` has each function with all that it calls, counted once; ``open_`` are those that are being counted, so
    # that meeting one of them again is a circle. Example: of 40 functions each calls the next twice, a small file with
    # 2^40 nodes, which is found in 40 steps.
    sizes: dict[_Name, int] = {}
    open_: list[_Name] = []

    def size(nodes: Iterable[onnx.NodeProto]) -> int:
        return sum(of((node.domain, node.op_type, node.overload)) for node in nodes_of(nodes))

    def of(name: _Name) -> int:
        if name not in functions:
            return 1
        if name in open_ or len(open_) > 99:
            raise FileError(f"has a function {shown_name(name[1])} that calls itself", next_step=_AGAIN)
        if name not in sizes:
            open_.append(name)
            sizes[name] = size(functions[name].node)
            open_.pop()
        return sizes[name]

    if functions and (found := size(model.graph.node)) > _MOST_NODES:
        raise FileError(f"has {found} nodes with its functions", allowed=f"{_MOST_NODES}", next_step=_AGAIN)
