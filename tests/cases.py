"""The operator cases: each an nn.Module, the operator that is the same, and an input shape.

A law that holds for all of them holds for strides, paddings, dilations, groups, layouts and dtypes. Add a case as one
line of ``CASES``; every law then covers it.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from surgery.algebra import Conv, Embedding, Geometry, Linear, Operator, Shape


@dataclass(frozen=True)
class Case:
    """One operator; the weights have a decaying spectrum and are the same in each run and in each order of tests."""

    id: str
    build: Callable[[], nn.Module]
    shape: Shape
    dtype: torch.dtype = torch.float64

    @functools.cached_property
    def module(self) -> nn.Module:
        """The torch module. Do not change it: it is built once."""
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(self.id.encode()))
            module = self.build()
            for parameter in module.parameters():
                parameter.data = decaying(parameter.data.double()).to(self.dtype)
        return module.eval().requires_grad_(False)

    @functools.cached_property
    def operator(self) -> Operator:
        """The operator, with the module's own tensors."""
        return operator_of(self.module)

    def inputs(self) -> Tensor:
        """Return random activations, the same each time."""
        generator = torch.Generator().manual_seed(zlib.crc32(self.id.encode()) + 1)
        if isinstance(self.module, nn.Embedding):
            return torch.randint(self.module.num_embeddings, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(self.dtype)


def decaying(weight: Tensor, rate: float = 0.7) -> Tensor:
    """Return the weight with singular values that decay along each mode, and its norm unchanged.

    Each mode of size n is multiplied by ``Q diag(rate^0 .. rate^(n-1)) Q^T`` with a random orthogonal Q, as the spectra
    of trained kernels decay; long modes decay slower, so that the condition number stays below 1e3 in float16's reach.
    """
    if weight.dim() < 2:
        return weight
    result = weight
    for mode, size in enumerate(weight.shape):
        basis = torch.linalg.qr(torch.randn(size, size, dtype=weight.dtype)).Q
        values = max(rate, 1e-2 ** (1 / size)) ** torch.arange(size, dtype=weight.dtype)
        result = torch.tensordot((basis * values) @ basis.mT, result, dims=([1], [mode])).movedim(0, mode)
    return (result * (weight.norm() / result.norm())).contiguous()


def operator_of(module: nn.Module) -> Operator:
    """Return the operator of a torch layer: the tests' own reading of it, apart from that of the graph code."""
    if isinstance(module, nn.Embedding):
        return Embedding(module.weight.data, padding_index=module.padding_idx)
    assert isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
    bias = None if module.bias is None else module.bias.data
    if isinstance(module, nn.Linear):
        return Linear(module.weight.data, bias=bias)
    geometry = Geometry(
        stride=tuple(module.stride),
        padding=_padding_of(module),
        dilation=tuple(module.dilation),
        output_padding=tuple(module.output_padding),
        transposed=module.transposed,
        padding_mode=module.padding_mode,
    )
    return Conv(module.weight.data, geometry, module.groups, bias=bias)


def _padding_of(module: nn.modules.conv._ConvNd) -> tuple[tuple[int, int], ...]:
    if module.padding == "valid":
        return ((0, 0),) * len(module.kernel_size)
    if isinstance(module.padding, str):  # "same": the odd one goes after
        totals = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in module.padding)


_L, _C1, _C2, _C3 = nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d
_T1, _T2, _T3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
_ROW, _IMAGE, _VOLUME = (2, 6, 17), (2, 6, 11, 9), (2, 4, 7, 6, 8)

CASES: list[Case] = [
    # linear layers
    Case("linear", lambda: _L(12, 10), (5, 12)),
    Case("linear-nobias", lambda: _L(12, 10, bias=False), (2, 3, 12)),
    Case("linear-wide", lambda: _L(30, 5), (4, 30)),
    Case("linear-tall", lambda: _L(5, 30), (4, 5)),
    Case("linear-vector", lambda: _L(7, 7), (7,)),
    Case("linear-1out", lambda: _L(9, 1), (4, 9)),
    Case("linear-1in", lambda: _L(1, 9), (4, 1)),
    Case("linear-composite", lambda: _L(24, 18), (2, 3, 24)),
    Case("linear-composite-nobias", lambda: _L(16, 36, bias=False), (5, 16)),
    # embeddings
    Case("embedding", lambda: nn.Embedding(30, 8), (4,)),
    Case("embedding-padding", lambda: nn.Embedding(12, 10, padding_idx=3), (2, 5)),
    Case("embedding-few", lambda: nn.Embedding(5, 16), (3, 2)),
    # one dimension
    Case("conv1d-3", lambda: _C1(6, 8, 3), _ROW),
    Case("conv1d-5-same-dilation", lambda: _C1(6, 8, 5, padding="same", dilation=2), _ROW),
    Case("conv1d-4-same", lambda: _C1(6, 8, 4, padding="same", bias=False), _ROW),
    Case("conv1d-7-stride", lambda: _C1(6, 8, 7, stride=3, padding=3, bias=False), _ROW),
    Case("conv1d-groups", lambda: _C1(6, 8, 3, groups=2, padding=1), _ROW),
    Case("conv1d-1", lambda: _C1(6, 8, 1), _ROW),
    Case("conv1d-circular", lambda: _C1(6, 8, 3, padding=2, padding_mode="circular"), _ROW),
    Case("conv1d-unbatched", lambda: _C1(6, 8, 3, padding=1), (6, 17)),
    Case("conv1d-whole", lambda: _C1(6, 8, 17), _ROW),
    # two dimensions
    Case("conv2d-3x3", lambda: _C2(6, 8, 3), _IMAGE),
    Case("conv2d-3x3-nobias-pad", lambda: _C2(6, 8, 3, padding=1, bias=False), _IMAGE),
    Case("conv2d-3x3-valid", lambda: _C2(6, 8, 3, padding="valid"), _IMAGE),
    Case("conv2d-3x3-unbatched", lambda: _C2(6, 8, 3, padding=1), (6, 11, 9)),
    Case("conv2d-many-to-few", lambda: _C2(6, 2, 3, padding=1), _IMAGE),
    Case("conv2d-few-to-many", lambda: _C2(3, 24, 3, padding=1), (2, 3, 8, 8)),
    Case("conv2d-1out", lambda: _C2(6, 1, 3, padding=1), _IMAGE),
    Case("conv2d-1in", lambda: _C2(1, 8, 3, padding=1), (2, 1, 9, 9)),
    Case("conv2d-stride-1x2", lambda: _C2(6, 8, 3, stride=(1, 2), padding=1), _IMAGE),
    Case("conv2d-stride-3x2", lambda: _C2(6, 8, 3, stride=(3, 2), padding=(0, 1), bias=False), _IMAGE),
    Case("conv2d-stride-beyond-kernel", lambda: _C2(6, 8, 2, stride=3, padding=1), _IMAGE),
    Case("conv2d-dilation-2x1", lambda: _C2(6, 8, 3, dilation=(2, 1), padding=(2, 1)), _IMAGE),
    Case("conv2d-dilation-1x3-stride", lambda: _C2(6, 8, 3, dilation=(1, 3), stride=2, padding=(1, 3)), _IMAGE),
    Case("conv2d-2x4-same", lambda: _C2(6, 8, (2, 4), padding="same"), _IMAGE),
    Case("conv2d-4x4-same-dilation", lambda: _C2(6, 8, 4, padding="same", dilation=(1, 2), bias=False), _IMAGE),
    Case("conv2d-4x3-same-circular", lambda: _C2(6, 8, (4, 3), padding="same", padding_mode="circular"), _IMAGE),
    Case("conv2d-2x2-same-replicate", lambda: _C2(6, 8, 2, padding="same", padding_mode="replicate"), _IMAGE),
    Case("conv2d-pad-beyond-half", lambda: _C2(6, 8, 3, padding=(4, 3)), _IMAGE),
    Case("conv2d-pad-anisotropic", lambda: _C2(6, 8, 3, padding=(0, 2)), _IMAGE),
    Case("conv2d-circular", lambda: _C2(6, 8, 3, padding=1, padding_mode="circular"), _IMAGE),
    Case("conv2d-reflect-stride", lambda: _C2(6, 8, (3, 5), (2, 1), padding=(1, 2), padding_mode="reflect"), _IMAGE),
    Case("conv2d-replicate-1d-pad", lambda: _C2(6, 8, 3, padding=(0, 2), padding_mode="replicate"), _IMAGE),
    Case("conv2d-circular-unpadded", lambda: _C2(6, 8, 3, padding_mode="circular"), _IMAGE),
    Case("conv2d-3x5", lambda: _C2(6, 8, (3, 5), padding=(1, 2)), _IMAGE),
    Case("conv2d-1x7", lambda: _C2(6, 8, (1, 7), padding=(0, 3)), _IMAGE),
    Case("conv2d-7x1-stride", lambda: _C2(6, 8, (7, 1), stride=(2, 3), padding=(3, 0), bias=False), _IMAGE),
    Case("conv2d-1x1", lambda: _C2(6, 8, 1), _IMAGE),
    Case("conv2d-1x1-stride", lambda: _C2(6, 8, 1, stride=2, bias=False), _IMAGE),
    Case("conv2d-1x1-stride-2x1", lambda: _C2(6, 8, 1, stride=(2, 1)), _IMAGE),
    Case("conv2d-1x1-pad", lambda: _C2(6, 8, 1, padding=(1, 2)), _IMAGE),
    Case("conv2d-1x1-groups", lambda: _C2(6, 8, 1, groups=2), _IMAGE),
    Case("conv2d-groups", lambda: _C2(6, 8, 3, groups=2, padding=1), _IMAGE),
    Case("conv2d-groups-stride-dilation", lambda: _C2(6, 9, 3, (2, 1), 2, (1, 2), groups=3, bias=False), _IMAGE),
    Case("conv2d-depthwise", lambda: _C2(6, 6, 3, groups=6, padding=1), _IMAGE),
    Case("conv2d-depthwise-5x5-nobias", lambda: _C2(6, 6, 5, groups=6, padding=2, bias=False), _IMAGE),
    Case("conv2d-depthwise-multiplier", lambda: _C2(6, 18, 3, groups=6, stride=2, padding=1), _IMAGE),
    Case("conv2d-depthwise-1x1", lambda: _C2(6, 6, 1, groups=6), _IMAGE),
    # three dimensions
    Case("conv3d-3x3x3", lambda: _C3(4, 5, 3, padding=1), _VOLUME),
    Case("conv3d-2x3x1-stride", lambda: _C3(4, 5, (2, 3, 1), stride=(1, 2, 2), bias=False), _VOLUME),
    Case("conv3d-3x1x2-dilation", lambda: _C3(4, 5, (3, 1, 2), dilation=(1, 2, 3), padding=(1, 0, 1)), _VOLUME),
    Case("conv3d-groups-same", lambda: _C3(4, 6, (3, 2, 3), groups=2, padding="same"), _VOLUME),
    Case("conv3d-replicate", lambda: _C3(4, 5, (3, 3, 1), padding=(1, 1, 0), padding_mode="replicate"), _VOLUME),
    Case("conv3d-1x3x3", lambda: _C3(4, 5, (1, 3, 3), padding=(0, 1, 1)), _VOLUME),
    # transposed
    Case("transposed1d-4-stride", lambda: _T1(6, 8, 4, stride=2, padding=1), (2, 6, 9)),
    Case("transposed1d-3-output-padding", lambda: _T1(6, 8, 3, 3, 1, output_padding=2, bias=False), (2, 6, 9)),
    Case("transposed2d-3x3", lambda: _T2(6, 8, 3), (2, 6, 5, 4)),
    Case("transposed2d-2x2-stride", lambda: _T2(6, 8, 2, stride=2, bias=False), (2, 6, 5, 4)),
    Case("transposed2d-stride-2x3", lambda: _T2(6, 8, (3, 4), (2, 3), (1, 0), (1, 2)), (2, 6, 5, 4)),
    Case("transposed2d-groups-dilation", lambda: _T2(6, 8, 3, (1, 2), groups=2, dilation=(2, 1)), (2, 6, 5, 4)),
    Case("transposed2d-depthwise", lambda: _T2(6, 6, 3, 2, 1, groups=6), (2, 6, 5, 4)),
    Case("transposed2d-1x1-stride", lambda: _T2(6, 8, 1, stride=2, output_padding=1), (2, 6, 5, 4)),
    Case("transposed2d-1x1", lambda: _T2(6, 8, 1), (2, 6, 5, 4)),
    Case("transposed3d-3x2x3", lambda: _T3(4, 5, (3, 2, 3), (1, 2, 2), (1, 0, 1), (0, 0, 1)), (1, 4, 3, 4, 3)),
    Case("transposed3d-groups", lambda: _T3(4, 6, 3, groups=2, bias=False), (1, 4, 3, 4, 3)),
    # the dtypes, each over one case of each kind
    *(
        Case(f"{name}-{str(dtype).removeprefix('torch.')}", build, shape, dtype)
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        for name, build, shape in [
            ("linear", lambda: _L(24, 16), (5, 24)),
            ("conv1d", lambda: _C1(6, 8, 4, padding="same"), _ROW),
            ("conv2d", lambda: _C2(12, 16, 3, (1, 2), padding=1), (2, 12, 9, 9)),
            ("conv2d-circular-nobias", lambda: _C2(6, 8, 3, padding=1, padding_mode="circular", bias=False), _IMAGE),
            ("conv2d-depthwise", lambda: _C2(6, 6, 3, groups=6, padding=1), _IMAGE),
            ("conv3d", lambda: _C3(4, 5, 3, padding=1), _VOLUME),
            ("transposed2d", lambda: _T2(6, 8, 3, 2, 1, 1, groups=2), (2, 6, 5, 4)),
        ]
    ),
]
