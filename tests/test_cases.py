"""The case table is right: each operator is its module, and the ids are unique."""

from __future__ import annotations

import pytest

from surgery.algebra import Conv, Embedding
from tests.cases import CASES, Case
from tests.tolerances import assert_close, reduction, tolerance


def test_ids_are_unique() -> None:
    assert len({case.id for case in CASES}) == len(CASES)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")  # torch's own layer
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_the_operator_is_the_module(case: Case) -> None:
    x = case.inputs()
    expected = case.module(x)
    assert_close(case.operator(x), expected, tolerance(case.dtype, length=reduction(case.operator)))
    assert case.operator.out_shape(case.shape) == expected.shape
    assert case.operator.parameters == sum(p.numel() for p in case.module.parameters())
    if isinstance(case.operator, Embedding):
        assert (case.operator.in_channels, case.operator.out_channels) == case.module.weight.shape
        return
    axis = -1 - (case.operator.geometry.dims if isinstance(case.operator, Conv) else 0)
    assert case.operator.in_channels == case.shape[axis]
    assert case.operator.out_channels == expected.shape[axis]
