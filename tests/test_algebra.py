"""The laws of the algebra, over every operator case x every registered factorization.

Each pair is one test, with the laws as its subtests: they share the chains, which take the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from surgery.algebra import Chain, Conv, Operator
from surgery.errors import InputError, RankError, Refusal
from surgery.factorizations import FACTORIZATIONS, Factorization, Ranks, fitting, named
from tests.cases import CASES, Case
from tests.covering import ALL
from tests.fitted import (
    FITS,
    UNFIT,
    chains,
    composed,
    each,
    factor,
    factor_operator,
    halved,
    rank_choices,
    slack,
    weight_error,
)
from tests.tolerances import assert_close, reduction, tolerance

# How much of the energy (squared norm) a larger rank may lose: nothing but rounding for a closed form; for an iterative
# solver the tolerance at which its sweeps stop.
ROUNDING = 1e-12
ENERGY_SLACK = {"tucker": 1e-4, "cp": 1e-5}

# How far, in relative error, a solver may be from another one that ends in another optimum: CP has several, and where
# its components would grow and cancel, a ridge holds ours back.
OPTIMA = {"cp": 5e-3}

Law = Callable[[Case, Factorization], None]
LAWS: dict[str, list[Law]] = {"all": [], "float64": [], "float32": []}


def law(dtypes: str = "all") -> Callable[[Law], Law]:
    """Add a law for the pairs of these dtypes."""

    def add(check: Law) -> Law:
        LAWS[dtypes].append(check)
        return check

    return add


@each(FITS, all_of_them=True)
def test_the_laws_of_a_pair(case: Case, method: Factorization, subtests: pytest.Subtests) -> None:
    for check in LAWS["all"] + LAWS.get(str(case.dtype).removeprefix("torch."), []):
        with subtests.test(check.__name__):
            check(case, method)


def cancelling(method: Factorization, chain: Chain, operator: Operator) -> float:
    """How much larger the components of a CP, each of which is rounded, are than their sum; 1 for other methods."""
    if method.name != "cp" or len(chain.operators) < 3:
        return 1.0
    first, *extents, last = (step.kernel.double().flatten(3) for step in chain.operators)
    norms = first.norm(dim=(2, 3)).flatten() * last.norm(dim=(1, 3)).flatten()
    for extent in extents:
        norms = norms * extent.flatten(1).norm(dim=1)
    return max(1.0, float(norms.norm() / operator.kernel.double().norm()))


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


@pytest.mark.parametrize("method", FACTORIZATIONS.values(), ids=FACTORIZATIONS)
def test_a_refusal_has_a_reason_and_factor_raises_it(method: Factorization, subtests: pytest.Subtests) -> None:
    for case in [case for case, other in UNFIT if other is method]:
        with subtests.test(case.id):
            refusal = method.refuse(case.operator)
            assert isinstance(refusal, Refusal)
            assert len(refusal.reason) > 10
            assert fitting(case.operator, method.name) == Refusal(f"{method.name}: {refusal.reason}")
            with pytest.raises(InputError) as raised:
                method.factor(case.operator, (1,))
            assert refusal.reason in str(raised.value)


@law()
def full_rank_is_the_identity(case: Case, method: Factorization) -> None:
    chain = factor(case, method, method.max_ranks(case.operator))
    x = case.inputs()
    assert_close(chain(x), case.operator(x), slack(case, chain))
    assert fitting(case.operator, method.name) == [method]
    automatic = fitting(case.operator)
    assert (not isinstance(automatic, Refusal) and method in automatic) == method.automatic


@law()
def only_the_last_operator_has_the_bias(case: Case, method: Factorization) -> None:
    chain = factor(case, method, halved(method.max_ranks(case.operator)))
    biases = [part.bias for _, part in chain.places if part.bias is not None]
    assert len(biases) == (case.operator.bias is not None)
    assert chain.bias is (biases[0] if biases else None)
    if case.operator.bias is not None:
        assert chain.bias is not None
        assert torch.equal(chain.bias, case.operator.bias)


@law()
def factors_can_be_saved_and_trained(case: Case, method: Factorization) -> None:
    chain = factor(case, method, halved(method.max_ranks(case.operator)))
    for operator in chain.operators:
        assert operator.weight.is_contiguous()
        assert operator.weight.untyped_storage().nbytes() == operator.weight.nbytes
        assert operator.weight.dtype == case.dtype
        assert not operator.weight.requires_grad
        assert bool(torch.isfinite(operator.weight).all())


@law()
def composition_is_the_chain(case: Case, method: Factorization) -> None:
    x = case.inputs()
    for _, chain in chains(case, method, rank_choices(method, case.operator)):
        operator = composed(chain)
        assert_close(operator(x), chain(x), slack(case, chain) * cancelling(method, chain, operator))


@law()
def composition_has_the_original_form(case: Case, method: Factorization) -> None:
    original = case.operator
    for _, chain in chains(case, method, rank_choices(method, original)):
        operator = composed(chain)
        assert type(operator) is type(original)
        assert operator.weight.shape == original.weight.shape
        assert (operator.bias is None) == (original.bias is None)
        if original.bias is not None:
            assert operator.bias is not None
            assert torch.equal(operator.bias, original.bias)
        if isinstance(original, Conv):
            assert isinstance(operator, Conv)
            assert operator.groups == original.groups
            assert operator.geometry == original.geometry


@law()
def composition_at_full_rank_is_the_original_weight(case: Case, method: Factorization) -> None:
    chain = factor(case, method, method.max_ranks(case.operator))
    assert_close(composed(chain).weight, case.operator.weight, slack(case, chain))


@law()
def costs_are_what_is_counted(case: Case, method: Factorization) -> None:
    for _, chain in chains(case, method, rank_choices(method, case.operator)):
        tensors = [operator.weight for operator in chain.operators] + ([] if chain.bias is None else [chain.bias])
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


@law()
def the_skeleton_is_the_chain_without_numbers(case: Case, method: Factorization) -> None:
    for ranks, chain in chains(case, method, rank_choices(method, case.operator)):
        skeleton = method.skeleton(case.operator, ranks)
        assert skeleton.parameters == chain.parameters
        assert skeleton.macs(case.shape) == chain.macs(case.shape)
        assert skeleton.out_shape(case.shape) == chain.out_shape(case.shape)
        assert [type(step) for step in skeleton.steps] == [type(step) for step in chain.steps]
        for empty, operator in zip(skeleton.operators, chain.operators, strict=True):
            assert empty.weight.is_meta
            assert (empty.weight.shape, empty.weight.dtype) == (operator.weight.shape, operator.weight.dtype)
            assert getattr(empty, "geometry", None) == getattr(operator, "geometry", None)


@law()
def spectra_are_the_singular_values_of_the_unfoldings(case: Case, method: Factorization) -> None:
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


def spread(limit: int) -> list[int]:
    """The ends, the middle and one more, most of them solved for other laws too; or up to twelve, evenly chosen."""
    if ALL:
        return sorted({1 + round(i * (limit - 1) / 11) for i in range(12)})
    return sorted({1, (limit + 1) // 2, (3 * limit + 3) // 4, limit})


@law("float64")
def error_never_grows_with_rank(case: Case, method: Factorization) -> None:
    allowed = ENERGY_SLACK.get(method.name, ROUNDING)
    for path in paths(method.max_ranks(case.operator)):
        lost = [weight_error(chain, case.operator) ** 2 for _, chain in chains(case, method, path)]
        rises = [after - before for before, after in pairwise(lost)]
        assert max(rises, default=0) <= allowed, (path, lost)


@law("float64")
def error_is_no_worse_than_tensorlys(case: Case, method: Factorization) -> None:
    for ranks, chain in chains(case, method, rank_choices(method, case.operator)):
        ours = weight_error(chain, case.operator)
        theirs = weight_error(factor(case, method, ranks, solver="tensorly"), case.operator)
        other = OPTIMA.get(method.name, 0.0)
        assert ours <= 1.002 * theirs + other + tolerance(case.dtype, length=reduction(case.operator))


@law()
def every_solver_is_the_identity_at_full_rank(case: Case, method: Factorization) -> None:
    x = case.inputs()
    for solver in method.solvers:
        chain = factor(case, method, method.max_ranks(case.operator), solver=solver)
        assert_close(chain(x), case.operator(x), 3 * slack(case, chain))  # TensorLy's is a full SVD, less accurate


@law()
def all_is_computed_on_the_device_of_the_weight(case: Case, method: Factorization) -> None:
    """What was made on the default device instead could not meet the weight, as on a GPU."""
    with torch.device("meta"):
        for solver in set(method.solvers) - {"tensorly", "gd"}:  # not ours; not of every order
            full = method.max_ranks(case.operator)
            least = tuple(min(2, rank) for rank in full)  # few sweeps, and all tensors that there are
            for ranks in (full, halved(full)) if ALL else (least,):
                chain = factor_operator(method, case.operator, ranks, solver=solver)
                assert composed(chain).weight.device == case.operator.weight.device
        method.spectra(case.operator)


@law("float64")
def a_rank_out_of_bounds_names_the_bounds(case: Case, method: Factorization) -> None:
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


@law("float64")
def a_weight_that_is_not_finite_is_an_input_error(case: Case, method: Factorization) -> None:
    for value in (float("nan"), float("inf")):
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


@law("float64")
def a_zero_weight_gives_a_zero_chain(case: Case, method: Factorization) -> None:
    zero = replace(case.operator, weight=torch.zeros_like(case.operator.weight))
    chain = factor_operator(method, zero, halved(method.max_ranks(zero)))
    assert all(bool(torch.isfinite(operator.weight).all()) for operator in chain.operators)
    assert not composed(chain).weight.any()


@law("float32")
def the_scale_of_the_weight_does_not_matter(case: Case, method: Factorization) -> None:
    half = halved(method.max_ranks(case.operator))
    expected = weight_error(factor(case, method, half), case.operator)
    for scale in (1e-30, 1e30):
        scaled = replace(case.operator, weight=case.operator.weight * scale)
        found = weight_error(factor_operator(method, scaled, half), scaled)
        assert found == pytest.approx(expected, rel=1e-2, abs=OPTIMA.get(method.name, 1e-6))


def test_tensorlys_own_reconstruction_is_the_composition() -> None:
    import tensorly
    from tensorly.tucker_tensor import tucker_to_tensor

    tensorly.set_backend("pytorch")
    case = next(case for case in CASES if case.id == "conv2d-3x3")
    chain = factor(case, named("tucker"), (4, 3), solver="tensorly")
    reduce, core, expand = (operator.weight for operator in chain.operators)
    factors = [expand[:, :, 0, 0], reduce[:, :, 0, 0].mT, torch.eye(3).double(), torch.eye(3).double()]
    assert_close(composed(chain).weight, tucker_to_tensor((core, factors)), tolerance(case.dtype, length=27))


def test_tensorlys_own_truncation_is_the_composition() -> None:
    import tensorly

    tensorly.set_backend("pytorch")
    case = next(case for case in CASES if case.id == "conv2d-3x3")
    left, values, right = tensorly.tenalg.svd_interface(case.operator.weight.flatten(1), n_eigenvecs=3)
    chain = factor(case, named("svd"), (3,))
    assert_close(composed(chain).weight.flatten(1), (left * values) @ right, tolerance(case.dtype, length=54))
