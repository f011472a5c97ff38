"""TensorLy's own decompositions, for ``solver="tensorly"``: the field's reference, to compare with.

They have the layouts of the solvers here, with a leading batch axis g. TensorLy takes the tensors of a batch one by
one. It cuts ranks that a train or ring cannot use; here such cores are filled with zeros to the ranks asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.errors import InputError

__all__ = ["cp", "low_rank", "tensor_ring", "tensor_train", "tucker2"]


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


def cp(
    tensor: Tensor, rank: int, *, sweeps: int = 100, tolerance: float = 1e-8, init: str = "svd", seed: int = 0
) -> list[Tensor]:
    """Return factors (g, n_i, rank) of a batch (g, n_1 .. n_N) by TensorLy's ``parafac``, its weights absorbed.

    ``sweeps``, ``tolerance`` and ``init`` ("svd" or "random") are its own defaults; ``seed`` fills what the SVD lacks.
    """
    _backend()
    from tensorly.decomposition import parafac

    found = []
    for single in tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weights, factors = parafac(single, rank, n_iter_max=sweeps, tol=tolerance, init=init, random_state=seed)
        found.append([factors[0] * weights, *factors[1:]])
    return [torch.stack(same_mode) for same_mode in zip(*found, strict=True)]


def tensor_train(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return cores (g, r_{k-1}, n_k, r_k) of a batch (g, n_1 .. n_N) by TensorLy's ``tensor_train``.

    ``ranks`` are r_1 .. r_{N-1}.
    """
    _backend()
    from tensorly.decomposition import tensor_train as train

    bonds = [1, *ranks, 1]
    return _stacked([train(single, list(bonds)).factors for single in tensor], bonds)


def tensor_ring(tensor: Tensor, ranks: Sequence[int]) -> list[Tensor]:
    """Return cores (g, r_k, n_k, r_{k+1}) of a batch (g, n_1 .. n_N) by TensorLy's ``tensor_ring``.

    ``ranks`` are r_1 .. r_N; it starts at the first mode that can hold the ranks on both its sides.

    Raises:
        InputError: none of the modes can hold the product of its two ranks.
    """
    _backend()
    from tensorly.decomposition import tensor_ring as ring

    bonds = [*ranks, ranks[0]]
    sizes, size = tensor.shape[1:], tensor[0].numel()
    fits = [bonds[k] * bonds[k + 1] <= min(n, size // n) for k, n in enumerate(sizes)]
    if True not in fits:
        allowed = "a mode of at least the product of its two ranks"
        raise InputError(f"TensorLy cannot make a ring of ranks {tuple(ranks)} of {tuple(sizes)}", allowed=allowed)
    mode = fits.index(True)
    return _stacked([ring(single, bonds, mode=mode).factors for single in tensor], bonds)


def _stacked(batches: Sequence[Sequence[Tensor]], bonds: Sequence[int]) -> list[Tensor]:
    """Return the cores of all tensors of a batch, filled with zeros to the bonds."""
    pairs = list(pairwise(bonds))
    filled = [
        [F.pad(c, (0, s - c.shape[2], 0, 0, 0, r - c.shape[0])) for c, (r, s) in zip(cores, pairs, strict=True)]
        for cores in batches
    ]
    return [torch.stack(cores) for cores in zip(*filled, strict=True)]


def _backend() -> Any:
    import tensorly

    tensorly.set_backend("pytorch")
    return tensorly
