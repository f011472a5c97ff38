"""The laws of the algebra, over every operator case x every registered factorization."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from surgery.algebra.chain import Chain, relative_error
from surgery.algebra.operators import Conv, Operator
from surgery.errors import InputError, RankError, Refusal
from surgery.factorizations import FACTORIZATIONS, Factorization, Ranks, fitting, named
from tests.cases import CASES, Case
from tests.tolerances import assert_close, reduction, tolerance

PAIRS = [(case, method) for case in CASES for method in FACTORIZATIONS.values()]
FITS = [(case, method) for case, method in PAIRS if method.refuse(case.operator) is None]
UNFIT = [(case, method) for case, method in PAIRS if method.refuse(case.operator) is not None]
EXACT = [(case, method) for case, method in FITS if case.dtype == torch.float64]

# How much of the energy (squared norm) a larger rank may lose: nothing but rounding for a closed form; for an iterative
# solver the tolerance at which its sweeps stop.
ROUNDING = 1e-12
ENERGY_SLACK = {"tucker": 1e-4, "cp": 1e-5}

# How far, in relative error, a solver may be from another one that ends in another optimum: CP has several, and where
# its components would grow and cancel, a ridge holds ours back.
OPTIMA = {"cp": 5e-3}


def each(pairs: list[tuple[Case, Factorization]]) -> pytest.MarkDecorator:
    rows = [pytest.param(case, method, id=f"{case.id}-{method.name}", marks=pytest.mark.law) for case, method in pairs]
    return pytest.mark.parametrize(("case", "method"), rows)


def halved(ranks: Ranks) -> Ranks:
    return tuple((rank + 1) // 2 for rank in ranks)


def rank_choices(method: Factorization, operator: Operator) -> list[Ranks]:
    """The ends and the middle of the ranks, and each rank full while the others are halved."""
    full = method.max_ranks(operator)
    half = halved(full)
    mixed = [(*half[:i], full[i], *half[i + 1 :]) for i in range(len(full))]
    return list(dict.fromkeys([full, half, (1,) * len(full), *mixed]))


def slack(case: Case, chain: Chain) -> float:
    """Allowed between a chain and its operator: each operator rounds once; the solver's sums run over outputs too."""
    length = max(case.operator.out_channels, *(reduction(operator) for operator in (case.operator, *chain.operators)))
    return tolerance(case.dtype, length=length, steps=len(chain.operators) + 1)


def cancelling(method: Factorization, chain: Chain, operator: Operator) -> float:
    """How much larger the components of a CP, each of which is rounded, are than their sum; 1 for other methods."""
    if method.name != "cp" or len(chain.operators) < 3:
        return 1.0
    first, *extents, last = (step.kernel.double().flatten(3) for step in chain.operators)
    norms = first.norm(dim=(2, 3)).flatten() * last.norm(dim=(1, 3)).flatten()
    for extent in extents:
        norms = norms * extent.flatten(1).norm(dim=1)
    return max(1.0, float(norms.norm() / operator.kernel.double().norm()))


def factor(method: Factorization, operator: Operator, ranks: Ranks, *, solver: str = "auto") -> Chain:
    """The chain at these ranks or, where the method finds no good factors and says so, at the next lower ones."""
    chain = method.factor(operator, ranks, solver=solver)
    if isinstance(chain, Chain):
        return chain
    assert len(chain.reason) > 10
    return factor(method, operator, tuple(max(1, rank - 1) for rank in ranks), solver=solver)


def chains(method: Factorization, operator: Operator, choices: list[Ranks]) -> Iterator[tuple[Ranks, Chain]]:
    """The chains at several ranks, without those at which the method finds no good factors."""
    for ranks in choices:
        chain = method.factor(operator, ranks)
        if isinstance(chain, Chain):
            yield ranks, chain


def composed(chain: Chain) -> Operator:
    operator = chain.compose()
    assert isinstance(operator, Operator), operator
    return operator


def weight_error(chain: Chain, operator: Operator) -> float:
    return relative_error(composed(chain).weight, operator.weight)


def test_each_method_accepts_several_cases() -> None:
    counts = {name: sum(method.name == name for _, method in FITS) for name in FACTORIZATIONS}
    assert min(counts.values()) >= 8, counts


def test_each_method_has_its_own_name_and_named_ranks() -> None:
    for name, method in FACTORIZATIONS.items():
        assert method.name == name
        assert named(name) is method
        case = next(case for case, other in FITS if other is method)
        names = method.rank_names(tuple(case.operator.kernel.shape))
        assert len(set(names)) == len(names) == len(method.max_ranks(case.operator)) >= 1


def test_what_no_method_accepts_has_nothing_to_factor() -> None:
    for case in CASES:
        _, rows, columns, *size = case.operator.kernel.shape
        nothing = min(rows, columns * torch.Size(size).numel()) == 1 and sum(k > 1 for k in size) < 2
        assert isinstance(fitting(case.operator), Refusal) == nothing, case.id


@each(UNFIT)
def test_a_refusal_has_a_reason_and_factor_raises_it(case: Case, method: Factorization) -> None:
    refusal = method.refuse(case.operator)
    assert isinstance(refusal, Refusal)
    assert len(refusal.reason) > 10
    assert fitting(case.operator, method.name) == Refusal(f"{method.name}: {refusal.reason}")
    with pytest.raises(InputError) as raised:
        method.factor(case.operator, (1,))
    assert refusal.reason in str(raised.value)


@each(FITS)
def test_full_rank_is_the_identity(case: Case, method: Factorization) -> None:
    chain = factor(method, case.operator, method.max_ranks(case.operator))
    x = case.inputs()
    assert_close(chain(x), case.operator(x), slack(case, chain))
    assert fitting(case.operator, method.name) == [method]
    assert (method in fitting(case.operator)) == method.automatic


@each(FITS)
def test_only_the_last_operator_has_the_bias(case: Case, method: Factorization) -> None:
    chain = factor(method, case.operator, halved(method.max_ranks(case.operator)))
    biases = [part.bias for _, part in chain.places if part.bias is not None]
    assert len(biases) == (case.operator.bias is not None)
    assert chain.bias is (biases[0] if biases else None)
    if case.operator.bias is not None:
        assert torch.equal(chain.bias, case.operator.bias)


@each(FITS)
def test_factors_can_be_saved_and_trained(case: Case, method: Factorization) -> None:
    chain = factor(method, case.operator, halved(method.max_ranks(case.operator)))
    for operator in chain.operators:
        assert operator.weight.is_contiguous()
        assert operator.weight.untyped_storage().nbytes() == operator.weight.nbytes
        assert operator.weight.dtype == case.dtype
        assert not operator.weight.requires_grad
        assert bool(torch.isfinite(operator.weight).all())


@each(FITS)
def test_composition_is_the_chain(case: Case, method: Factorization) -> None:
    x = case.inputs()
    for _, chain in chains(method, case.operator, rank_choices(method, case.operator)):
        operator = composed(chain)
        assert_close(operator(x), chain(x), slack(case, chain) * cancelling(method, chain, operator))


@each(FITS)
def test_composition_has_the_original_form(case: Case, method: Factorization) -> None:
    original = case.operator
    for _, chain in chains(method, original, rank_choices(method, original)):
        operator = composed(chain)
        assert type(operator) is type(original)
        assert operator.weight.shape == original.weight.shape
        assert (operator.bias is None) == (original.bias is None)
        if original.bias is not None:
            assert torch.equal(operator.bias, original.bias)
        if isinstance(original, Conv):
            assert operator.groups == original.groups
            assert operator.geometry == original.geometry


@each(FITS)
def test_composition_at_full_rank_is_the_original_weight(case: Case, method: Factorization) -> None:
    chain = factor(method, case.operator, method.max_ranks(case.operator))
    assert_close(composed(chain).weight, case.operator.weight, slack(case, chain))


@each(FITS)
def test_costs_are_what_is_counted(case: Case, method: Factorization) -> None:
    for _, chain in chains(method, case.operator, rank_choices(method, case.operator)):
        tensors = [operator.weight for operator in chain.operators] + [chain.bias] * (chain.bias is not None)
        assert chain.parameters == sum(tensor.numel() for tensor in tensors)
        with FlopCounterMode(display=False) as counter:
            output = chain(case.inputs())
        assert chain.macs(case.shape) == counter.get_total_flops() // 2
        assert chain.out_shape(case.shape) == output.shape


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_costs_of_the_operator_are_what_is_counted(case: Case) -> None:
    with FlopCounterMode(display=False) as counter:
        case.operator(case.inputs())
    assert case.operator.macs(case.shape) == counter.get_total_flops() // 2


@each(FITS)
def test_the_skeleton_is_the_chain_without_numbers(case: Case, method: Factorization) -> None:
    for ranks, chain in chains(method, case.operator, rank_choices(method, case.operator)):
        skeleton = method.skeleton(case.operator, ranks)
        assert skeleton.parameters == chain.parameters
        assert skeleton.macs(case.shape) == chain.macs(case.shape)
        assert skeleton.out_shape(case.shape) == chain.out_shape(case.shape)
        assert [type(step) for step in skeleton.steps] == [type(step) for step in chain.steps]
        for empty, operator in zip(skeleton.operators, chain.operators, strict=True):
            assert empty.weight.is_meta
            assert (empty.weight.shape, empty.weight.dtype) == (operator.weight.shape, operator.weight.dtype)
            assert getattr(empty, "geometry", None) == getattr(operator, "geometry", None)


@each(FITS)
def test_spectra_are_the_singular_values_of_the_unfoldings(case: Case, method: Factorization) -> None:
    unfoldings = method.unfoldings(case.operator.kernel)
    for matrix, spectrum in zip(unfoldings, method.spectra(case.operator), strict=True):
        assert (spectrum.rows, spectrum.columns) == matrix.shape[-2:]
        assert spectrum.values.shape == (matrix.shape[0], min(matrix.shape[-2:]))
        energy = torch.linalg.vector_norm(matrix.double())
        torch.testing.assert_close(torch.linalg.vector_norm(spectrum.pooled), energy, rtol=1e-12, atol=0)
        expected = torch.linalg.svdvals(matrix.double())
        torch.testing.assert_close(spectrum.values, expected, rtol=0, atol=1e-7 * float(energy))


def paths(full: Ranks) -> Iterator[list[Ranks]]:
    """Ranks along the diagonal; then along each mode, with the others halved."""
    yield [tuple(min(r, m) for m in full) for r in spread(max(full))]
    half = halved(full)
    for i in range(len(full) if len(full) > 1 else 0):
        yield [(*half[:i], r, *half[i + 1 :]) for r in spread(full[i])]


def spread(limit: int, most: int = 12) -> list[int]:
    """All whole numbers from 1 to a limit or, of many, an even choice with both ends."""
    return sorted({1 + round(i * (limit - 1) / (most - 1)) for i in range(most)})


@each(EXACT)
def test_error_never_grows_with_rank(case: Case, method: Factorization) -> None:
    allowed = ENERGY_SLACK.get(method.name, ROUNDING)
    for path in paths(method.max_ranks(case.operator)):
        lost = [weight_error(chain, case.operator) ** 2 for _, chain in chains(method, case.operator, path)]
        rises = [after - before for before, after in pairwise(lost)]
        assert max(rises, default=0) <= allowed, (path, lost)


@each(EXACT)
def test_error_is_no_worse_than_tensorlys(case: Case, method: Factorization) -> None:
    for ranks, chain in chains(method, case.operator, rank_choices(method, case.operator)):
        ours = weight_error(chain, case.operator)
        theirs = weight_error(factor(method, case.operator, ranks, solver="tensorly"), case.operator)
        other = OPTIMA.get(method.name, 0.0)
        assert ours <= 1.002 * theirs + other + tolerance(case.dtype, length=reduction(case.operator))


@each(FITS)
def test_every_solver_is_the_identity_at_full_rank(case: Case, method: Factorization) -> None:
    x = case.inputs()
    for solver in method.solvers:
        chain = factor(method, case.operator, method.max_ranks(case.operator), solver=solver)
        assert_close(chain(x), case.operator(x), 3 * slack(case, chain))  # TensorLy's is a full SVD, less accurate


@each(FITS)
def test_all_is_computed_on_the_device_of_the_weight(case: Case, method: Factorization) -> None:
    """What was made on the default device instead could not meet the weight, as on a GPU."""
    with torch.device("meta"):
        for solver in set(method.solvers) - {"tensorly", "gd"}:  # not ours; not of every order
            for ranks in (method.max_ranks(case.operator), halved(method.max_ranks(case.operator))):
                chain = factor(method, case.operator, ranks, solver=solver)
                assert composed(chain).weight.device == case.operator.weight.device
        method.spectra(case.operator)


@each(EXACT)
def test_a_rank_out_of_bounds_names_the_bounds(case: Case, method: Factorization) -> None:
    full = method.max_ranks(case.operator)
    for i, (name, limit) in enumerate(zip(method.rank_names(tuple(case.operator.kernel.shape)), full, strict=True)):
        for wrong in (0, -1, limit + 1):
            with pytest.raises(RankError) as raised:
                method.factor(case.operator, (*full[:i], wrong, *full[i + 1 :]))
            assert f"{name} 1 to {limit}" in str(raised.value)
            assert str(wrong) in str(raised.value)
    for wrong_count in ((), (*full, 1)):
        with pytest.raises(RankError, match=method.name):
            method.factor(case.operator, wrong_count)


@each(EXACT)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_input_error(case: Case, method: Factorization, value: float) -> None:
    weight = case.operator.weight.clone()
    weight.view(-1)[-1] = value
    with pytest.raises(InputError, match="not finite"):
        method.factor(replace(case.operator, weight=weight), method.max_ranks(case.operator))


@pytest.mark.parametrize("method", FACTORIZATIONS.values(), ids=FACTORIZATIONS)
def test_an_unknown_solver_lists_the_known_ones(method: Factorization) -> None:
    case = next(case for case, other in FITS if other is method)
    with pytest.raises(InputError, match=rf"{method.name} has no solver 'magic'; allowed: auto, .*tensorly"):
        method.factor(case.operator, method.max_ranks(case.operator), solver="magic")


def test_an_unknown_factorization_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown factorization 'magic'; allowed: .*tucker"):
        fitting(CASES[0].operator, "magic")


@each(EXACT)
def test_a_zero_weight_gives_a_zero_chain(case: Case, method: Factorization) -> None:
    zero = replace(case.operator, weight=torch.zeros_like(case.operator.weight))
    chain = factor(method, zero, halved(method.max_ranks(zero)))
    assert all(bool(torch.isfinite(operator.weight).all()) for operator in chain.operators)
    assert not composed(chain).weight.any()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@each([(case, method) for case, method in FITS if case.dtype == torch.float32])
def test_the_scale_of_the_weight_does_not_matter(case: Case, method: Factorization, scale: float) -> None:
    half = halved(method.max_ranks(case.operator))
    scaled = replace(case.operator, weight=case.operator.weight * scale)
    expected = weight_error(factor(method, case.operator, half), case.operator)
    assert weight_error(factor(method, scaled, half), scaled) == pytest.approx(
        expected, rel=1e-2, abs=OPTIMA.get(method.name, 1e-6)
    )


def test_tensorlys_own_reconstruction_is_the_composition() -> None:
    import tensorly
    from tensorly.tucker_tensor import tucker_to_tensor

    tensorly.set_backend("pytorch")
    case = next(case for case in CASES if case.id == "conv2d-3x3")
    chain = factor(named("tucker"), case.operator, (4, 3), solver="tensorly")
    reduce, core, expand = (operator.weight for operator in chain.operators)
    factors = [expand[:, :, 0, 0], reduce[:, :, 0, 0].mT, torch.eye(3).double(), torch.eye(3).double()]
    assert_close(composed(chain).weight, tucker_to_tensor((core, factors)), tolerance(case.dtype, length=27))


def test_tensorlys_own_truncation_is_the_composition() -> None:
    import tensorly

    tensorly.set_backend("pytorch")
    case = next(case for case in CASES if case.id == "conv2d-3x3")
    left, values, right = tensorly.tenalg.svd_interface(case.operator.weight.flatten(1), n_eigenvecs=3)
    chain = factor(named("svd"), case.operator, (3,))
    assert_close(composed(chain).weight.flatten(1), (left * values) @ right, tolerance(case.dtype, length=54))
