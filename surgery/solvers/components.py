"""CP components of a batch of tensors of order 3 or 4: contractions with them, and from many to few.

    T (g, n_1, ..., n_N)  ~  sum_i  u_i^(1) o ... o u_i^(N)        factors (g, n_k, m)

The matricised tensor times Khatri-Rao product (MTTKRP) of mode k is the tensor contracted with the vectors of all other
modes. The normal matrix of a least-squares update is the entrywise product of the other modes' m x m Gram matrices. To
reduce m components to r, near-parallel ones are merged, the r largest are kept, and alternating least squares (ALS)
polishes them. It is damped, so that no sweep raises the error and no component explodes. A sweep costs
2 N r n_1 ... n_N.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from surgery.errors import InputError, RankError
from surgery.solvers.gram import singular_values

__all__ = [
    "balanced",
    "check_components",
    "merged",
    "mttkrp",
    "other_grams",
    "product",
    "reduce_rank",
    "scaled",
    "normalised_vectors",
    "unit_scaled",
]

_ORDERS = (3, 4)
_TIMES_RANK = 3  # components for each of the rank
_PARALLEL = 0.8  # the product of cosines from which on two components are one
_DAMPING = 1e-6  # of the mean diagonal of the Gram matrix; keeps components from exploding and cancelling
_FLOOR = 1e-100  # of the damping, where a tensor is 0
_ENTRIES = 1 << 26  # of the largest intermediate


def reduce_rank(tensor: Tensor, factors: list[Tensor], rank: int, *, sweeps: int = 50) -> list[Tensor]:
    """Return ``rank`` of the components of factors (g, n_k, m), near-parallel ones merged, after ``sweeps`` of ALS.

    The computation is in float64, and damped so that no sweep raises the error. The result is balanced, in the tensor's
    dtype.
    """
    check_components(tensor, rank, factors[0].shape[-1])
    unit, norm = unit_scaled(tensor.double())
    kept = merged(scaled([factor.double() for factor in factors], 1 / norm), rank)
    for _ in range(sweeps):
        kept = _sweep(unit, kept)
    return [factor.to(tensor.dtype) for factor in scaled(kept, norm)]


def mttkrp(tensor: Tensor, factors: list[Tensor], modes: Iterable[int], *, entries: int = _ENTRIES) -> list[Tensor]:
    """Return for each mode (from 0) the (g, n_k, m) of the tensor contracted with the vectors of all other modes.

    The number of components computed at once is such that no intermediate has more than ``entries`` entries, unless
    that of a single component has more.
    """
    at_once = max(1, entries // tensor[:, 0].numel())
    chunks = list(zip(*(factor.split(at_once, dim=-1) for factor in factors), strict=True))
    modes = list(modes)
    results = [_mttkrp(tensor.flatten(2), chunk, modes) for chunk in chunks]
    return [torch.cat(parts, dim=-1) for parts in zip(*results, strict=True)]


def _mttkrp(unfolding: Tensor, factors: tuple[Tensor, ...], modes: list[int]) -> list[Tensor]:
    # Invariant: ``contracted`` is (g, n_2, ..., n_N, m), the tensor without its first mode, which the other modes
    # share. Example of order 3: mode 2 needs sum_(i,k) T_ijk a_i c_k. ``contracted`` has sum_i T_ijk a_i, and what is
    # left is to multiply by c_k and to sum over k.
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
        # The last mode first: a sum over axis k + 1 leaves the axes in front of it where they are.
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
    # The last mode runs fastest, as in ``flatten``. Example of 2 x 3: rows a0 b0, a0 b1, a0 b2, a1 b0, ...
    product = factors[0]
    for factor in factors[1:]:
        product = (product[:, :, None] * factor[:, None]).flatten(1, 2)
    return product


def _sweep(tensor: Tensor, factors: list[Tensor]) -> list[Tensor]:
    """Solve for each mode in turn, with a penalty on the distance from where it was."""
    # A minimises |T - model|^2 + d |A - A_before|^2: A (G + d I) = M + d A_before. As A_before is among the candidates,
    # the error of the minimum is no larger than its error.
    factors = list(factors)
    for mode in range(len(factors)):
        gram = other_grams(factors, mode)
        damping = _DAMPING * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] + _FLOOR
        target = mttkrp(tensor, factors, [mode])[0] + damping * factors[mode]
        system = gram + damping * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        factors[mode] = torch.linalg.solve(system, target.mT).mT
        factors = balanced(factors)
    return factors


def merged(factors: list[Tensor], rank: int) -> list[Tensor]:
    """Keep the largest ``rank`` components, after each has taken over the weights of smaller ones parallel to it."""
    # Invariant: a component is ``taken`` if a larger one is parallel to it; its weight counts there, with the sign of
    # the cosine, and hardly any is left to itself. Example: weights 3, 2 and 1, the first two opposite: 1, about 0, 1.
    weights = product(torch.linalg.vector_norm(factor, dim=1) for factor in factors)
    units = [normalised_vectors(factor) for factor in factors]
    cosines = product(unit.mT @ unit for unit in units)
    # The second ``argsort`` inverts the first: weights 3, 5, 4 have the places 2, 0, 1.
    place = weights.argsort(dim=1, descending=True).argsort(dim=1)
    parallel = cosines.abs() > _PARALLEL
    taken = (parallel & (place[:, None] < place[:, :, None])).any(-1)
    gathered = (torch.where(parallel, cosines.sign(), 0) * weights[:, None]).sum(-1)
    least = torch.finfo(weights.dtype).eps
    chosen = torch.where(taken, least * weights, gathered.abs()).topk(rank, dim=1).indices
    weight = torch.where(taken, least * weights, gathered).gather(1, chosen)
    kept = [unit.gather(2, chosen[:, None].expand(-1, unit.shape[1], -1)) for unit in units]
    return balanced([kept[0] * weight[:, None], *kept[1:]])


def product(tensors: Iterable[Tensor]) -> Tensor:
    """Return the entrywise product."""
    first, *others = tensors
    for other in others:
        first = first * other
    return first


def other_grams(factors: list[Tensor], mode: int) -> Tensor:
    """Return the entrywise product (g, m, m) of the Gram matrices of all other modes."""
    return product(factor.mT @ factor for k, factor in enumerate(factors) if k != mode)


def check_components(tensor: Tensor, rank: int, components: int | None) -> int:
    """Return the number of components, by default three times the rank; raise InputError or RankError for bad ones."""
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


def unit_scaled(tensor: Tensor) -> tuple[Tensor, Tensor]:
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


def normalised_vectors(vectors: Tensor) -> Tensor:
    """Return vectors (g, n, m) of norm 1, or 0."""
    return torch.nn.functional.normalize(vectors, dim=1, eps=torch.finfo(vectors.dtype).tiny)


def balanced(factors: list[Tensor]) -> list[Tensor]:
    """Return the same components with the same norm in every mode."""
    norms = [torch.linalg.vector_norm(factor, dim=1, keepdim=True) for factor in factors]
    common = product(norm ** (1 / len(norms)) for norm in norms)
    return [normalised_vectors(factor) * common for factor in factors]


def scaled(factors: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Return components (g, n_k, m) of ``scale`` (g, 1, 1) times the tensor."""
    root = scale ** (1 / len(factors))
    return [factor * root for factor in factors]
