"""The kind of torch.fx.GraphModules."""

from __future__ import annotations

from torch.fx import GraphModule

from surgery.kinds.base import Access, Kind
from surgery.kinds.fx.graph_module import OpenGraphModule
from surgery.kinds.fx.inputs import brought_inputs, declared_inputs, fixed_batch, read_signature
from surgery.kinds.inputs import Declared, Inputs, Signature

__all__ = ["GraphModuleKind"]


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
