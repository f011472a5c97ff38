"""Cutting factors to lower ranks, and their spectra, without the tensor that they stand for.

    core (.., n, ..) = Q (n, m) R        n its mode of the tensor, m the product of its ranks

A core whose mode is larger than the product of its ranks spans at most m directions of the mode. Let Q be an
orthonormal basis of them. With R in the place of the core, the cores stand for a small tensor with the same inner
products: its unfoldings have the same singular values, and its best approximation, with each mode taken back by its Q,
is the best of the whole. Cutting therefore costs a QR for each core and a small approximation. For a truncated SVD of
rank r, this is the SVD of an r x r matrix. Everything is in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.algebra import Chain, Operator, relative_error
from surgery.errors import Refusal
from surgery.factorizations.base import Factorization, Ranks, Spectrum
from surgery.solvers.gram import singular_values

__all__ = ["Cut", "chain_spectra", "recut"]


@dataclass(frozen=True, eq=False)
class Cut:
    """A chain of lower rank, and its relative error to the chain that was cut."""

    chain: Chain
    error: float


def recut(method: Factorization, operator: Operator, chain: Chain, ranks: Ranks) -> Cut | Refusal:
    """Return the chain cut to ranks of at most its own, or why no good factors were found.

    ``operator`` is what the chain stands for; its weight may be on the meta device. The bias stays.
    """
    if chain.origin == (method.name, ranks):
        return Cut(chain, 0.0)
    small, bases = _shrink(_cores(method, operator, chain))
    tensor = method.expand(small)
    cores = method.fit(tensor, ranks, "auto")
    if isinstance(cores, Refusal):
        return cores
    error = relative_error(method.expand(cores), tensor)
    lifted = [_lift(core, basis, axis) for core, basis, axis in zip(cores, bases, method.axes(cores), strict=True)]
    dtype = chain.operators[0].weight.dtype
    factors = [factor.to(dtype).contiguous() for factor in method.factors(lifted, _kernel(operator), ranks)]
    return Cut(method.assemble(operator, factors, ranks).with_bias(chain.bias), error)


def chain_spectra(method: Factorization, operator: Operator, chain: Chain) -> tuple[Spectrum, ...]:
    """Return the singular values of the unfoldings of what the chain stands for, as ``Factorization.spectra`` does."""
    small, _ = _shrink(_cores(method, operator, chain))
    matrices = method.matrices(method.expand(small))
    whole = method.unfoldings(torch.empty(_kernel(operator), device="meta"))
    spectra = []
    for matrix, like in zip(matrices, whole, strict=True):
        # The whole has as many singular values as its shape allows; those that the small tensor lacks are 0.
        values, (rows, columns) = singular_values(matrix), like.shape[-2:]
        spectra.append(Spectrum(F.pad(values, (0, min(rows, columns) - values.shape[-1])), rows, columns))
    return tuple(spectra)


def _kernel(operator: Operator) -> tuple[int, ...]:
    return tuple(operator.kernel.shape)


@dataclass(frozen=True, eq=False)
class _Cores:
    cores: list[Tensor]
    axes: tuple[int | None, ...]


def _cores(method: Factorization, operator: Operator, chain: Chain) -> _Cores:
    assert chain.origin is not None  # only such chains are cut
    kernels = [part.kernel.detach().double() for part in chain.operators]
    cores = method.cores(kernels, _kernel(operator), chain.origin[1])
    return _Cores(cores, method.axes(cores))


def _shrink(whole: _Cores) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the cores of the small tensor, and the basis (batch, n, m) of each mode that has become smaller."""
    cores: list[Tensor] = []
    bases: list[Tensor | None] = []
    for core, axis in zip(whole.cores, whole.axes, strict=True):
        matrix = core if axis is None else core.movedim(axis, 1).flatten(2)
        if axis is None or matrix.shape[1] <= matrix.shape[2]:
            cores.append(core)
            bases.append(None)
            continue
        # (n, m) = Q (n, m) R (m, m). Example of a train's core 2 x 64 x 3: m = 6, so that its
        # mode of 64 becomes one of 6.
        basis, rest = torch.linalg.qr(matrix)
        ranks = [size for at, size in enumerate(core.shape) if at not in (0, axis)]
        cores.append(rest.unflatten(2, ranks).movedim(1, axis))
        bases.append(basis)
    return cores, bases


def _lift(core: Tensor, basis: Tensor | None, axis: int | None) -> Tensor:
    """Return a core with its mode taken back from the small tensor."""
    if basis is None or axis is None:
        return core
    ranks: Sequence[int] = [size for at, size in enumerate(core.shape) if at not in (0, axis)]
    return (basis @ core.movedim(axis, 1).flatten(2)).unflatten(2, ranks).movedim(1, axis)
