"""Forms, what they say is alike, and stacks of operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from surgery.algebra import Chain, Conv, Embedding, Geometry, Linear, Operator, own_parameters, split, stack, stack_key
from surgery.errors import Refusal

CONV = Conv(torch.randn(4, 3, 3, 3), Geometry.pointwise(2), bias=torch.randn(4))
ALIKE = [
    (Linear(torch.randn(3, 5)), Linear(torch.randn(4, 5), bias=torch.randn(4)), torch.randn(2, 5)),
    (CONV, Conv(torch.randn(2, 3, 3, 3), CONV.geometry), torch.randn(1, 3, 5, 5)),
    (Embedding(torch.randn(7, 3)), Embedding(torch.randn(7, 2)), torch.tensor([0, 6])),
]
UNLIKE = [
    (Linear(torch.ones(3, 5)), Linear(torch.ones(3, 6))),
    (Linear(torch.ones(3, 5)), Linear(torch.ones(3, 5).double())),
    (CONV, replace(CONV, geometry=replace(CONV.geometry, stride=(2, 1)))),
    (Linear(torch.ones(3, 7)), Embedding(torch.ones(7, 3))),
    (Embedding(torch.ones(7, 3)), Embedding(torch.ones(7, 3), padding_index=0)),
]


@pytest.mark.parametrize(("first", "second", "x"), ALIKE)
def test_a_stack_gives_the_outputs_of_all(first: Operator, second: Operator, x: torch.Tensor) -> None:
    assert stack_key(first) == stack_key(second)
    both = stack([first, second])
    axis = -1 - first.spatial_dims
    wanted = torch.cat([operator.with_bias(None)(x) for operator in (first, second)], axis)
    torch.testing.assert_close(both(x), wanted)
    assert both.bias is None


@pytest.mark.parametrize(("first", "second"), UNLIKE)
def test_what_differs_in_more_than_its_outputs_does_not_stack(first: Operator, second: Operator) -> None:
    assert stack_key(first) != stack_key(second)


def test_forms_hold_all_but_the_numbers() -> None:
    scaled = replace(CONV, weight=3 * CONV.weight)
    assert scaled.form == CONV.form == CONV.to(dtype=torch.float64).form
    assert CONV.form != CONV.with_bias(None).form == CONV.form.unbiased
    assert (CONV.form.geometry, CONV.form.kernel) == (CONV.geometry, (1, 4, 3, 3, 3))
    assert (CONV.spatial_dims, Linear(torch.ones(1, 1)).spatial_dims) == (2, 0)
    assert Embedding(torch.ones(2, 2)).reads_indices
    assert CONV.description == "Conv2d 3x3"
    strided = replace(CONV, geometry=replace(CONV.geometry, stride=(2, 2)))
    assert strided.description == "Conv2d 3x3 /2"
    assert replace(strided, geometry=replace(CONV.geometry, stride=(2, 1))).description == "Conv2d 3x3 /2,1"


def test_a_chain_with_nothing_to_share_is_refused() -> None:
    parts = [Linear(torch.ones(3, 5)), Linear(torch.ones(4, 5))]
    assert isinstance(split(Chain((stack(parts),)), parts), Refusal)
    chains = split(Chain((Linear(torch.ones(2, 5)), Linear(torch.ones(7, 2)))), parts)
    assert not isinstance(chains, Refusal)
    assert own_parameters(chains) == [10 + 6, 8]
