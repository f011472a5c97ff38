"""What a chain does to the outputs, measured with nothing changed, is what the changed model does."""

from __future__ import annotations

import pytest
import torch

from surgery.calibration.inputs import read_calibration
from surgery.chain import Chain
from surgery.comparison import run_model
from surgery.factorizations import fitting
from surgery.graphs import open_graph
from surgery.inputs import normalise_inputs
from surgery.passes.effects import Effects
from surgery.passes.goals import HeldOut
from tests.test_calibration_models import KINDS
from tests.zoo import ZOO, graph

FLOAT32 = 1e-4


@pytest.mark.law
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_an_effect_is_that_of_the_changed_model(name: str, kind: str) -> None:
    model, inputs = graph(name, kind)
    args, kwargs = normalise_inputs(inputs)
    samples = read_calibration([inputs] * 2, model, inputs)
    before = run_model(model, (args, kwargs))
    effects, held_out = Effects(model, samples), HeldOut(model, samples)
    tried = 0
    for at, spot in enumerate(open_graph(model, args, kwargs, copies=False).find().spots):
        methods = fitting(spot.site.operator, "auto")
        if not isinstance(methods, list):
            continue
        ranks = tuple(max(1, full // 2) for full in methods[0].max_ranks(spot.site.operator))
        chain = methods[0].factor(spot.site.operator, ranks)
        if not isinstance(chain, Chain):
            continue
        changed = open_graph(model, args, kwargs, copies=True)
        changed.splice(changed.find().spots[at], chain)
        expected = held_out.error(changed.finish())[0]
        assert effects.of(spot.site.name, chain) == pytest.approx(expected, rel=FLOAT32, abs=FLOAT32)
        tried += 1
    assert tried or name == "functional"  # a module that calls functions alone has no sites
    assert all(map(torch.equal, leaves(run_model(model, (args, kwargs))), leaves(before)))


def leaves(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
