"""The laws of moments and of data-aware factors, over the operator cases x the factorizations."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surgery.algebra import Chain, Conv, Embedding, Linear, Operator, relative_error
from surgery.data.factor import correct_bias, fit, output_error
from surgery.data.moments import Accumulator, Moments, layout_bytes
from surgery.errors import InputError, Refusal
from surgery.factorizations import FACTORIZATIONS, Factorization, Ranks
from tests.cases import CASES, Case
from tests.fitted import each, solved
from tests.tolerances import assert_close, reduction, tolerance

ALL = 10**9
EXACT = [case for case in CASES if case.dtype == torch.float64]
FEW = {"conv1d-3", "conv2d-3x3", "transposed2d-groups-dilation"}  # for cp, with random restarts, they stand for all
FITS = [
    (case, method)
    for case in CASES
    for method in FACTORIZATIONS.values()
    if method.refuse(case.operator) is None and (method.name != "cp" or case.id in FEW)
]


def activations(case: Case, seed: int) -> Tensor:
    """Inputs as networks have them: correlated along the last axis, not negative, and so not centred."""
    if isinstance(case.operator, Embedding):
        return torch.randint(case.operator.in_channels, case.shape, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(case.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (noise.cumsum(-1) / 2 + 0.5).relu().to(case.dtype)


@functools.cache
def moments_of(case: Case) -> Moments:
    accumulator = Accumulator(case.operator, limit=ALL, rows=ALL)
    for seed in range(3):
        accumulator.add(activations(case, seed))
    return accumulator.moments()


def outputs(operator: Operator, x: Tensor) -> Tensor:
    """Outputs (rows, out channels) in float64."""
    wide = operator.to(dtype=torch.float64)
    y = wide(x if isinstance(operator, Embedding) else x.double())
    dims = operator.geometry.dims if isinstance(operator, Conv) else 0
    return y.movedim(-1 - dims, -1).reshape(-1, operator.out_channels)


def halved(ranks: Ranks) -> Ranks:
    return tuple((rank + 1) // 2 for rank in ranks)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_moments_say_what_the_operator_puts_out(case: Case) -> None:
    accumulator = Accumulator(case.operator, limit=ALL, rows=ALL)
    values = []
    for seed in range(2):
        x = activations(case, seed)
        accumulator.add(x)
        values.append(outputs(case.operator.with_bias(None), x))
    moments, y = accumulator.moments(), torch.cat(values)
    kernel = case.operator.kernel.double().flatten(2)
    sums = len(y) * reduction(case.operator)  # over samples and over inputs
    allowed = tolerance(torch.float32 if case.dtype != torch.float64 else case.dtype, length=sums)
    assert moments.count == len(y)
    assert moments.dense != isinstance(case.operator, Embedding)
    assert float(moments.metric.energy(kernel)) == pytest.approx(float(y.square().sum(1).mean()), rel=allowed)
    assert_close((kernel @ moments.mean.unsqueeze(-1)).flatten(), y.mean(0), allowed)
    second = kernel @ moments.second @ kernel.mT
    by_group = y.unflatten(1, (case.operator.kernel.shape[0], -1)).transpose(0, 1)
    assert_close(second, by_group.mT @ by_group / len(y), allowed)


@each(FITS)
def test_factors_are_never_worse_on_the_data_than_plain_ones(case: Case, method: Factorization) -> None:
    operator, moments, ranks = case.operator, moments_of(case), halved(method.max_ranks(case.operator))
    plain, fitted = solved(case, method.name, ranks), fit(method, operator, ranks, moments)
    if isinstance(fitted, Refusal):
        assert isinstance(plain, Refusal)
        return
    assert [o.weight.shape for o in fitted.operators] == [
        o.weight.shape for o in method.skeleton(operator, ranks).operators
    ]
    assert (fitted.bias is None) == (operator.bias is None)
    for part in fitted.operators:
        assert part.weight.dtype == case.dtype
        assert part.weight.is_contiguous()
        assert part.weight.untyped_storage().nbytes() == part.weight.nbytes
    if isinstance(plain, Chain):
        corrected = plain if operator.bias is None else correct_bias(plain, operator, moments)
        error = output_error(fitted, operator, moments)
        assert error <= output_error(corrected, operator, moments)
        assert error <= output_error(plain, operator, moments) * (1 + 1e-9) + 4 * torch.finfo(case.dtype).eps


@pytest.mark.parametrize("name", ["conv2d-3x3", "conv2d-groups", "conv1d-7-stride", "linear-composite", "embedding"])
def test_sensitive_outputs_keep_more(name: str) -> None:
    """Errors go where they matter least: by the weighed error the weighed factors are the better ones."""
    case = next(case for case in CASES if case.id == name)
    groups, out = case.operator.kernel.shape[:2]
    directions = torch.randn(groups, out, out, dtype=torch.float64) * 0.4 ** torch.arange(out)
    moments = replace(moments_of(case), sensitivity=directions @ directions.mT)
    for method in FACTORIZATIONS.values():
        if method.refuse(case.operator) is not None or method.name == "cp":
            continue
        ranks = halved(method.max_ranks(case.operator))
        weighed = fit(method, case.operator, ranks, moments)
        even, plain = fit(method, case.operator, ranks, moments_of(case)), method.factor(case.operator, ranks)
        assert isinstance(weighed, Chain)
        assert isinstance(even, Chain)
        assert isinstance(plain, Chain)
        errors = [output_error(chain, case.operator, moments, weighed=True) for chain in (weighed, even, plain)]
        assert errors[0] <= errors[2]
        if method.name == "svd":
            assert errors[0] <= errors[1] * (1 + 1e-2)  # the ridge


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.id)
def test_full_rank_stays_exact(case: Case) -> None:
    for method in FACTORIZATIONS.values():
        if method.refuse(case.operator) is None:
            chain = fit(method, case.operator, method.max_ranks(case.operator), moments_of(case))
            if isinstance(chain, Chain):
                assert output_error(chain, case.operator, moments_of(case)) < 1e-6


@pytest.mark.parametrize("name", ["linear", "conv2d-3x3", "conv2d-groups", "transposed2d-3x3", "conv2d-circular"])
def test_the_error_is_that_of_the_outputs_and_the_bias_takes_the_mean(name: str) -> None:
    case = next(case for case in CASES if case.id == name)
    operator, moments = case.operator, moments_of(case)
    chain = fit(FACTORIZATIONS["svd"], operator, halved(FACTORIZATIONS["svd"].max_ranks(operator)), moments)
    assert isinstance(chain, Chain)
    xs = [activations(case, seed) for seed in range(3)]
    y = torch.cat([outputs(operator, x) for x in xs])
    composed = chain.compose()
    assert isinstance(composed, Operator)
    z = torch.cat([outputs(composed, x) for x in xs])
    scale = torch.cat([outputs(operator.with_bias(None), x) for x in xs]).square().sum()
    measured = float(((y - z).square().sum() / scale).sqrt())
    assert output_error(chain, operator, moments) == pytest.approx(measured, rel=1e-6)
    assert float((y - z).mean(0).abs().max()) < 1e-10 * float(y.abs().max())
    uncorrected = chain.with_bias(operator.bias)
    assert output_error(uncorrected, operator, moments) > output_error(chain, operator, moments)
    bare = operator.with_bias(None)
    assert output_error(chain.with_bias(None), bare, moments) == pytest.approx(
        moments.output_error(bare.kernel - composed.kernel, bare.kernel), rel=1e-9
    )


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(0, 1000), st.sampled_from(["tucker", "svd", "spatial", "tt", "depthwise"]))
def test_low_rank_inputs_are_no_trap(rank: int, seed: int, name: str) -> None:
    """Few directions, dead channels: the ridge keeps all finite, and the error is no larger than the plain one."""
    case = next(case for case in CASES if case.id == "conv2d-3x3-nobias-pad")
    basis = torch.randn(rank, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis[:, seed % 6] = 0
    x = torch.einsum("nrhw,rc->nchw", torch.randn(2, rank, 6, 5, dtype=torch.float64), basis)
    accumulator = Accumulator(case.operator, limit=ALL, rows=ALL)
    accumulator.add(x)
    method, moments = FACTORIZATIONS[name], accumulator.moments()
    ranks = halved(method.max_ranks(case.operator))
    plain, fitted = method.factor(case.operator, ranks), fit(method, case.operator, ranks, moments)
    assert isinstance(plain, Chain)
    assert isinstance(fitted, Chain)
    assert all(bool(torch.isfinite(o.weight).all()) for o in fitted.operators)
    assert output_error(fitted, case.operator, moments) <= output_error(plain, case.operator, moments)


@pytest.mark.parametrize(("name", "shape"), [("conv2d-3x3", [(1, 6, 6), (1, 9, 9)]), ("linear", [(1, 12)])])
def test_what_does_not_fit_is_approximated(name: str, shape: list[tuple[int, ...]]) -> None:
    case = next(case for case in CASES if case.id == name)
    operator, limit = case.operator, 11
    accumulator = Accumulator(operator, limit=limit, rows=ALL)
    for seed in range(3):
        accumulator.add(activations(case, seed))
    rough, whole = accumulator.moments(), moments_of(case)
    assert [tuple(f.shape) for f in rough.metric.factors] == shape
    assert sum(f.nbytes for f in rough.metric.factors) == layout_bytes(operator, limit)
    assert layout_bytes(operator, ALL) == whole.metric.factors[0].nbytes
    assert not rough.dense
    first, other = (m.second.diagonal(dim1=1, dim2=2).sum() for m in (rough, whole))
    assert torch.allclose(first, other)
    first, other = (
        m.centred.times(torch.eye(len(whole.mean[0]), dtype=torch.float64).unsqueeze(0)).diagonal(dim1=1, dim2=2).sum()
        for m in (rough, whole)
    )
    assert torch.allclose(first, other)
    chain = fit(FACTORIZATIONS["svd"], operator, (3,), rough)
    assert isinstance(chain, Chain)
    truncated = FACTORIZATIONS["svd"].factor(operator, (3,))
    assert isinstance(truncated, Chain)
    plain = correct_bias(truncated, operator, rough)
    assert output_error(chain, operator, whole) < output_error(plain, operator, whole)


def test_rows_are_sampled_where_there_are_many() -> None:
    operator = Linear(torch.randn(5, 8))
    x = torch.randn(50_000, 8).cumsum(1)
    few, again, every = (Accumulator(operator, limit=ALL, rows=rows, seed=3) for rows in (5000, 5000, ALL))
    for accumulator in (few, again, every):
        accumulator.add(x)
    assert few.moments().count == 5000
    assert torch.equal(few.moments().second, again.moments().second)
    assert relative_error(few.moments().second, every.moments().second) < 0.1


def test_moments_need_finite_inputs() -> None:
    accumulator = Accumulator(Linear(torch.randn(2, 3)), limit=ALL, rows=ALL)
    with pytest.raises(InputError, match="no calibration input"):
        accumulator.moments()
    accumulator.add(torch.full((1, 3), float("nan")))
    with pytest.raises(InputError, match="not finite"):
        accumulator.moments()
