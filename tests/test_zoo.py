"""The zoo is what it says: every network comes in every graph kind, and each computes the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tests import zoo
from tests.covering import grouped
from tests.tolerances import assert_close, tolerance

PAIRS = [grouped(name, kind) for name, kinds in zoo.KINDS_OF.items() for kind in kinds]
each_network = pytest.mark.parametrize("name", [grouped(name) for name in zoo.ZOO])


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def enlarged(inputs: zoo.Inputs) -> zoo.Inputs:
    """The inputs with a batch of 3."""
    if isinstance(inputs, dict):
        return {name: torch.cat([x, x[:1]]) for name, x in inputs.items()}
    return tuple(torch.cat([x, x[:1]]) for x in inputs)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
def test_each_graph_kind_computes_what_the_module_does(name: str, kind: str) -> None:
    model, inputs = zoo.graph(name, "module")
    expected = tensors(zoo.call(model, inputs))
    made, same_inputs = zoo.graph(name, kind)
    actual = tensors(zoo.call(made, same_inputs))
    assert len(actual) == len(expected) >= 1
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, tolerance(torch.float32, length=100))
        assert bool(torch.isfinite(one).all())
        assert float(one.std()) > 1e-4  # an output that says nothing tests nothing


@each_network
def test_a_dynamic_program_takes_another_batch(name: str) -> None:
    model, inputs = zoo.graph(name, "module")
    program, _ = zoo.graph(name, "program-dynamic")
    expected = tensors(zoo.call(model, enlarged(inputs)))
    for one, other in zip(tensors(zoo.call(program, enlarged(inputs))), expected, strict=True):
        assert_close(one, other, tolerance(torch.float32, length=100))


@each_network
def test_graphs_have_the_type_that_their_kind_says(name: str) -> None:
    traced = zoo.graph(name, "graph")[0] if name in zoo.TRACEABLE else zoo.trace(*zoo.ZOO[name]())
    atens = any(isinstance(node.target, torch._ops.OpOverload) for node in traced.graph.nodes)
    assert atens == (name not in zoo.TRACEABLE)
    assert isinstance(zoo.graph(name, "aten-graph")[0], torch.fx.GraphModule)
    assert isinstance(zoo.graph(name, "program")[0], ExportedProgram)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_a_network_is_small_in_eval_mode_and_the_same_each_time(name: str) -> None:
    model, inputs = zoo.ZOO[name]()
    again, same_inputs = zoo.ZOO[name]()
    assert not any(module.training for module in model.modules())
    assert sum(parameter.numel() for parameter in model.parameters()) < 100_000
    pairs = zip(model.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    assert all(torch.equal(a, b) for a, b in zip(tensors(inputs), tensors(same_inputs), strict=True))
    assert all(len(x) == 2 for x in tensors(inputs))


def test_tied_weights_are_tied() -> None:
    tied, _ = zoo.graph("tied", "module")
    assert tied.first.weight is tied.second.weight
    assert not torch.equal(tied.first.bias, tied.second.bias)
    gpt2, _ = zoo.graph("hf-gpt2", "module")
    assert gpt2.lm_head.weight is gpt2.transformer.wte.weight
    names, _ = zoo.graph("two-names", "module")
    assert names.conv is names.alias


def test_spectra_decay() -> None:
    model, _ = zoo.graph("resnet-basic", "module")
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and min(module.weight.shape[:2]) > 4:
            values = torch.linalg.svdvals(module.weight.detach().flatten(1))
            assert float(values[len(values) // 2]) < 0.5 * float(values[0])
