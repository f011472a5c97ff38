"""Composition beyond our own chains: what composes is exact, what does not is refused with a reason."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st
from torch import Tensor, nn

from surgery.algebra import Chain, Conv, Geometry, Linear, Operator, PaddingMode, Shape, compose, relative_error
from surgery.errors import Refusal
from tests.cases import operator_of
from tests.tolerances import assert_close

EXACT = 1e-12  # float64: two ways to sum up to a few hundred products
MODES: tuple[PaddingMode, ...] = ("zeros", "reflect", "replicate", "circular")

_C1, _C2, _C3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
_T1, _T2 = nn.ConvTranspose1d, nn.ConvTranspose2d


def operator(module: nn.Module) -> Operator:
    return operator_of(module.double())


def chain_of(*modules: nn.Module) -> Chain:
    return Chain(tuple(operator(module) for module in modules))


def inputs(chain: Chain, size: Shape) -> Tensor:
    return torch.randn(2, chain.operators[0].in_channels, *size, dtype=torch.float64)


def no_bias(module: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    return module(*args, bias=False, **kwargs)


COMPOSES: dict[str, tuple[Chain, Shape]] = {
    "1x1, 3x3": (chain_of(no_bias(_C2, 4, 3, 1), _C2(3, 5, 3, stride=2, padding=1)), (8, 9)),
    "1x1 with bias, 3x3": (chain_of(_C2(4, 3, 1), _C2(3, 5, 3)), (8, 9)),
    "3x3, 1x1, biases": (chain_of(_C2(4, 3, 3, padding=1, dilation=2), _C2(3, 5, 1)), (8, 9)),
    "1x1, 1x1, biases": (chain_of(_C2(4, 3, 1), _C2(3, 5, 1)), (8, 9)),
    "3x1, 1x5, strides": (
        chain_of(no_bias(_C2, 4, 3, (3, 1), (2, 1), (1, 0)), _C2(3, 5, (1, 5), (1, 3), (0, 2))),
        (8, 9),
    ),
    "1x5, 3x1": (chain_of(no_bias(_C2, 4, 3, (1, 5), 1, (0, 2)), _C2(3, 5, (3, 1), (2, 1), (1, 0))), (8, 9)),
    "CP: 1x1, 3x1 dw, 1x5 dw, 1x1": (
        chain_of(
            no_bias(_C2, 4, 6, 1),
            no_bias(_C2, 6, 6, (3, 1), (2, 1), (1, 0), groups=6),
            no_bias(_C2, 6, 6, (1, 5), (1, 2), (0, 2), groups=6),
            _C2(6, 5, 1),
        ),
        (8, 9),
    ),
    "TT: 1x1, 3x1, 1x5, 1x1": (
        chain_of(
            no_bias(_C2, 4, 3, 1),
            no_bias(_C2, 3, 4, (3, 1), (2, 1), (1, 0)),
            no_bias(_C2, 4, 2, (1, 5), (1, 2), (0, 2)),
            _C2(2, 5, 1),
        ),
        (8, 9),
    ),
    "Tucker of 2 groups": (
        chain_of(
            no_bias(_C2, 8, 4, 1, groups=2),
            no_bias(_C2, 4, 6, 3, 2, 1, groups=2),
            _C2(6, 10, 1, groups=2),
        ),
        (8, 9),
    ),
    "groups 4, then 6": (chain_of(no_bias(_C2, 8, 12, 3, groups=4), _C2(12, 6, 1, groups=6)), (8, 9)),
    "depthwise, pointwise": (chain_of(_C2(6, 6, 3, padding=1, groups=6), _C2(6, 5, 1)), (8, 9)),
    "pointwise, depthwise": (chain_of(no_bias(_C2, 4, 6, 1), _C2(6, 6, 3, padding=1, groups=6)), (8, 9)),
    "biased, then unpadded": (chain_of(_C2(4, 3, 3, padding=1), _C2(3, 5, 3)), (8, 9)),
    "biased, then unpadded with stride and dilation": (
        chain_of(_C2(4, 3, 3, (2, 1), 1, (1, 2)), _C2(3, 5, 2, 2, dilation=(2, 1))),
        (12, 13),
    ),
    "biased, then circular": (chain_of(_C2(4, 3, 1), _C2(3, 5, 3, padding=1, padding_mode="circular")), (8, 9)),
    "biased, then reflecting": (chain_of(_C2(4, 3, 1), _C2(3, 5, 3, padding=1, padding_mode="reflect")), (8, 9)),
    "circular, both directions": (
        chain_of(
            _C2(4, 3, (3, 1), padding=(1, 0), padding_mode="circular"),
            _C2(3, 5, (1, 3), padding=(0, 1), padding_mode="circular"),
        ),
        (8, 9),
    ),
    "strided 1x1, 3x3": (chain_of(no_bias(_C2, 4, 3, 1, 2), _C2(3, 5, 3, padding=1)), (8, 9)),
    "strided 1x1, strided 3x3 padded": (chain_of(no_bias(_C2, 4, 3, 1, (2, 3)), _C2(3, 5, 3, 2, (2, 1))), (9, 10)),
    "3x3, strided 1x1": (chain_of(_C2(4, 3, 3, padding=1), _C2(3, 5, 1, 2)), (8, 9)),
    "3x3 'same', 1x1": (chain_of(no_bias(_C2, 4, 3, 4, padding="same"), _C2(3, 5, 1)), (8, 9)),
    "1d: 5, 3": (chain_of(_C1(4, 3, 5, padding=2), _C1(3, 5, 3, dilation=2)), (15,)),
    "3d: 3x1x1, 1x3x1, 1x1x3": (
        chain_of(
            no_bias(_C3, 2, 3, (3, 1, 1), padding=(1, 0, 0)),
            no_bias(_C3, 3, 2, (1, 3, 1), (1, 2, 1)),
            _C3(2, 3, (1, 1, 3), padding=(0, 0, 1)),
        ),
        (5, 6, 5),
    ),
    "transposed: 1x1, 4x4": (chain_of(no_bias(_C2, 4, 3, 1), _T2(3, 5, 4, 2, 1)), (5, 6)),
    "transposed: 4x4, 1x1": (chain_of(_T2(4, 3, 4, 2, 1, 1), _C2(3, 5, 1)), (5, 6)),
    "transposed: 3x1, 1x4": (
        chain_of(no_bias(_T2, 4, 3, (3, 1), (2, 1), (1, 0), (1, 0)), _T2(3, 5, (1, 4), (1, 2))),
        (5, 6),
    ),
    "transposed: groups": (chain_of(no_bias(_T1, 4, 6, 3, 2, groups=2), _C1(6, 4, 1, groups=2)), (7,)),
    "linear, biases": (chain_of(nn.Linear(4, 3), nn.Linear(3, 5)), ()),
    "linear, bias on the first only": (chain_of(nn.Linear(4, 3), no_bias(nn.Linear, 3, 5)), ()),
    "three linear": (chain_of(no_bias(nn.Linear, 4, 3), nn.Linear(3, 2), nn.Linear(2, 5)), ()),
}

REFUSED: dict[str, tuple[Chain, str]] = {
    "bias before zero padding": (chain_of(_C2(4, 3, 1), _C2(3, 5, 3, padding=1)), "bias"),
    "bias before zero padding along the other dimension": (
        chain_of(_C2(4, 3, (3, 1), padding=(1, 0)), _C2(3, 5, (1, 3), padding=(0, 1))),
        "bias",
    ),
    "bias before a transposed one": (chain_of(_C2(4, 3, 1), _T2(3, 5, 3, 2)), "bias"),
    "padded 3x3 after 3x3": (chain_of(no_bias(_C2, 4, 3, 3, padding=1), _C2(3, 5, 3, padding=1)), "pads"),
    "padded 1x1 after 3x3": (chain_of(no_bias(_C2, 4, 3, 3), _C2(3, 5, 1, padding=1)), "pads"),
    "padding in two modes": (
        chain_of(
            no_bias(_C2, 4, 3, (3, 1), padding=(1, 0), padding_mode="circular"),
            _C2(3, 5, (1, 3), padding=(0, 1)),
        ),
        "modes",
    ),
    "strided 1x1 before circular padding": (
        chain_of(no_bias(_C2, 4, 3, 1, 2), _C2(3, 5, 3, padding=1, padding_mode="circular")),
        "pads",
    ),
    "transposed, then plain": (chain_of(no_bias(_T2, 4, 3, 3, 2), _C2(3, 5, 3)), "transposed"),
    "plain, then transposed": (chain_of(no_bias(_C2, 4, 3, 3), _T2(3, 5, 3, 2)), "transposed"),
    "transposed twice along a dimension": (chain_of(no_bias(_T2, 4, 3, 3, 2), _T2(3, 5, 3, 2)), "dimension 0"),
    "1d, then 2d": (chain_of(_C1(4, 3, 1), _C2(3, 5, 1)), "dimensions"),
    "linear, then conv": (chain_of(nn.Linear(4, 3), _C2(3, 5, 1)), "axes"),
}


@pytest.mark.parametrize("name", COMPOSES)
def test_composes(name: str) -> None:
    chain, size = COMPOSES[name]
    composed = chain.compose()
    assert isinstance(composed, Operator), composed
    x = inputs(chain, size)
    assert_close(composed(x), chain(x), EXACT)
    assert composed.weight.is_contiguous()


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused(name: str) -> None:
    chain, word = REFUSED[name]
    refusal = chain.compose()
    assert isinstance(refusal, Refusal)
    assert word in refusal.reason


def test_an_all_zero_bias_before_zero_padding_composes() -> None:
    first, second = operator(_C2(4, 3, 1)), operator(_C2(3, 5, 3, padding=1))
    chain = Chain((first.with_bias(torch.zeros(first.out_channels, dtype=torch.float64)), second))
    composed = chain.compose()
    assert isinstance(composed, Operator), composed
    x = inputs(chain, (8, 9))
    assert_close(composed(x), chain(x), EXACT)


def test_a_refusal_in_the_middle_of_a_chain_is_kept() -> None:
    chain, _ = REFUSED["padded 3x3 after 3x3"]
    longer = Chain((*chain.operators, operator(_C2(5, 5, 1))))
    assert longer.compose() == chain.compose()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_composition_keeps_the_dtype(dtype: torch.dtype) -> None:
    chain = chain_of(_C2(4, 3, (3, 1)), _C2(3, 5, (1, 3))).to(dtype=dtype)
    composed = chain.compose()
    assert isinstance(composed, Operator)
    assert composed.weight.dtype == composed.bias.dtype == dtype


@st.composite
def axis_pairs(draw: st.DrawFn, *, transposed: bool) -> dict[str, list[Any]]:
    """One dimension of a convolution; most draws are trivial in some way, since those compose."""
    kernel = draw(st.sampled_from([1, 1, 2, 3, 4]))
    stride = draw(st.sampled_from([1, 1, 2, 3]))
    dilation = draw(st.sampled_from([1, 1, 2, 3]))
    before = draw(st.sampled_from([0, 0, 1, 2]))
    after = before if transposed else draw(st.sampled_from([before, before, 0, 1]))
    rest = draw(st.integers(0, max(stride, dilation) - 1)) if transposed else 0
    found: dict[str, Any] = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": (before, after),
        "dilation": dilation,
        "output_padding": rest,
    }
    return found


@st.composite
def convs(draw: st.DrawFn, *, dims: int, columns: int) -> Conv:
    """A random convolution of ``columns`` input channels."""
    transposed = draw(st.sampled_from([False, False, True]))
    mode: PaddingMode = "zeros" if transposed else draw(st.sampled_from(("zeros", "zeros", *MODES)))
    axes = [draw(axis_pairs(transposed=transposed)) for _ in range(dims)]
    table: dict[str, Any] = {key: tuple(axis[key] for axis in axes) for key in axes[0]}
    groups = draw(st.sampled_from([g for g in (1, 1, 2, 3, 6) if columns % g == 0]))
    rows = groups * draw(st.integers(1, 6 // groups))
    size = table.pop("kernel_size")
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    shape = (columns, rows // groups, *size) if transposed else (rows, columns // groups, *size)
    weight = torch.randn(shape, generator=generator, dtype=torch.float64)
    bias = torch.randn(rows, generator=generator, dtype=torch.float64) if draw(st.booleans()) else None
    return Conv(weight, Geometry(**table, transposed=transposed, padding_mode=mode), groups, bias=bias)


@st.composite
def conv_chains(draw: st.DrawFn, *, length: int) -> tuple[Chain, Tensor]:
    dims = draw(st.integers(1, 2))
    columns = first = draw(st.sampled_from([1, 2, 4, 6]))
    operators = []
    for _ in range(length):
        operators.append(draw(convs(dims=dims, columns=columns)))
        columns = operators[-1].out_channels
    size = draw(st.tuples(*[st.integers(3, 13)] * dims))
    generator = torch.Generator().manual_seed(7)
    return Chain(tuple(operators)), torch.randn(2, first, *size, generator=generator, dtype=torch.float64)


def run(chain: Chain, x: Tensor) -> Tensor | None:
    """The chain's output; None where torch itself cannot run it on this input (too small, padding too wide)."""
    try:
        return chain(x)
    except RuntimeError:
        return None


def check(chain: Chain, x: Tensor) -> None:
    composed = chain.compose()
    if isinstance(composed, Refusal):
        event("refused")
        assert len(composed.reason) > 10
        return
    expected = run(chain, x)
    assume(expected is not None)
    assert expected is not None
    event("composed")
    actual = composed(x)
    assert actual.shape == expected.shape == composed.out_shape(tuple(x.shape)) == chain.out_shape(tuple(x.shape))
    assert relative_error(actual, expected) <= EXACT


@given(conv_chains(length=2))
def test_any_two_convolutions_compose_exactly_or_are_refused(drawn: tuple[Chain, Tensor]) -> None:
    check(*drawn)


@given(conv_chains(length=3))
def test_any_three_convolutions_compose_exactly_or_are_refused(drawn: tuple[Chain, Tensor]) -> None:
    check(*drawn)


@given(conv_chains(length=2), st.sampled_from(["first", "second"]), st.data())
def test_with_a_trivial_neighbour_only_bias_and_border_stop_it(
    drawn: tuple[Chain, Tensor], which: str, data: st.DataObject
) -> None:
    """A 1x1 convolution before or after any convolution composes, save for a bias under padding."""
    chain, x = drawn
    index = 0 if which == "first" else 1
    conv = chain.operators[index]
    assert isinstance(conv, Conv)
    kernel = conv.kernel[(..., *[slice(0, 1)] * conv.geometry.dims)]
    pointwise = Conv.from_kernel(kernel, Geometry.pointwise(conv.geometry.dims), conv.bias)
    parts = list(chain.operators)
    parts[index] = pointwise
    if which == "first" and pointwise.bias is not None and data.draw(st.booleans(), label="drop bias"):
        parts[0] = pointwise.with_bias(None)
    chain = Chain(tuple(parts))
    other = parts[1 - index]
    assert isinstance(other, Conv)
    borders = other.geometry.transposed or (other.geometry.padded and other.geometry.padding_mode == "zeros")
    stops = which == "first" and parts[0].bias is not None and borders and not other.pointwise
    assert isinstance(chain.compose(), Refusal) == stops
    check(chain, x)


@given(st.lists(st.integers(1, 5), min_size=3, max_size=5), st.data())
def test_linear_chains_always_compose(widths: list[int], data: st.DataObject) -> None:
    layers = [operator(nn.Linear(a, b, bias=data.draw(st.booleans()))) for a, b in pairwise(widths)]
    chain = Chain(tuple(layers))
    composed = chain.compose()
    assert isinstance(composed, Linear)
    x = torch.randn(3, widths[0], dtype=torch.float64)
    assert relative_error(composed(x), chain(x)) <= EXACT
    assert (composed.bias is None) == all(layer.bias is None for layer in layers)


def test_composition_is_associative() -> None:
    for chain, size in COMPOSES.values():
        if len(chain.operators) < 3:
            continue
        first, *rest = chain.operators
        right = Chain(tuple(rest)).compose()
        assert isinstance(right, Operator)
        composed = compose(first, right)
        assert isinstance(composed, Operator)
        x = inputs(chain, size)
        assert_close(composed(x), chain(x), EXACT)


def test_the_bias_of_the_second_alone_is_kept_bit_for_bit() -> None:
    chain, _ = COMPOSES["1x1, 3x3"]
    composed = chain.compose()
    assert isinstance(composed, Conv)
    kept = chain.operators[1].bias
    assert composed.bias is not None
    assert kept is not None
    assert torch.equal(composed.bias, kept)


def test_a_chain_without_numbers_composes_to_the_shapes() -> None:
    chain, size = COMPOSES["TT: 1x1, 3x1, 1x5, 1x1"]
    composed = chain.to(device="meta").compose()
    assert isinstance(composed, Conv)
    assert composed.weight.shape == (5, 4, 3, 5)
    assert composed.out_shape((2, 4, *size)) == chain.out_shape((2, 4, *size))


def test_relative_error_of_zeros() -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    assert relative_error(zero, zero) == 0
    assert relative_error(one, zero) == pytest.approx(3**0.5)
    assert relative_error(zero, one) == 1
    assert not relative_error(one * float("nan"), one) <= 1


def test_a_large_product_is_that_of_its_blocks() -> None:
    """Composition and errors go through large weights in blocks of outputs, which do not have to divide them evenly."""
    generator = torch.Generator().manual_seed(0)
    first = Linear(torch.randn(2, 2100, generator=generator))
    second = Linear(torch.randn(2101, 2, generator=generator))
    composed = Chain((first, second)).compose()
    assert isinstance(composed, Linear)
    whole = second.weight.double() @ first.weight.double()
    assert torch.equal(composed.weight, whole.float())
    pointwise = Conv(second.weight[..., None], Geometry.pointwise(1))
    convolution = Chain((Conv(first.weight[..., None], Geometry.pointwise(1)), pointwise)).compose()
    assert isinstance(convolution, Conv)
    assert torch.equal(convolution.weight[..., 0], composed.weight)
    assert relative_error(composed.weight.double() * 1.001, composed.weight) == pytest.approx(1e-3, rel=1e-9)
