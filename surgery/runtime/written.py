"""Models as the .onnx files that a backend times, with the inputs that they run on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from onnxruntime import InferenceSession
from torch.export import ExportedProgram
from torch.fx import Graph, GraphModule, Node

from surgery.cost.base import ModelFile
from surgery.kinds.inputs import Inputs
from surgery.kinds.onnx.layout import move_weights, write_apart
from surgery.kinds.onnx.run import refuse_empty_batches
from surgery.kinds.onnx.session import feed, open_session
from surgery.kinds.registry import Model, kind_of
from surgery.runtime.export import capture, export_onnx, to_onnx, write_draft

__all__ = ["Written", "write_model", "write_with_origins"]

_FX_NODE = "pkg.torch.onnx.fx_node"  # in the metadata of a node: the text of the fx node that it was made of
_NOTE = "surgery.name"  # in the notes of a node of a GraphModule that is exported


@dataclass(frozen=True)
class Written:
    """A model as its user has it: a file with its inputs, and the sizes that the file declares for each input."""

    file: ModelFile
    shapes: tuple[tuple[int | str | None, ...], ...]


def write_model(model: Model, inputs: Inputs, path: Path, name: str, *, move: bool = False) -> Written:
    """Write a model as an .onnx file, checked as ``export_onnx`` does; ``name`` is what errors call it.

    An ONNX model has its large weights in another file beside it, which a session maps. With ``move`` it then has them
    there alone, and no longer in memory.

    Raises:
        CaptureError, CheckError: the model cannot be exported.
        InputError: the inputs do not fit it.
    """
    if (onnx := kind_of(model).as_onnx(model)) is not None:
        refuse_empty_batches(onnx, inputs)
        layout = write_apart(onnx, path)
        if move:
            move_weights(onnx, path, layout)
        return _fed(open_session(path, small=True), inputs, path, name)
    program, _ = capture(model, inputs)
    export_onnx(program, path, inputs)
    return _fed(open_session(path, small=True), inputs, path, name, program)


def write_with_origins(model: Model, inputs: Inputs, path: Path, name: str) -> tuple[Written, Mapping[str, str]]:
    """Write a model as an .onnx file, unchecked, and say of its values which node of the model's graph they come from.

    An ONNX model keeps its names, and there is nothing to say of them; a module that is no GraphModule has no graph.
    Raises as ``write_model`` does.
    """
    if kind_of(model).as_onnx(model) is not None:
        return write_model(model, inputs, path, name), {}
    with _remembered(model):
        program, _ = capture(model, inputs)
    exported = to_onnx(program)
    write_draft(exported, path)
    origins = _origins(program, exported)
    if isinstance(model, GraphModule):
        own = _sources(program.graph, {node.name for node in model.graph.nodes})
        origins = {value: own[node] for value, node in origins.items() if node in own}
    return _fed(open_session(path, small=True), inputs, path, name, program), origins


@contextmanager
def _remembered(model: Model) -> Iterator[None]:
    """Let torch.export note of what it captures which node of a GraphModule it came from: only if a node has notes."""
    bare = [node for node in model.graph.nodes if not node.meta] if isinstance(model, GraphModule) else []
    try:
        for node in bare:
            node.meta[_NOTE] = node.name
        yield
    finally:
        for node in bare:
            node.meta.pop(_NOTE, None)


def _fed(
    session: InferenceSession, inputs: Inputs, path: Path, name: str, program: ExportedProgram | None = None
) -> Written:
    """Return the file at a path, whose model the session has, with its inputs."""
    feeds = feed(session, inputs, program)
    return Written(ModelFile(name, path, feeds), tuple(tuple(d.shape) for d in session.get_inputs()))


def _origins(program: ExportedProgram, exported: torch.onnx.ONNXProgram) -> dict[str, str]:
    """Return for each value of an exported model the name of the program's node that it was made of, where known.

    torch decomposes a program before it writes it, and gives the nodes new names: "view_7" may have been "reshape".
    """
    assert exported.exported_program is not None  # made of a program
    made = _sources(exported.exported_program.graph, {node.name for node in program.graph.nodes})
    found = {}
    for node in exported.model.graph:
        text = node.metadata_props.get(_FX_NODE, "").partition(" ")[0].removeprefix("%")
        for value in node.outputs:
            source = made.get(value.name or "") or made.get(text)
            if source is not None and value.name:
                found[value.name] = source
    return found


def _sources(graph: Graph, known: set[str]) -> dict[str, str]:
    """Return of which node of an earlier graph each node was made, by name, where that is known."""
    return {node.name: source for node in graph.nodes if (source := _source(node, known)) is not None}


def _source(node: Node, known: set[str]) -> str | None:
    """Return the node of an earlier graph that a node came from: the latest one of a known name."""
    origin = next(iter(node.meta.get("from_node", ())), None)
    while origin is not None and origin.name not in known:
        origin = next(iter(origin.from_node), None)
    return None if origin is None else str(origin.name)
