"""A toy kind of models, in one file: a dict of layers that are applied in order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from surgery.algebra import Chain, Linear
from surgery.kinds.base import Access, Kind, OpenModel
from surgery.kinds.inputs import Declared, Inputs, Signature
from surgery.kinds.observed import Norm, Observed, OutputChange, See
from surgery.sites import Call, Edit, Element, Flow, FusableModule, ModuleChain, Other, Placement, Replace, Tensors

__all__ = ["LayersKind"]


class ChainLayer(nn.Module):
    """A chain as a layer."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain

    def forward(self, x: Tensor) -> Tensor:
        return self.chain(x)


class LayersKind(Kind):
    """Dicts of layers."""

    name = "layers"
    models = dict
    label = "dict of layers"

    def open(self, model: dict[str, nn.Module], inputs: Inputs, access: Access) -> OpenLayers:
        return OpenLayers(model if access.inplace else dict(model), inputs)

    def runnable(self, model: Mapping[str, nn.Module]) -> nn.Module:
        return nn.Sequential(*model.values())

    def signature(self, model: Any, example: Inputs) -> Signature:
        return Signature(("x",), 1, frozenset({"x"}))

    def declared_inputs(self, model: Any, example: Inputs, signature: Signature) -> dict[str, Declared]:
        return {"x": Declared(torch.float32, (None, None), tuple(example[0][0].shape))} if example[0] else {}


class OpenLayers(OpenModel):
    """An open dict: value 0 is the input, and value n what the n-th layer gives."""

    def __init__(self, model: dict[str, nn.Module], inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs

    @cached_property
    def flow(self) -> Flow:
        values = [torch.zeros(1) if not self.inputs[0] else self.inputs[0][0]]
        elements: list[Element] = [Other(0)]
        weights: dict[str, Tensor] = {}
        chains = []
        for value, (name, layer) in enumerate(self.model.items(), 1):
            values.append(layer(values[-1]))
            if isinstance(layer, nn.Linear):
                weights[f"{name}.weight"] = layer.weight
                operator = Linear(layer.weight.detach(), bias=layer.bias.detach())
                elements.append(Call(value, value - 1, operator, f"{name}.weight", f"{name}.bias", path=name))
            else:
                elements.append(Other(value))
            if isinstance(layer, ChainLayer):
                chains.append(ModuleChain((name,), (layer.chain,), (f"{name}.weight",), (id(layer),), (value,)))
        tensors = Tensors(
            {name: id(weight) for name, weight in weights.items()},
            {name: weight.numel() for name, weight in weights.items()},
            {
                id(self.model[call.path or ""].weight): frozenset({call.value})
                for call in elements
                if isinstance(call, Call)
            },
        )
        users = {value: frozenset({value + 1} if value + 1 < len(values) else ()) for value in range(len(values))}
        shapes = {value: tuple(x.shape) for value, x in enumerate(values)}
        reads = {value: shapes[value - 1] for value in range(1, len(values))}
        return Flow(tuple(elements), users, tensors, shapes, reads, chains=tuple(chains))

    def apply(self, edit: Edit) -> None:
        if isinstance(edit, Replace):
            self.model[edit.placement.site.name] = ChainLayer(edit.chain)
        elif isinstance(edit.chain, FusableModule):
            operator = edit.chain.operators[0]
            layer = nn.Linear(operator.in_channels, operator.out_channels, bias=operator.bias is not None)
            layer.load_state_dict({"weight": operator.weight, "bias": operator.bias})
            self.model[edit.chain.sites[0]] = layer

    def reopen(self, placements: Sequence[Placement]) -> dict[str, Placement]:
        return {placement.site.name: placement for placement in placements}

    def finish(self) -> dict[str, nn.Module]:
        return self.model

    def observe(self) -> Observed:
        return ObservedLayers(lambda: self.flow, self.model)


class ObservedLayers(Observed):
    """Layers with hooks, called one after another."""

    def __init__(self, flow: Callable[[], Flow], model: Mapping[str, nn.Module]) -> None:
        super().__init__(flow)
        self.model = model
        self.sees: dict[str, See] = {}
        self.changes: dict[str, OutputChange] = {}

    def watch(self, call: Call, see: See) -> None:
        self.sees[str(call.path)] = see

    def tap(self, call: Call, change: OutputChange) -> None:
        self.changes[str(call.path)] = change

    def norms(self) -> Sequence[Norm]:
        return ()

    def forget(self) -> None:
        self.sees.clear()
        self.changes.clear()

    @property
    def parameters(self) -> Iterable[nn.Parameter]:
        return (parameter for layer in self.model.values() for parameter in layer.parameters())

    def execute(self, inputs: Inputs) -> Tensor:
        value: Tensor = inputs[0][0]
        for name, layer in self.model.items():
            if name in self.sees:
                self.sees[name](value)
            value = layer(value)
            value = self.changes.get(name, lambda y: y)(value)
        return value
