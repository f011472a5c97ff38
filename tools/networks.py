"""Networks for the tools, in plain torch: the shapes of ResNet-18 and ResNet-50, of VGG and of MobileNetV2, and a ViT.

Weights are random from a seed but have structure: each has low rank in its channels (a quarter of them), with noise of
a tenth of its amplitude, so that a rank rule finds about the same as in a trained network. The networks serve to
measure time and memory; they tell nothing about accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NETWORKS", "Network", "build"]

NOISE = 0.1
RANK_SHARE = 0.25


@dataclass(frozen=True)
class Network:
    """A function that makes a network, and the shape of its input for an image size."""

    make: Callable[[], nn.Module]
    image: int = 224

    def inputs(self, image: int | None = None) -> Tensor:
        """Return one seeded random image (1, 3, size, size)."""
        size = image or self.image
        return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def _conv_norm(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> nn.Sequential:
    padding = kernel // 2
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """The residual blocks of He et al. (2016): basic (3x3, 3x3), or bottleneck (1x1, 3x3, 1x1)."""

    def __init__(self, inputs: int, width: int, *, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            rows = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            rows = [(inputs, width, 3, stride), (width, width, 3, 1)]
        self.convs = nn.ModuleList(_conv_norm(i, o, k, stride=s) for i, o, k, s in rows)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = _conv_norm(inputs, outputs, 1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return features at 1 / stride of the size."""
        y = x
        for index, conv in enumerate(self.convs):
            y = conv(y) if index == len(self.convs) - 1 else functional.relu(conv(y))
        return functional.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The shapes of ResNet-18 (basic blocks, depths 2 2 2 2) or ResNet-50 (bottlenecks, depths 3 4 6 3)."""

    def __init__(self, depths: Sequence[int], *, bottleneck: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv_norm(3, 64, 7, stride=2), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
        channels, layers = 64, []
        for stage, depth in enumerate(depths):
            width, blocks = 64 << stage, []
            for block in range(depth):
                stride = 2 if stage and not block else 1
                blocks.append(Residual(channels, width, stride=stride, bottleneck=bottleneck))
                channels = 4 * width if bottleneck else width
            layers.append(nn.Sequential(*blocks))
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 1000) of images (N, 3, H, W)."""
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


class Inverted(nn.Module):
    """The inverted residual of Sandler et al. (2018): 1x1 up, depthwise 3x3, 1x1 down."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        up = [*_conv_norm(inputs, wide, 1), nn.ReLU6()] if expansion > 1 else []
        middle = [*_conv_norm(wide, wide, 3, stride=stride, groups=wide), nn.ReLU6()]
        self.body = nn.Sequential(*up, *middle, *_conv_norm(wide, outputs, 1))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return features at 1 / stride of the size."""
        y: Tensor = self.body(x)
        return x + y if self.adds else y


def mobilenet_v2() -> nn.Module:
    """Return the shapes of MobileNetV2 at width 1."""
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    layers: list[nn.Module] = [*_conv_norm(3, 32, 3, stride=2), nn.ReLU6()]
    channels = 32
    for expansion, outputs, depth, stride in rows:
        for block in range(depth):
            layers.append(Inverted(channels, outputs, stride=1 if block else stride, expansion=expansion))
            channels = outputs
    layers += [*_conv_norm(channels, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(1280, 1000))


def vgg11() -> nn.Module:
    """Return the shapes of VGG-11 with batch-norm; one hidden linear layer in place of two of 4096."""
    layers: list[nn.Module] = []
    channels = 3
    for outputs in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        layers += [nn.MaxPool2d(2)] if not outputs else [*_conv_norm(channels, outputs, 3), nn.ReLU()]
        channels = outputs or channels
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(512 * 49, 1024), nn.ReLU(), nn.Linear(1024, 1000)
    )


class Logits(nn.Module):
    """A model of transformers that returns only its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(x).logits


def small_vit() -> nn.Module:
    """Return a ViT of 6 layers of 256 features, from a transformers config."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(hidden_size=256, num_hidden_layers=6, num_attention_heads=4, intermediate_size=1024)
    return Logits(ViTForImageClassification(config))


NETWORKS: dict[str, Network] = {
    "resnet18": Network(lambda: ResNet((2, 2, 2, 2), bottleneck=False)),
    "resnet50": Network(lambda: ResNet((3, 4, 6, 3), bottleneck=True)),
    "vgg11": Network(vgg11),
    "mobilenet_v2": Network(mobilenet_v2),
    "small_vit": Network(small_vit),
}


def build(name: str, *, seed: int = 0) -> nn.Module:
    """Return a network of ``NETWORKS`` with seeded weights, in evaluation mode."""
    torch.manual_seed(seed)
    model = NETWORKS[name].make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and module.weight.shape[1] > 3:
                module.weight.copy_(_low_rank(module.weight))
    return model


def _low_rank(weight: Tensor) -> Tensor:
    """Return a weight of the same size, of a quarter of the rank in each of its two channel modes, plus noise."""
    outputs, inputs, *size = weight.shape
    ranks: Any = [max(1, round(RANK_SHARE * n)) for n in (outputs, inputs)]
    core = torch.randn(ranks[0], ranks[1], *size)
    signal = torch.einsum("or,rs...,si->oi...", torch.randn(outputs, ranks[0]), core, torch.randn(ranks[1], inputs))
    noisy = signal / signal.std() + NOISE * torch.randn_like(signal)
    return noisy * (weight[0].numel() / 2) ** -0.5
