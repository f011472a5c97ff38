"""TensorLy's own decompositions behind ``solver="tensorly"``: the field's reference, to compare with."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["low_rank", "tucker2"]


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return (left, right) of a batch (g, m, n) by TensorLy's truncated SVD, one matrix at a time."""
    tensorly = _backend()
    pairs = []
    for single in matrix:
        left, values, right = tensorly.tenalg.svd_interface(single, n_eigenvecs=rank, method="truncated_svd")
        root = values.sqrt()
        pairs.append((left * root, root[:, None] * right))
    return torch.stack([left for left, _ in pairs]), torch.stack([right for _, right in pairs])


def tucker2(kernel: Tensor, ranks: tuple[int, int], *, tolerance: float = 0.0) -> list[Tensor]:
    """Return [core, out basis, in basis] of a batch (g, O, I, K) by TensorLy's ``partial_tucker``.

    10 iterations from an SVD start, fewer if the error falls by less than ``tolerance`` (TensorLy's default: 1e-4).
    """
    _backend()
    from tensorly.decomposition import partial_tucker

    cores, outs, ins = [], [], []
    options = {"modes": [0, 1], "n_iter_max": 10, "init": "svd", "tol": tolerance}
    for single in kernel:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (core, factors), _ = partial_tucker(single, rank=list(ranks), **options)
        cores.append(core)
        outs.append(factors[0])
        ins.append(factors[1])
    return [torch.stack(cores), torch.stack(outs), torch.stack(ins)]


def _backend() -> Any:
    import tensorly

    tensorly.set_backend("pytorch")
    return tensorly
