"""What a chain does to the outputs, measured with nothing changed, is what the changed model does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from surgery.algebra import Chain
from surgery.data.samples import read_calibration
from surgery.factorizations import fitting, named
from surgery.kinds.inputs import normalise_inputs
from surgery.kinds.registry import open_model
from surgery.passes.damages import Effects
from surgery.passes.evidence import HeldOut
from surgery.runtime.compare import run_model
from surgery.sites import Replace
from surgery.sites.find import find
from tests.covering import ALL
from tests.test_calibration_models import KINDS
from tests.zoo import ZOO, graph

FLOAT32 = 1e-4
_SITES = 12 if ALL else 4  # of a network


@pytest.mark.law(12)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_an_effect_is_that_of_the_changed_model(name: str, kind: str) -> None:
    model, inputs = graph(name, kind)
    args, kwargs = normalise_inputs(inputs)
    samples = read_calibration([inputs] * 2, model, inputs)
    before = run_model(model, (args, kwargs))
    effects, held_out = Effects(model, samples), HeldOut(model, samples)
    tried = 0
    for at, spot in enumerate(find(open_model(model, (args, kwargs), copies=False).flow).placements[:_SITES]):
        methods = fitting(spot.site.operator, "auto")
        if not isinstance(methods, list):
            continue
        ranks = tuple(max(1, full // 2) for full in methods[0].max_ranks(spot.site.operator))
        chain = methods[0].factor(spot.site.operator, ranks)
        if not isinstance(chain, Chain):
            continue
        changed = open_model(model, (args, kwargs), copies=True)
        changed.apply(Replace(find(changed.flow).placements[at], chain))
        expected = held_out.error(changed.finish())[0]
        assert effects.of(spot.site.name, chain) == pytest.approx(expected, rel=FLOAT32, abs=FLOAT32)
        tried += 1
    assert tried or name == "functional"  # a module that calls functions alone has no sites
    assert all(map(torch.equal, leaves(run_model(model, (args, kwargs))), leaves(before)))


def test_hooks_of_the_user_come_after_the_operator() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    model[0].register_forward_hook(lambda module, args, output: 10 * output.abs())
    model[1].register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    x = torch.randn(64, 8)
    samples = read_calibration(x, model)
    for at, name in enumerate("01"):
        operator = find(open_model(model, ((x,), {})).flow).placements[at].site.operator
        chain = named("svd").factor(operator, (3,))
        assert isinstance(chain, Chain)
        changed = open_model(model, ((x,), {}))
        changed.apply(Replace(find(changed.flow).placements[at], chain))
        expected = HeldOut(model, samples).error(changed.finish())[0]
        assert Effects(model, samples).of(name, chain) == pytest.approx(expected, rel=FLOAT32)


def leaves(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
