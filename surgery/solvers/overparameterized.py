"""CP decomposition of a batch of tensors by gradient descent on more components than the rank.

T (g, n_1, ..., n_N), N = 3 or 4, is fitted by m >= r components, each a product of one vector of every mode:

    T ~ sum_i a_i c_i^(N-2) u_i^(1) o ... o u_i^(N)        loss: 1/2 ||T - sum||^2 + penalty/2 sum_i ||u_i||^2

after Wang et al. 2020, "Beyond Lazy Training for Over-parameterized Tensor Decomposition" (arXiv 2010.11356), who prove
for symmetric tensors that m polynomial in r suffices, where plain descent can end in local minima. Its ingredients are:

- Vectors start tiny and at random. While a component is small, ``c_i`` is 1 over its size (the geometric mean of its
  vectors' norms), so that it is 2-homogeneous in the vectors: it grows at a rate that depends on its direction alone,
  and turns meanwhile to where the residual is largest.
- Once a component is large its ``c_i`` is frozen, and it is N-homogeneous from then on.
- The penalty shrinks components that explain nothing; what is still small at the start of an epoch is drawn anew.
- In the symmetric form all modes share their vectors, and random signs ``a_i`` stay fixed. Elsewhere ``a_i`` is 1.

No constant below is the paper's, which proves bounds. They were chosen by experiment on planted tensors, scaled as all
are so that the least spectral norm of their unfoldings is 1. The penalty falls linearly to 0, and leaves no bias.

Then near-parallel components are merged, the r largest kept, and alternating least squares (ALS) polishes them.
Gradients are closed forms: of the matricised tensor times Khatri-Rao product (MTTKRP) and of m x m Gram matrices. A
step costs about 4 m n_1 ... n_N operations. Nothing is exact: the answer is a local optimum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from surgery.errors import InputError, RankError
from surgery.solvers.gram import singular_values

__all__ = ["Method", "descend", "gradient_cp", "mttkrp", "reduce_rank", "symmetric_cp"]

Method = Literal["overparameterized", "plain"]

_ORDERS = (3, 4)
_TIMES_RANK = 3  # components for each of the rank
_EPOCHS, _STEPS = 20, 100
_START, _PLAIN_START = 1e-3, 0.3  # norms of the vectors
_FREEZE = 0.5  # the size from which on c stays
_SMALL = 0.05  # the size below which a component is drawn anew
_PENALTY = 0.1
_RATE = 1.6  # over the curvature of one component of weight 1 that has been frozen
_PARALLEL = 0.8  # the product of cosines from which on two components are one
_SWEEPS = 50
_DAMPING = 1e-6  # of the mean diagonal of the Gram matrix; keeps components from exploding and cancelling
_FLOOR = 1e-100  # of the damping, where a tensor is 0
_SETTLING = 1000  # steps of the symmetric form's end
_ENTRIES = 1 << 26  # of the largest intermediate


@dataclass(frozen=True)
class _Recipe:
    count: int
    epochs: int
    method: Method
    symmetric: bool
    seed: int


@dataclass(frozen=True)
class _Components:
    factors: list[Tensor]  # (g, n_k, m)
    signs: Tensor  # (g, m), the a
    scales: Tensor  # (g, m), the c
    frozen: Tensor  # (g, m)
    symmetric: bool

    def sizes(self) -> Tensor:
        norms = [torch.linalg.vector_norm(factor, dim=1) for factor in self.factors]
        return _product(norms) ** (1 / len(norms))

    def coefficients(self) -> Tensor:
        return self.signs * self.scales ** (len(self.factors) - 2)


def gradient_cp(
    tensor: Tensor, rank: int, *, components: int | None = None, epochs: int = _EPOCHS, seed: int = 0
) -> list[Tensor]:
    """Return the factors (g, n_1, rank), ..., (g, n_N, rank) of a tensor (g, n_1, ..., n_N), N = 3 or 4, in its dtype.

    The method of Wang et al. 2020 with ``components`` (by default three times the rank) for ``epochs`` of 100 steps,
    then ``reduce_rank``. Norms are balanced between modes. Raises InputError for another order, dtype or number of
    components, and RankError for a rank below 1.

    >>> import torch
    >>> [tuple(factor.shape) for factor in gradient_cp(torch.ones(1, 4, 3, 2), 1, epochs=2)]
    [(1, 4, 1), (1, 3, 1), (1, 2, 1)]
    """
    components = _check(tensor, rank, components)
    return reduce_rank(tensor, descend(tensor, components, epochs=epochs, seed=seed), rank)


def descend(
    tensor: Tensor, components: int, *, epochs: int = _EPOCHS, method: Method = "overparameterized", seed: int = 0
) -> list[Tensor]:
    """Return factors (g, n_k, components) found by gradient descent alone, neither merged nor polished.

    ``method`` "plain" is descent on the squared error alone: no penalty, c = 1, nothing is drawn anew, vectors
    that start with norm 0.3; rate and number of steps are the same. (Of starts from 0.001 to 1, those of 0.1 and 0.3
    recover the most planted tensors, one or the other by kind and order.) Raises as ``gradient_cp`` does.
    """
    _check(tensor, components, components)
    unit, norm = _normalised(tensor)
    found = _run(unit, _Recipe(components, epochs, method, symmetric=False, seed=seed))
    return _scaled(_balanced(_joined(found)), norm)


def symmetric_cp(
    tensor: Tensor, rank: int, *, components: int | None = None, method: Method = "overparameterized", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return unit vectors (g, n, rank) and weights (g, rank) of a symmetric tensor (g, n, ..., n) of order 3 or 4.

    The tensor is about the sum of ``weight u o ... o u``: the form of which the paper's theorem speaks. ``method`` is
    as in ``descend``; either ends in plain descent on the merged ``rank`` components. Raises as ``gradient_cp`` does,
    and InputError where the sizes of the modes differ; symmetry itself is not checked.
    """
    components = _check(tensor, rank, components)
    if len(set(tensor.shape[1:])) > 1:
        raise InputError(f"modes of sizes {tuple(tensor.shape[1:])} cannot be symmetric", allowed="equal sizes")
    unit, norm = _normalised(tensor)
    found = _run(unit, _Recipe(components, _EPOCHS, method, symmetric=True, seed=seed))
    first, *_, vectors = _merged(_joined(found), rank)
    signs = (first * vectors).sum(1).sign()
    ones = torch.ones_like(signs)
    kept = _Components([vectors] * (tensor.ndim - 1), signs, ones, ones > 0, symmetric=True)
    for _ in range(_SETTLING):
        kept = _step(unit, kept, 0.0)
    weights = kept.signs * kept.sizes() ** (tensor.ndim - 1) * norm[:, 0]
    return _unit(kept.factors[0]), weights


def reduce_rank(tensor: Tensor, factors: list[Tensor], rank: int) -> list[Tensor]:
    """Return ``rank`` of the components of factors (g, n_k, m), near-parallel ones merged, after 50 sweeps of ALS.

    Computed in float64 and damped, so that no sweep raises the error; given back balanced, in the tensor's dtype.
    """
    _check(tensor, rank, factors[0].shape[-1])
    unit, norm = _normalised(tensor.double())
    kept = _merged(_scaled([factor.double() for factor in factors], 1 / norm), rank)
    for _ in range(_SWEEPS):
        kept = _sweep(unit, kept)
    return [factor.to(tensor.dtype) for factor in _scaled(kept, norm)]


def mttkrp(tensor: Tensor, factors: list[Tensor], modes: Iterable[int]) -> list[Tensor]:
    """Return for each mode (from 0) the (g, n_k, m) of the tensor contracted with the vectors of all other modes.

    Computed for so many components at once that no intermediate has more than 2^26 entries (or one component's).
    """
    at_once = max(1, _ENTRIES // tensor[:, 0].numel())
    chunks = list(zip(*(factor.split(at_once, dim=-1) for factor in factors), strict=True))
    modes = list(modes)
    results = [_mttkrp(tensor.flatten(2), chunk, modes) for chunk in chunks]
    return [torch.cat(parts, dim=-1) for parts in zip(*results, strict=True)]


def _mttkrp(unfolding: Tensor, factors: tuple[Tensor, ...], modes: list[int]) -> list[Tensor]:
    first, *others = factors
    sizes = [factor.shape[1] for factor in others]
    results, contracted = [], None
    for mode in modes:
        if mode == 0:
            results.append(unfolding @ _khatri_rao(others))
            continue
        if contracted is None:
            contracted = (unfolding.mT @ first).unflatten(1, sizes)
        part = contracted
        for other in reversed(range(len(others))):
            if other != mode - 1:
                part = (part * _along(others[other], other + 1, part.ndim)).sum(other + 1)
        results.append(part)
    return results


def _along(factor: Tensor, dim: int, ndim: int) -> Tensor:
    """Return (g, n, m) as (g, 1, ..., n, ..., 1, m) with n at a dimension."""
    shape = [1] * ndim
    shape[0], shape[dim], shape[-1] = factor.shape
    return factor.view(shape) if factor.is_contiguous() else factor.reshape(shape)


def _khatri_rao(factors: list[Tensor]) -> Tensor:
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None]).flatten(1, 2)
    return product


def _product(tensors: Iterable[Tensor]) -> Tensor:
    first, *others = tensors
    for other in others:
        first = first * other
    return first


def _other_grams(factors: list[Tensor], mode: int) -> Tensor:
    """Return the entrywise product (g, m, m) of the Gram matrices of all other modes."""
    return _product(factor.mT @ factor for k, factor in enumerate(factors) if k != mode)


def _check(tensor: Tensor, rank: int, components: int | None) -> int:
    order = tensor.ndim - 1
    if order not in _ORDERS:
        raise InputError(
            f"a tensor of shape {tuple(tensor.shape)} has order {order} after its batch axis",
            allowed="order 3 or 4",
            next_step="merge or split modes, or take a truncated SVD for a matrix",
        )
    if tensor.dtype not in (torch.float32, torch.float64):
        raise InputError(f"a tensor of {tensor.dtype}", allowed="float32 or float64", next_step="cast it")
    if not tensor.numel():
        raise InputError(f"a tensor of shape {tuple(tensor.shape)} is empty", allowed="sizes of at least 1")
    if not bool(torch.isfinite(tensor).all()):
        raise InputError("a tensor with NaN or infinite entries", allowed="finite entries")
    if rank < 1:
        raise RankError(f"rank {rank}", allowed="1 or more")
    components = _TIMES_RANK * rank if components is None else components
    if components < rank:
        raise InputError(f"{components} components for rank {rank}", allowed=f"{rank} or more")
    return components


def _normalised(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tensor over a norm, and the norm (g, 1, 1): the least spectral norm of its unfoldings.

    It bounds the best rank-1 approximation's weight from above, and is that weight for orthogonal components.
    """
    peak = tensor.abs().flatten(1).amax(1).view(-1, *[1] * (tensor.ndim - 1))
    peak = torch.where(peak > 0, peak, 1)
    scaled = tensor / peak
    unfoldings = [scaled.movedim(mode, 1).flatten(2) for mode in range(1, tensor.ndim)]
    norm = torch.stack([singular_values(unfolding)[:, 0] for unfolding in unfoldings]).amin(0)
    norm = torch.where(norm > 0, norm, 1).to(tensor.dtype).view_as(peak)
    return scaled / norm, (norm * peak).view(-1, 1, 1)


def _draw(tensor: Tensor, recipe: _Recipe, generator: torch.Generator) -> _Components:
    """Draw vectors on small spheres, the same for all modes where symmetric."""
    order, plain = tensor.ndim - 1, recipe.method == "plain"
    radius = _PLAIN_START if plain else _START

    def normal(*shape: int) -> Tensor:
        return torch.randn(len(tensor), *shape, recipe.count, generator=generator, dtype=torch.float64)

    sizes = tensor.shape[1:2] if recipe.symmetric else tensor.shape[1:]
    factors = [(radius * _unit(normal(size))).to(tensor) for size in sizes]
    ones = torch.ones_like(factors[0][:, 0])
    signs = normal().sign().to(ones) if recipe.symmetric else ones
    factors = factors * (order // len(factors))
    return _Components(factors, signs, ones, torch.full_like(ones, plain, dtype=torch.bool), recipe.symmetric)


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=1, eps=torch.finfo(vectors.dtype).tiny)


def _run(tensor: Tensor, recipe: _Recipe) -> _Components:
    generator = torch.Generator().manual_seed(recipe.seed)
    found = _draw(tensor, recipe, generator)
    for epoch in range(recipe.epochs):
        penalty = 0.0
        if recipe.method == "overparameterized":
            penalty = _PENALTY * (1 - (epoch + 1) / recipe.epochs)
            found = _renewed(found, _draw(tensor, recipe, generator)) if epoch else found
        for _ in range(_STEPS):
            found = _step(tensor, found, penalty)
    return found


def _renewed(found: _Components, fresh: _Components) -> _Components:
    small = found.sizes() < _SMALL
    factors = [torch.where(small[:, None], new, old) for new, old in zip(fresh.factors, found.factors, strict=True)]
    signs = torch.where(small, fresh.signs, found.signs)
    return replace(found, factors=factors, signs=signs, frozen=found.frozen & ~small)


def _step(tensor: Tensor, found: _Components, penalty: float) -> _Components:
    """Take one step of gradient descent with the c held, then adapt those that are not frozen."""
    order = len(found.factors)
    rate = _RATE / (order * _FREEZE ** (2 / order * (2 - order)))
    sizes = found.sizes()
    scales = torch.where(found.frozen, found.scales, 1 / sizes.clamp(min=_START**2))
    found = replace(found, scales=scales, frozen=found.frozen | (sizes > _FREEZE))
    weights = found.coefficients()[:, None]
    modes = range(1 if found.symmetric else order)
    targets = mttkrp(tensor, found.factors, modes)
    factors = []
    for mode, target in zip(modes, targets, strict=True):
        factor = found.factors[mode]
        fitted = (factor * weights) @ _other_grams(found.factors, mode)
        factors.append(factor * (1 - rate * penalty) + rate * weights * (target - fitted))
    return replace(found, factors=factors * (order // len(factors)))


def _joined(found: _Components) -> list[Tensor]:
    return [found.factors[0] * found.coefficients()[:, None], *found.factors[1:]]


def _balanced(factors: list[Tensor]) -> list[Tensor]:
    """Return the same components with the same norm in every mode."""
    norms = [torch.linalg.vector_norm(factor, dim=1, keepdim=True) for factor in factors]
    common = _product(norm ** (1 / len(norms)) for norm in norms)
    return [_unit(factor) * common for factor in factors]


def _scaled(factors: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Return components (g, n_k, m) of ``scale`` (g, 1, 1) times the tensor."""
    root = scale ** (1 / len(factors))
    return [factor * root for factor in factors]


def _merged(factors: list[Tensor], rank: int) -> list[Tensor]:
    """Keep the largest ``rank`` components, after each has taken over the weights of smaller ones parallel to it."""
    weights = _product(torch.linalg.vector_norm(factor, dim=1) for factor in factors)
    units = [_unit(factor) for factor in factors]
    cosines = _product(unit.mT @ unit for unit in units)
    place = weights.argsort(dim=1, descending=True).argsort(dim=1)
    parallel = cosines.abs() > _PARALLEL
    taken = (parallel & (place[:, None] < place[:, :, None])).any(-1)
    gathered = (torch.where(parallel, cosines.sign(), 0) * weights[:, None]).sum(-1)
    least = torch.finfo(weights.dtype).eps
    chosen = torch.where(taken, least * weights, gathered.abs()).topk(rank, dim=1).indices
    weight = torch.where(taken, least * weights, gathered).gather(1, chosen)
    kept = [unit.gather(2, chosen[:, None].expand(-1, unit.shape[1], -1)) for unit in units]
    return _balanced([kept[0] * weight[:, None], *kept[1:]])


def _sweep(tensor: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """Solve for each mode in turn, with a penalty on the distance from where it was."""
    factors = list(factors)
    for mode in range(len(factors)):
        gram = _other_grams(factors, mode)
        damping = _DAMPING * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + _FLOOR
        target = mttkrp(tensor, factors, [mode])[0] + damping * factors[mode]
        system = gram + damping * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factors[mode] = torch.linalg.solve(system, target.mT).mT
        factors = _balanced(factors)
    return factors
