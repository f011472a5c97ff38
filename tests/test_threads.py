"""Limits of threads: what they limit, that they nest, and that solvers leave none behind."""

from __future__ import annotations

import pytest
import torch
from threadpoolctl import ThreadpoolController

from surgery.solvers import cp as solver
from surgery.solvers.cp import cp
from surgery.solvers.threads import one_pool


def threads() -> tuple[set[int], int]:
    """Return the threads of the OpenBLAS that came with NumPy or SciPy, and of torch."""
    pools = ThreadpoolController().select(prefix="libscipy_openblas").info()
    return {pool["num_threads"] for pool in pools}, torch.get_num_threads()


def test_limits_hold_inside_alone() -> None:
    blas, own = outside = threads()
    alone = {min(count, 1) for count in blas}
    with one_pool(one_thread=False):
        assert threads() == (alone, own)
        with one_pool(one_thread=True):
            assert threads() == (alone, 1)
        assert threads() == (alone, own)
    assert threads() == outside


def test_an_error_lifts_the_limits() -> None:
    outside = threads()
    with pytest.raises(RuntimeError, match="on purpose"), one_pool(one_thread=True):
        raise RuntimeError("on purpose")
    assert threads() == outside


@pytest.mark.parametrize("small", [0, 2**30])
def test_cp_is_the_same_with_any_threads_and_leaves_them(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = torch.randn(1, 20, 30, 3, 5, generator=torch.Generator().manual_seed(0))
    expected, outside = cp(tensor, 4), threads()
    monkeypatch.setattr(solver, "_SMALL", small)
    found = cp(tensor, 4)
    assert threads() == outside
    assert found.error == pytest.approx(expected.error, rel=1e-3)  # of sums in another order, over many sweeps
    assert [factor.shape for factor in found.factors] == [(1, size, 4) for size in tensor.shape[1:]]
