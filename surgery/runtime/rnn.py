"""nn.RNN in ONNX: one RNN node for each layer, as torch's exporter writes nn.LSTM and nn.GRU.

torch itself unrolls it: as many nodes as steps, and weights that no node of a layer has.

    aten.rnn_tanh.input(x, hx, [W_ih, W_hh, b_ih, b_hh, ...], ...)    ->    RNN(x, W, R, B, initial_h)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["rnn_translations"]

_ACTIVATIONS = {torch.ops.aten.rnn_tanh.input: "Tanh", torch.ops.aten.rnn_relu.input: "Relu"}


def rnn_translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return how ONNX says the kernels of nn.RNN, for torch's exporter."""
    return {kernel: _translation(name) for kernel, name in _ACTIVATIONS.items()}


def _translation(activation: str) -> Callable[..., Any]:
    import onnxscript  # as late as the exporter, which needs it anyway

    op: Any = onnxscript.opset18

    def rnn(
        input: Any,
        hx: Any,
        params: Sequence[Any],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        ways, each = (2 if bidirectional else 1), (4 if has_biases else 2)
        said = {"hidden_size": hx.shape[2], "direction": "bidirectional" if bidirectional else "forward"}
        said["activations"] = [activation] * ways
        x, lasts = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input, []
        for layer in range(num_layers):
            # the parameters of one direction are W, R, and both biases
            own = params[layer * each * ways : (layer + 1) * each * ways]
            w, r, *biases = [own[at::each] for at in range(each)]
            pairs = [op.Concat(*pair, axis=0) for pair in zip(*biases, strict=True)]
            start = op.Slice(hx, [layer * ways], [(layer + 1) * ways], [0])
            bias = _stacked(op, pairs) if pairs else None
            y, last = op.RNN(x, _stacked(op, w), _stacked(op, r), bias, None, start, **said)
            # (steps, directions, N, H) to (steps, N, directions H)
            x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1])
            if train and dropout and layer + 1 < num_layers:
                x, _ = op.Dropout(x, dropout, train)
            lasts.append(last)
        last = lasts[0] if num_layers == 1 else op.Concat(*lasts, axis=0)
        return (op.Transpose(x, perm=[1, 0, 2]) if batch_first else x), last

    return rnn


def _stacked(op: Any, tensors: Sequence[Any]) -> Any:
    rows = [op.Unsqueeze(tensor, [0]) for tensor in tensors]
    return rows[0] if len(rows) == 1 else op.Concat(*rows, axis=0)
