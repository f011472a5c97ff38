"""The problems of `bench_pairwise.py`: the families of Ma and Solomonik (arXiv 1811.10573), and images."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy
import torch
from torch import Tensor

__all__ = ["Problem", "images", "problems", "synthetic", "tuckers"]


@dataclass(frozen=True)
class Problem:
    """A tensor (1, n_1, ..., n_N), made when it is needed, and the wanted rank or ranks."""

    name: str
    build: Callable[[], Tensor]
    rank: int | tuple[int, ...]
    sweeps: int = 200


def compose(factors: list[Tensor]) -> Tensor:
    """Return the tensor (g, n_1, ...) of CP factors (g, n_i, r)."""
    letters = "abcdef"[: len(factors)]
    return torch.einsum(",".join(f"g{c}r" for c in letters) + f"->g{letters}", *factors)


def synthetic(
    sizes: tuple[int, ...], rank: int, *, noise: float, collinearity: float | None = None, seed: int = 0
) -> Tensor:
    """Return a tensor (1, sizes) in float64 of normal factors, or of factors whose columns have the same cosines."""
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(1, size, rank, generator=generator, dtype=torch.float64) for size in sizes]
    if collinearity is not None:
        cosines = torch.full((rank, rank), collinearity, dtype=torch.float64).fill_diagonal_(1)
        factors = [torch.linalg.qr(factor).Q @ torch.linalg.cholesky(cosines).mT for factor in factors]
    tensor = compose(factors)
    extra = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    return tensor.add_(extra, alpha=float(noise * tensor.norm() / extra.norm()))


def images(path: Path, count: int) -> Tensor | None:
    """Return CIFAR-10 test images (1, count, 32, 32, 3) in float64, or None if the file is not there."""
    if not path.exists():
        return None
    from PIL import Image

    archive = numpy.load(path)
    stream, offsets = archive["test_jpg"].tobytes(), archive["test_off"]
    pictures = [Image.open(io.BytesIO(stream[offsets[i] : offsets[i + 1]])) for i in range(count)]
    return torch.from_numpy(numpy.stack([numpy.asarray(p, dtype=numpy.float64) for p in pictures]))[None] / 255


def problems(*, quick: bool, data: Path) -> list[Problem]:
    """Return the CP problems, without that of the images if their file is not there."""
    low, collinear = ((80, 30), (60, 20)) if quick else ((300, 100), (160, 50))
    higher = [(20, 4, 16), (12, 5, 10), (8, 6, 8)] if quick else [(60, 4, 40), (20, 5, 20), (12, 6, 12)]
    found = [Problem("low rank, noise 0.1", lambda: synthetic((low[0],) * 3, low[1], noise=0.1), low[1])]
    for cosine in (0.5, 0.7, 0.9):
        name = f"collinearity {cosine}"
        size, rank = collinear
        found.append(
            Problem(
                name,
                partial(synthetic, (size,) * 3, rank, noise=0.01, collinearity=cosine),
                rank,
            )
        )
    for size, order, rank in higher:
        found.append(
            Problem(
                "collinearity 0.5",
                partial(synthetic, (size,) * order, rank, noise=0.01, collinearity=0.5),
                rank,
            )
        )
    pictures = images(data, 100 if quick else 500)
    if pictures is not None:
        found.append(Problem("CIFAR-10 images", lambda: pictures, 10 if quick else 40))
    return found


def tuckers(*, quick: bool, data: Path) -> list[Problem]:
    """Return the Tucker problems: noise, a low multilinear rank with noise, and images."""
    size = 40 if quick else 160
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, *(size,) * 3, generator=generator, dtype=torch.float64)
    rank = size // 8
    found = [Problem("tucker, normal", lambda: noise, (rank,) * 3, 40)]
    found.append(Problem("tucker, low rank", lambda: synthetic((size,) * 3, 2 * rank, noise=0.5), (rank,) * 3, 40))
    pictures = images(data, 100 if quick else 500)
    if pictures is not None:
        found.append(Problem("tucker, images", lambda: pictures, (len(pictures[0]) // 10, 12, 12, 2), 40))
    return found
