"""The kind of GraphModules, and how a graph is called: what its placeholders say of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from surgery.kinds.base import Access, Kind, Pieces
from surgery.kinds.fx.graph_module import OpenGraphModule
from surgery.kinds.fx.run import bind_graph
from surgery.kinds.fx.stages import CutGraph, Origin, graph_result, origin_of, run_stage, take_numbers
from surgery.kinds.inputs import Declared, Inputs, Signature, example_forms, forward_signature, input_like

__all__ = [
    "GraphModuleKind",
    "brought_inputs",
    "declare",
    "declared_inputs",
    "first_size",
    "fixed_batch",
    "flattens",
    "read_signature",
]


def flattens(model: GraphModule) -> bool:
    """Whether a graph was exported with a tree of inputs, so that its placeholders are the leaves."""
    return hasattr(model.graph._codegen, "pytree_info")


def read_signature(model: GraphModule, example: Inputs) -> Signature:
    """Return how a graph is called."""
    found = forward_signature(model, example)
    if not flattens(model):
        return found
    inner = model.graph._codegen.pytree_info.in_spec.child(0)  # type: ignore[attr-defined]
    return Signature(found.names, found.taken, found.required, positional=inner.num_children)


def brought_inputs(model: GraphModule, *, seed: int) -> Inputs | None:
    """Return random inputs of the shapes of a graph's placeholders; None if a placeholder has no shape."""
    nodes = list(model.graph.find_nodes(op="placeholder"))
    values = [node.meta.get("val", node.meta.get("tensor_meta")) for node in nodes]
    if not nodes or not all(hasattr(value, "shape") for value in values):
        return None
    rows = enumerate(zip(nodes, values, strict=True))
    return tuple(input_like(value, node.name, seed + i) for i, (node, value) in rows), {}


def fixed_batch(model: GraphModule) -> int | None:
    """Return the only batch size that a graph accepts, or None if it accepts any."""
    return first_size(model.graph.find_nodes(op="placeholder")) if flattens(model) else None


def first_size(placeholders: Iterable[Node]) -> int | None:
    """Return the size of axis 0 of the first tensor among placeholders; None if that size is symbolic."""
    for node in placeholders:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim():
            size = value.shape[0]
            return size if isinstance(size, int) else None
    return None


def declared_inputs(model: GraphModule, example: Inputs, signature: Signature) -> dict[str, Declared]:
    """Return dtype, sizes and limits of the inputs that are tensors, by name: from the graph, or else the examples."""
    found = example_forms(model, example, signature)
    nodes = list(model.graph.find_nodes(op="placeholder"))
    return found | declare(signature.names, nodes, _no_limit)


def _no_limit(size: Any) -> int | None:
    return None


def declare(names: Sequence[str], nodes: Sequence[Node], limit: Callable[[Any], int | None]) -> dict[str, Declared]:
    """Return what placeholders say about inputs, by name; ``limit`` gives the largest value of a dynamic size."""
    if len(names) != len(nodes):
        return {}
    pairs = zip(names, nodes, strict=True)
    return {name: _declared(node, limit) for name, node in pairs if isinstance(node.meta.get("val"), Tensor)}


def _declared(node: Node, limit: Callable[[Any], int | None]) -> Declared:
    value = node.meta["val"]
    sizes = tuple(size if isinstance(size, int) else None for size in value.shape)
    shape = tuple(size if isinstance(size, int) else str(size) for size in value.shape)
    embedded = [user for user in node.users if "embedding" in str(user.target) and user.args[1:2] == (node,)]
    weights = [user.args[0].meta.get("val") for user in embedded if isinstance(user.args[0], Node)]
    ids = next((len(w) for w in weights if isinstance(w, Tensor)), None)
    second = value.shape[1] if len(shape) > 1 else None
    return Declared(value.dtype, sizes, shape, ids, second if isinstance(second, int | None) else limit(second))


class GraphModuleKind(Kind):
    """torch.fx.GraphModules: their nodes are rewritten."""

    name = "fx"
    models = GraphModule
    label = "torch.fx.GraphModule"

    def open(self, model: GraphModule, inputs: Inputs, access: Access) -> OpenGraphModule:
        """Open a graph."""
        return OpenGraphModule(model, *inputs, access)

    def brought_inputs(self, model: GraphModule, *, seed: int = 0) -> Inputs | None:
        """Return random inputs of the shapes that the placeholders have; None if they have none."""
        return brought_inputs(model, seed=seed)

    def signature(self, model: GraphModule, example: Inputs) -> Signature:
        """Return how a graph is called."""
        return read_signature(model, example)

    def declared_inputs(self, model: GraphModule, example: Inputs, signature: Signature) -> dict[str, Declared]:
        """Return what the graph says about its inputs, or else what the example inputs say."""
        return declared_inputs(model, example, signature)

    def fixed_batch(self, model: GraphModule) -> int | None:
        """Return the only batch size that a graph accepts, or None."""
        return fixed_batch(model)

    def refuse_structure(self) -> str | None:
        """Refuse, since the chains of a graph are nodes and not layers."""
        return "a graph"

    def cuttable(self, model: GraphModule, inputs: Inputs) -> CutGraph:
        """Open a graph to be cut into stages."""

        def bind(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
            return list(bind_graph(model.graph, (args, kwargs)).values())

        return CutGraph(Origin(model, model, bind), bind(*inputs))

    def join(self, pieces: Pieces) -> GraphModule:
        """Return the graph of which the pieces are the stages."""
        origin = origin_of(pieces)
        take_numbers(origin, pieces)
        assert isinstance(origin.model, GraphModule)  # as ``cuttable`` has it
        return origin.model

    def leaves(self, pieces: Pieces, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Return the inputs of a call of the whole, in the order of its graph."""
        return list(origin_of(pieces).bind(args, kwargs))

    def run_stage(self, model: GraphModule, values: Sequence[Any]) -> tuple[Any, ...]:
        """Run a stage on its inputs, in order."""
        return run_stage(model, values)

    def result(self, pieces: Pieces, leaves: Sequence[Any]) -> Any:
        """Return what the whole returns, made of its outputs."""
        return graph_result(origin_of(pieces), leaves)
