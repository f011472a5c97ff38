"""Record the calls of operators in real programs while they run; the fuzzer of operators changes them at random."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tools.architectures import TORCHVISION

__all__ = ["Call", "honest_calls"]

Call = dict[str, Any]  # the arguments by name
Rows = Callable[[Tensor], Any]

_I = torch.tensor([[0, 2], [1, 1]])
_X3, _X5, _GRID = torch.randn(2, 4, 6), torch.randn(1, 2, 4, 4, 4), torch.rand(2, 4, 4, 2)
_RNN = [torch.randn(6, 4), torch.randn(6, 6), torch.randn(6), torch.randn(6)]
_LSTM = [torch.randn(24, 4), torch.randn(24, 6), torch.randn(24), torch.randn(24)]
_GRU = [torch.randn(18, 4), torch.randn(18, 6), torch.randn(18), torch.randn(18)]
_STATE = torch.randn(1, 3, 6)

# layers, indexing and losses on an image x of 2 x 4 x 8 x 8; each is exported by itself
_CORNERS: list[Rows] = [
    lambda x: F.embedding_bag(_I, x[0, 0], mode="mean"),
    lambda x: F.embedding_bag(_I.flatten(), x[0, 0], torch.tensor([0, 2]), mode="max", include_last_offset=True),
    lambda x: F.grid_sample(x, _GRID, align_corners=False, padding_mode="reflection"),
    lambda x: F.grid_sample(_X5, torch.rand(1, 3, 3, 3, 3), mode="nearest", align_corners=True),
    lambda x: F.affine_grid(torch.randn(2, 2, 3), [2, 4, 3, 3], align_corners=False),
    lambda x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1),
    lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), [2, 2]),
    lambda x: F.max_unpool3d(*F.max_pool3d(_X5, 2, return_indices=True), [2, 2, 2]),
    lambda x: F.max_pool1d(_X3, 2) + F.avg_pool1d(_X3, 2) + F.adaptive_max_pool1d(_X3, 3),
    lambda x: [F.interpolate(x, scale_factor=2.0, mode=mode) for mode in ("nearest-exact", "bicubic", "bilinear")],
    lambda x: [F.interpolate(x, size=(5, 5), mode=mode, antialias=True) for mode in ("bicubic", "bilinear")],
    lambda x: [F.interpolate(_X3, size=5, mode=mode) for mode in ("nearest", "linear", "nearest-exact")],
    lambda x: [F.interpolate(_X5, size=(5, 5, 5), mode=mode) for mode in ("nearest", "trilinear", "nearest-exact")],
    lambda x: [F.pad(x, (1, 2, 1, 0), mode=mode) for mode in ("reflect", "replicate", "circular", "constant")],
    lambda x: [F.pad(_X5, (1, 2, 1, 0, 1, 1), mode=mode) for mode in ("reflect", "replicate", "circular")],
    lambda x: [F.pad(_X3, (1, 2), mode=mode) for mode in ("reflect", "replicate", "circular")],
    lambda x: F.cross_entropy(x.flatten(1), torch.tensor([1, 5])) + F.nll_loss(x[:, :, 0, 0], torch.tensor([1, 3])),
    lambda x: F.nll_loss(x, torch.zeros(2, 8, 8, dtype=torch.long)),
    lambda x: F.one_hot(_I, 4).sum() + x.sum(),
    lambda x: x.scatter(1, torch.zeros(2, 1, 8, 8, dtype=torch.long), 1.0).gather(3, _I.view(2, 2, 1, 1)),
    lambda x: x.scatter_add(2, torch.ones(2, 4, 3, 8, dtype=torch.long), x).index_select(0, torch.tensor([1, 0])),
    lambda x: x.scatter_reduce(1, torch.zeros(2, 1, 8, 8, dtype=torch.long), x, "amax"),
    lambda x: x.index_add(1, torch.tensor([0, 2]), x[:, :2]).index_copy(0, torch.tensor([1]), x[:1]),
    lambda x: x.index_fill(2, torch.tensor([0]), 2.0).index_reduce(0, torch.tensor([1]), x[:1], "prod"),
    lambda x: x[:, _I, 1].index_put((_I % 2,), torch.zeros(())),
    lambda x: x.take(_I) + torch.take_along_dim(x.flatten(), _I.flatten()).sum(),
    lambda x: x.masked_scatter(x > 0, x.flatten()).masked_fill(x < 0, 1.0),
    lambda x: torch.as_strided(x, (2, 3), (1, 2), 1) + torch.searchsorted(x[0, 0].sort().values, x[0, 0]).sum(),
    lambda x: torch.stft(x.flatten(), 16, window=torch.hann_window(16), return_complex=True).abs(),
    lambda x: torch.fft.irfft(torch.fft.rfft2(x)) + torch.fft.fftn(x).real.sum(),
    lambda x: torch.rnn_tanh(_X3[:, :3, :4], _STATE[:, :2], _RNN, True, 1, 0.0, False, False, True)[0],
    lambda x: torch.lstm(_X3[:, :3, :4], [_STATE[:, :2]] * 2, _LSTM, True, 1, 0.0, False, False, True)[0],
    lambda x: torch.gru(_X3[:, :3, :4], _STATE[:, :2], _GRU, True, 1, 0.0, False, False, True)[0],
    lambda x: torch.gru_cell(_X3[:, 0, :4], _STATE[0, :2], *_GRU),
    lambda x: torch.rnn_relu_cell(_X3[:, 0, :4], _STATE[0, :2], *_RNN),
    lambda x: torch.lstm_cell(_X3[:, 0, :4], [_STATE[0, :2]] * 2, *_LSTM)[0],
    lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True) + torch.einsum("bchw,bchv->bcwv", x, x),
    lambda x: F.scaled_dot_product_attention(x, x[:, :2], x[:, :2], torch.ones(8, 8) > 0, enable_gqa=True),
    lambda x: F.conv_transpose2d(x, torch.randn(4, 2, 3, 3), stride=2, groups=2, output_padding=1),
    lambda x: F.conv_transpose1d(_X3, torch.randn(4, 2, 3), dilation=2),
    lambda x: F.conv_transpose3d(_X5, torch.randn(2, 2, 3, 3, 3), padding=1),
    lambda x: F.conv1d(_X3, torch.randn(2, 4, 3), padding="same") + F.conv1d(_X3, torch.randn(2, 4, 1)),
    lambda x: F.conv2d(x, torch.randn(4, 2, 3, 3), groups=2, padding="valid", dilation=2),
    lambda x: F.conv3d(_X5, torch.randn(2, 2, 1, 2, 3), padding="same"),
    lambda x: F.group_norm(x, 2, torch.ones(4), torch.ones(4)) + F.instance_norm(x) + F.rms_norm(x, (8,)),
    lambda x: F.batch_norm(x, torch.zeros(4), torch.ones(4), torch.ones(4), training=True),
    lambda x: F.bilinear(x[..., 0, 0], x[..., 0, 1], torch.randn(3, 4, 4)) + F.prelu(x, torch.ones(4)).sum(),
    lambda x: torch.multinomial(x[0, 0].abs(), 2) + torch.cdist(x, x).argsort().sum().long(),
    lambda x: torch.baddbmm(x[0], x[1], x[1]) + torch.linalg.solve(x[0] + 9 * torch.eye(8), x[1]),
    lambda x: torch.cross(x[:, :3], x[:, 1:], dim=1).quantile(0.3) + torch.linalg.vector_norm(x, dim=(1, 2)).sum(),
    lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2) + F.channel_shuffle(x, 2),
    lambda x: x.unfold(2, 3, 2).sum() + x.tensor_split(3, 1)[0].sum() + x.repeat_interleave(torch.tensor([1, 2]), 0),
    lambda x: torch.view_as_real(torch.complex(x, x) * torch.view_as_complex(x.reshape(2, 4, 8, 4, 2)).sum()),
    lambda x: F.kl_div(x, x.softmax(1)) + F.huber_loss(x, x * 2) + F.binary_cross_entropy(x.sigmoid(), x.sigmoid()),
]  # fmt: skip


class _Corner(nn.Module):
    def __init__(self, function: Rows) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


class _Recorder(TorchFunctionMode):
    """Keeps the arguments of each call of an overload."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[Call]] = collections.defaultdict(list)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(function, torch._ops.OpOverload):
            names = [each.name for each in function._schema.arguments]
            target = f"torch.ops.{function.namespace}.{function._opname}.{function._overloadname}"
            self.calls[target].append(dict(zip(names, args, strict=False)) | (kwargs or {}))
        return function(*args, **(kwargs or {}))


def honest_calls() -> dict[str, list[Call]]:
    """Return the calls by operator, of small networks and of the corner cases above."""
    torch.manual_seed(0)
    models: list[Any] = [build() for build in TORCHVISION.values()]
    models += [(_Corner(function), (torch.randn(2, 4, 8, 8),)) for function in _CORNERS]
    recorder = _Recorder()
    for model, inputs in models:
        for decomposed in (False, True):
            program = torch.export.export(model, inputs)
            made = (program.run_decompositions() if decomposed else program).module()
            with recorder, torch.no_grad():
                made(*inputs)
    return recorder.calls
