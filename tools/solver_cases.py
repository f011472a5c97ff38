"""The cases of `bench_solver.py --all`: the distinct weights of ResNet-18, ResNet-50 and ViT-B, and the two solvers.

A case is one weight at one rank. This package and TensorLy solve it at equal ranks, sweeps and dtype, and the case
assembles the factors of both, so that errors are measured on the weight itself. Weights are random; by default their
spectra decay like those of trained networks.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import tensorly
import torch
from torch import Tensor, nn

from surgery.algebra import Conv, Geometry, Linear, Operator
from surgery.factorizations import FACTORIZATIONS
from surgery.solvers import gram, hooi, reference
from surgery.solvers.cp import cp
from surgery.solvers.ring import ring_tensor, tensor_ring
from surgery.solvers.train import tensor_train, train_tensor
from tools.networks import NETWORKS, build

__all__ = ["SWEEPS", "TITLES", "VIT_B", "Case", "cases", "gram_floor", "kernel_of", "parafac_setting", "sites"]

Shape = tuple[int, ...]
SWEEPS = 10
RANKS = 16, 64, 128
VIT_LAYER = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
VIT_B: list[Shape] = [(768, 768), *VIT_LAYER * 12, (1000, 768)]  # the patch embedding first
TITLES = {
    "tucker": "Tucker-2 of 3x3 convolutions, half ranks (TensorLy: partial_tucker, 10 iterations)",
    "cp": f"CP of 3x3 convolutions, {SWEEPS} sweeps on both sides (TensorLy: parafac",
    "tt": "Tensor trains of 3x3 convolutions, half ranks (TensorLy: tensor_train)",
    "tr": "Tensor rings of 3x3 convolutions, at most one sweep (TensorLy: tensor_ring, which has none)",
    "svd": "Truncated SVD of all weights (TensorLy: svd_interface, truncated_svd)",
}


@dataclass(frozen=True)
class Case:
    """One weight at one rank: the two solvers, and functions that assemble the weight from their factors."""

    name: str
    rank: str
    weight: Tensor
    ours: Callable[[], Any]
    tensorly: Callable[[], Any]
    assemble: Callable[[Any], Tensor]
    slower: Callable[[], Any] | None = None  # a slower setting of TensorLy, whose error may be lower


def kernel_of(kind: str, out: int, columns: int, seed: int, *, taps: int = 9) -> Tensor:
    """Return a kernel (1, out, columns, taps), "normal" (of flat spectra) or "decaying" in both channel modes."""
    generator = torch.Generator().manual_seed(seed)
    kernel = torch.randn(out, columns, taps, generator=generator)
    if kind == "decaying":
        for mode, size in enumerate((out, columns)):
            basis = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
            values = torch.arange(1, size + 1) ** -0.7
            kernel = torch.tensordot((basis * values) @ basis.mT, kernel, dims=([1], [mode])).movedim(0, mode)
    return kernel.contiguous().unsqueeze(0)


def _shapes(quick: bool) -> list[Shape]:
    """Return the distinct weight shapes (O, I, K), K kernel positions, of all three networks, the small ones first."""
    with torch.device("meta"):
        networks = [NETWORKS[name].make() for name in ("resnet18", "resnet50")]
    layers = (m for network in networks for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    shapes = {(*m.weight.shape[:2], m.weight[0, 0].numel()) for m in layers} | {(*shape, 1) for shape in VIT_B}
    return sorted((s for s in shapes if not quick or math.prod(s) < 2**17), key=lambda s: (math.prod(s), s))


def cases(method: str, *, kind: str, quick: bool) -> Iterator[Case]:
    """Yield the cases of a method in ``TITLES``; "quick" ones are those of small weights."""
    for seed, (out, columns, taps) in enumerate(_shapes(quick)):
        if method == "svd" or taps == 9:
            yield from _MAKERS[method](kernel_of(kind, out, columns, seed, taps=taps))


def _named(kernel: Tensor) -> str:
    out, columns, taps = kernel.shape[1:]
    return f"{out}x{columns}" + (f"x{math.isqrt(taps)}x{math.isqrt(taps)}" if taps > 1 else "")


def _tucker(kernel: Tensor) -> Iterator[Case]:
    ranks = kernel.shape[1] // 2, kernel.shape[2] // 2
    yield Case(
        _named(kernel),
        "half",
        kernel,
        lambda: hooi.tucker2(kernel, ranks),
        lambda: reference.tucker2(kernel, ranks),
        lambda parts: torch.einsum("grsk,gor,gis->goik", *parts),
    )


def _factors(tensor: Tensor, rank: int) -> Sequence[Tensor]:
    return cp(tensor, rank, sweeps=SWEEPS, tolerance=0, restarts=0).factors


def _cp(kernel: Tensor) -> Iterator[Case]:
    tensor = kernel.unflatten(3, (3, 3)).contiguous()
    for rank in RANKS:
        init, backend = parafac_setting(rank)
        other = "random" if init == "svd" else "svd"
        yield Case(
            _named(kernel),
            str(rank),
            tensor,
            partial(_factors, tensor, rank),
            partial(_parafac, tensor, rank, init, backend),
            lambda factors: torch.einsum("gar,gbr,gcr,gdr->gabcd", *factors),
            partial(_parafac, tensor, rank, other, backend),
        )


def _parafac(tensor: Tensor, rank: int, init: str, backend: str, *, sweeps: int = SWEEPS) -> list[Tensor]:
    with tensorly.tenalg.backend_context(backend):
        return reference.cp(tensor, rank, sweeps=sweeps, tolerance=0, init=init)


@functools.cache
def parafac_setting(rank: int) -> tuple[str, str]:
    """Return the start and tensor algebra with which ``parafac`` is fastest at two sweeps on one kernel."""
    tensor = kernel_of("decaying", 128, 128, 0).unflatten(3, (3, 3)).contiguous()
    seconds = {}
    for setting in itertools.product(("svd", "random"), ("core", "einsum")):
        start = time.perf_counter()
        _parafac(tensor, rank, *setting, sweeps=2)
        seconds[setting] = time.perf_counter() - start
    return min(seconds, key=lambda setting: seconds[setting])


def _row(kernel: Tensor) -> Tensor:
    """Return (g, I, 3, 3, O), the order of a train's and ring's modes."""
    return kernel.unflatten(3, (3, 3)).movedim(1, -1).contiguous()


def _tt(kernel: Tensor) -> Iterator[Case]:
    tensor = _row(kernel)
    sizes = tensor.shape[1:]
    ranks = [min(math.prod(sizes[:k]), math.prod(sizes[k:])) // 2 for k in (1, 2, 3)]
    yield Case(
        _named(kernel),
        "half",
        tensor,
        lambda: tensor_train(tensor, ranks),
        lambda: reference.tensor_train(tensor, ranks),
        train_tensor,
    )


def _tr(kernel: Tensor) -> Iterator[Case]:
    """Yield rings in which the product of the two ranks next to a channel mode is half the size of the mode."""
    tensor = _row(kernel)
    columns, out = tensor.shape[1], tensor.shape[4]
    ranks = 4, columns // 8, min(columns, out) // 8 * 3, out // 8
    yield Case(
        _named(kernel),
        ",".join(map(str, ranks)),
        tensor,
        lambda: tensor_ring(tensor, ranks, sweeps=1),
        lambda: reference.tensor_ring(tensor, ranks),
        ring_tensor,
    )


def _svd(kernel: Tensor) -> Iterator[Case]:
    matrix = kernel.flatten(2)
    full = min(matrix.shape[1:])
    for rank in sorted({full // 2, *(r for r in RANKS if r < full)}):
        yield Case(
            _named(kernel),
            str(rank),
            matrix,
            partial(gram.low_rank, matrix, rank),
            partial(reference.low_rank, matrix, rank),
            lambda pair: pair[0] @ pair[1],
        )


_MAKERS: dict[str, Callable[[Tensor], Iterator[Case]]] = {
    "tucker": _tucker,
    "cp": _cp,
    "tt": _tt,
    "tr": _tr,
    "svd": _svd,
}


def sites(network: str) -> list[tuple[Operator, str]]:
    """Return the operators of "resnet50" or "vit_b", each with its method: tucker if it fits, else svd."""
    if network == "vit_b":
        generator = torch.Generator().manual_seed(0)
        return [(Linear(torch.randn(shape, generator=generator) * 0.02), "svd") for shape in VIT_B]
    layers = [m for m in build(network).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    operators = [
        Linear(m.weight.detach()) if isinstance(m, nn.Linear) else Conv(m.weight.detach(), Geometry.pointwise(2))
        for m in layers
    ]
    return [(o, "svd" if FACTORIZATIONS["tucker"].refuse(o) else "tucker") for o in operators]


def gram_floor(operators: Sequence[tuple[Operator, str]]) -> None:
    """Compute one Gram matrix, of its shorter side, in float32, for each unfolding that the methods use."""
    for operator, method in operators:
        for unfolding in FACTORIZATIONS[method].unfoldings(operator.kernel):
            rows = unfolding if unfolding.shape[1] <= unfolding.shape[2] else unfolding.mT
            rows @ rows.mT
