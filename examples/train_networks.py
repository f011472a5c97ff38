"""The networks that `train_faster.py` trains: one of 3x3 convolutions, and a small vision transformer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NETWORKS", "convolutional", "transformer"]

_ROWS, _DEPTH, _HEADS = 4, 4, 4  # rows of patches in an image, blocks, heads


def convolutional(channels: int, side: int, width: int) -> nn.Sequential:
    """Return a network with a stem of stride 2, then two 3x3 convolutions each at 2 and 4 times the stem's width."""
    layers: list[nn.Module] = []
    before = channels
    for rows, count, stride in ((width, 1, 2), (2 * width, 2, 1), (4 * width, 2, 1)):
        for _ in range(count):
            convolution = nn.Conv2d(before, rows, 3, stride=stride, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(rows), nn.ReLU()]
            before = rows
        if stride == 1:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


class Block(nn.Module):
    """Attention and a perceptron, each after a layer norm and added to a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens (batch, tokens, width)."""
        y = self.norm1(x)
        heads = (part(y).unflatten(2, (_HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        x = x + self.out(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """4x4 patches with learned position embeddings, four blocks, and a head on the mean of the tokens."""

    def __init__(self, channels: int, side: int, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(channels, width, side // _ROWS, stride=side // _ROWS)
        self.places = nn.Parameter(0.02 * torch.randn(_ROWS**2, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(_DEPTH)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, 10) of images (batch, channels, side, side)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.norm(self.blocks(x)).mean(1))


def transformer(channels: int, side: int, width: int) -> nn.Module:
    """Return the transformer, with 4 times ``width`` channels."""
    return Transformer(channels, side, 4 * width)


NETWORKS: dict[str, Callable[[int, int, int], nn.Module]] = {"cnn": convolutional, "vit": transformer}
