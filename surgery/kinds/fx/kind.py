"""The kind of torch.fx.GraphModules."""

from __future__ import annotations

from torch.fx import GraphModule

from surgery.kinds.base import Access, Kind
from surgery.kinds.fx.graph_module import OpenGraphModule
from surgery.kinds.fx.inputs import brought_inputs, declared_inputs, fixed_batch, read_signature
from surgery.kinds.inputs import Declared, Inputs, Signature

__all__ = ["GraphModuleKind"]


class GraphModuleKind(Kind):
    """torch.fx.GraphModules: nodes are rewritten."""

    name = "fx"
    models = GraphModule

    def open(self, model: GraphModule, inputs: Inputs, access: Access) -> OpenGraphModule:
        """Open a graph."""
        return OpenGraphModule(model, *inputs, access)

    def brought_inputs(self, model: GraphModule, *, seed: int = 0) -> Inputs | None:
        """Return random inputs of the shapes that a traced graph knows."""
        return brought_inputs(model, seed=seed)

    def signature(self, model: GraphModule, example: Inputs) -> Signature:
        """Return how a graph is called."""
        return read_signature(model, example)

    def declared_inputs(self, model: GraphModule, example: Inputs, signature: Signature) -> dict[str, Declared]:
        """Return what the graph says of its inputs, else the example inputs."""
        return declared_inputs(model, example, signature)

    def fixed_batch(self, model: GraphModule) -> int | None:
        """Return the only batch size that a graph takes."""
        return fixed_batch(model)

    def refuse_structure(self) -> str | None:
        """Refuse: the chains of a graph are nodes, not layers."""
        return "a graph"
