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

The constants below are not from the paper, which proves bounds. They were chosen by experiment on planted tensors.
Tensors are scaled so that the least spectral norm of their unfoldings is 1. The penalty falls linearly to 0, and leaves
no bias.

Then near-parallel components are merged, the r largest are kept, and alternating least squares (ALS) polishes them.
Gradients have closed forms, in the matricised tensor times Khatri-Rao product (MTTKRP) and m x m Gram matrices. A step
costs about 4 m n_1 ... n_N operations. Nothing is exact: the answer is a local optimum.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from surgery.errors import InputError
from surgery.solvers.components import (
    balanced,
    check_components,
    merged,
    mttkrp,
    normalised_vectors,
    other_grams,
    product,
    reduce_rank,
    scaled,
    unit_scaled,
)

__all__ = ["Method", "descend", "gradient_cp", "symmetric_cp"]

Method = Literal["overparameterized", "plain"]

_EPOCHS, _STEPS = 20, 100
_START, _PLAIN_START = 1e-3, 0.3  # norms of the vectors
_FREEZE = 0.5  # the size from which on c stays
_SMALL = 0.05  # the size below which a component is drawn anew
_PENALTY = 0.1
_RATE = 1.6  # over the curvature of one component of weight 1 that has been frozen
_SETTLING = 1000  # steps of the symmetric form's end


@dataclass(frozen=True)
class _Schedule:
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
        return product(norms) ** (1 / len(norms))

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
    components = check_components(tensor, rank, components)
    return reduce_rank(tensor, descend(tensor, components, epochs=epochs, seed=seed), rank)


def descend(
    tensor: Tensor, components: int, *, epochs: int = _EPOCHS, method: Method = "overparameterized", seed: int = 0
) -> list[Tensor]:
    """Return factors (g, n_k, components) found by gradient descent alone, neither merged nor polished.

    ``method`` "plain" is descent on the squared error alone: no penalty, c = 1, nothing is drawn anew, vectors
    that start with norm 0.3; rate and number of steps are the same. (Of starts from 0.001 to 1, those of 0.1 and 0.3
    recover the most planted tensors, one or the other by kind and order.) Raises as ``gradient_cp`` does.
    """
    check_components(tensor, components, components)
    unit, norm = unit_scaled(tensor)
    found = _run(unit, _Schedule(components, epochs, method, symmetric=False, seed=seed))
    return scaled(balanced(_joined(found)), norm)


def symmetric_cp(
    tensor: Tensor, rank: int, *, components: int | None = None, method: Method = "overparameterized", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Return unit vectors (g, n, rank) and weights (g, rank) of a symmetric tensor (g, n, ..., n) of order 3 or 4.

    The tensor is about the sum of ``weight u o ... o u``: the form of which the paper's theorem speaks. ``method`` is
    as in ``descend``; either ends in plain descent on the merged ``rank`` components. Raises as ``gradient_cp`` does,
    and InputError where the sizes of the modes differ; symmetry itself is not checked.
    """
    components = check_components(tensor, rank, components)
    if len(set(tensor.shape[1:])) > 1:
        raise InputError(f"modes of sizes {tuple(tensor.shape[1:])} cannot be symmetric", allowed="equal sizes")
    unit, norm = unit_scaled(tensor)
    found = _run(unit, _Schedule(components, _EPOCHS, method, symmetric=True, seed=seed))
    # The first factor holds the weights. Where it is opposite to another mode's vector, the weight is negative.
    first, *_, vectors = merged(_joined(found), rank)
    signs = (first * vectors).sum(1).sign()
    ones = torch.ones_like(signs)
    kept = _Components([vectors] * (tensor.ndim - 1), signs, ones, ones > 0, symmetric=True)
    for _ in range(_SETTLING):
        kept = _step(unit, kept, 0.0)
    weights = kept.signs * kept.sizes() ** (tensor.ndim - 1) * norm[:, 0]
    return normalised_vectors(kept.factors[0]), weights


def _draw(tensor: Tensor, recipe: _Schedule, generator: torch.Generator) -> _Components:
    """Draw vectors on small spheres, the same for all modes where symmetric."""
    order, plain = tensor.ndim - 1, recipe.method == "plain"
    radius = _PLAIN_START if plain else _START

    def normal(*shape: int) -> Tensor:
        return torch.randn(len(tensor), *shape, recipe.count, generator=generator, dtype=torch.float64, device="cpu")

    sizes = tensor.shape[1:2] if recipe.symmetric else tensor.shape[1:]
    factors = [(radius * normalised_vectors(normal(size))).to(tensor) for size in sizes]
    ones = torch.ones_like(factors[0][:, 0])
    signs = normal().sign().to(ones) if recipe.symmetric else ones
    factors = factors * (order // len(factors))
    return _Components(factors, signs, ones, torch.full_like(ones, plain, dtype=torch.bool), recipe.symmetric)


def _run(tensor: Tensor, recipe: _Schedule) -> _Components:
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
    """Take one step of gradient descent with the c held; the c that are not frozen follow the sizes first."""
    # Invariant: a component that is not frozen has c = 1 / size, so that c^(N-2) size^N = size^2: it is 2-homogeneous.
    # Example for N = 3: vectors of norm 0.1 have c = 10, and the component weighs 10 * 0.1^3 = 0.01 = 0.1^2.
    # A component of weight 1 that froze at size f has c = 1/f, so that its size s is f^((N-2)/N). Growing in all modes
    # at once it has the curvature N / s^2, which the rate is measured by. For N = 3, f = 1/2: 4.76, and a rate of 0.34.
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
        fitted = (factor * weights) @ other_grams(found.factors, mode)
        factors.append(factor * (1 - rate * penalty) + rate * weights * (target - fitted))
    return replace(found, factors=factors * (order // len(factors)))


def _joined(found: _Components) -> list[Tensor]:
    return [found.factors[0] * found.coefficients()[:, None], *found.factors[1:]]
