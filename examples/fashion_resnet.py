"""The small residual network for Fashion-MNIST whose trained copy is `examples/data/fashion_resnet.pt2`.

    images (N, 1, 28, 28) in 0..1
      -> normalise -> stem, 32 channels at 28 x 28
      -> layer1, 64 channels at 14 x 14 -> layer2, 128 channels at 7 x 7
      -> mean over positions -> fc -> logits (N, 10)

It spends nearly all of its time in 3 x 3 convolutions of 64 and 128 channels, which a low-rank chain can make faster.
`tools/train_demo.py` trains it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["CLASSES", "Block", "FashionResNet", "build"]

CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class Stem(nn.Module):
    """One 3 x 3 convolution with batch-norm and ReLU, at the resolution of the image."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (N, channels, 28, 28) of normalised images (N, 1, 28, 28)."""
        return functional.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """The basic residual block of He et al. (2016): two 3 x 3 convolutions and a shortcut.

    The shortcut is the identity, or a 1 x 1 convolution with batch-norm if the shape changes.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return features (N, out_channels, H / stride, W / stride) of features (N, in_channels, H, W)."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return functional.relu(y + self.shortcut(x))


class FashionResNet(nn.Module):
    """Maps float32 images (N, 1, 28, 28) in 0..1 to logits (N, 10) over `CLASSES`.

    The buffers `mean` and `std` of the training pixels are part of the state dict, so that the saved model takes plain
    images. In an untrained model they are 0 and 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))
        self.stem = Stem(32)
        self.layer1 = nn.Sequential(Block(32, 64, stride=2), Block(64, 64), Block(64, 64))
        self.layer2 = nn.Sequential(Block(64, 128, stride=2), Block(128, 128))
        self.fc = nn.Linear(128, len(CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (N, 10) for images (N, 1, 28, 28) in 0..1."""
        x = self.stem((images - self.mean) / self.std)
        x = self.layer2(self.layer1(x))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def build() -> FashionResNet:
    """Return the network with fresh weights in training mode; seed torch to get the same weights again.

    >>> build()(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 10])
    """
    return FashionResNet()
