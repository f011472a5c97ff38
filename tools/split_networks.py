"""The networks that the bench of splits cuts: of many kinds, of realistic sizes, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.zoo import UNet
from tools.networks import NETWORKS, Logits

__all__ = ["SPLIT_NETWORKS", "SplitNetwork"]

SplitNetwork = Callable[[], tuple[nn.Module, tuple[Any, ...]]]


def _conv(inputs: int, outputs: int, size: Any = 1, stride: int = 1, **more: Any) -> nn.Sequential:
    padding = size // 2 if isinstance(size, int) else tuple(n // 2 for n in size)
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=padding, bias=False, **more)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def _classifier(*body: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class _Dense(nn.Module):
    """A dense block (Huang et al., 2017): each layer reads all that came before it."""

    def __init__(self, channels: int, depth: int, growth: int = 32) -> None:
        super().__init__()
        widths = [channels + growth * number for number in range(depth)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), _conv(width, 128), nn.Conv2d(128, growth, 3, padding=1))
            for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1)


def _densenet() -> nn.Module:
    body: list[nn.Module] = [_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for depth in (6, 12, 24, 16):
        body.append(_Dense(channels, depth))
        channels += 32 * depth
        if depth != 16:
            body += [_conv(channels, channels // 2), nn.AvgPool2d(2)]
            channels //= 2
    return _classifier(*body, channels=channels)


class _Shuffle(nn.Module):
    """The unit of ShuffleNetV2 (Ma et al., 2018)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half, self.down = outputs // 2, inputs != outputs
        stride, own = (2, inputs) if self.down else (1, half)
        depthwise = nn.Conv2d(half, half, 3, stride, 1, groups=half, bias=False)
        self.branch = nn.Sequential(_conv(own, half), depthwise, nn.BatchNorm2d(half), _conv(half, half))
        self.short = nn.Sequential(_conv(inputs, inputs, 3, 2, groups=inputs), _conv(inputs, half))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = (self.short(x), x) if self.down else x.chunk(2, dim=1)
        out = torch.cat((kept, self.branch(changed)), dim=1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def _shufflenet() -> nn.Module:
    body: list[nn.Module] = [_conv(3, 24, 3, 2), nn.MaxPool2d(3, 2, 1)]
    channels = 24
    for outputs, depth in ((116, 4), (232, 8), (464, 4)):
        for _ in range(depth):
            body.append(_Shuffle(channels, outputs))
            channels = outputs
    return _classifier(*body, _conv(channels, 1024), channels=1024)


class _Inception(nn.Module):
    """Four branches side by side, as in GoogLeNet (Szegedy et al., 2015) with factored convolutions."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [
                _conv(inputs, width),
                nn.Sequential(_conv(inputs, width), _conv(width, width, (1, 7)), _conv(width, width, (7, 1))),
                nn.Sequential(_conv(inputs, width), _conv(width, width, 3), _conv(width, width, 3)),
                nn.Sequential(nn.AvgPool2d(3, 1, 1), _conv(inputs, width)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.branches], 1)


def _inception() -> nn.Module:
    body: list[nn.Module] = [_conv(3, 32, 3, 2), _conv(32, 64, 3), nn.MaxPool2d(3, 2, 1), _conv(64, 192, 3, 2)]
    channels = 192
    for width, depth in ((64, 3), (192, 5), (320, 2)):
        for _ in range(depth):
            body.append(_Inception(channels, width))
            channels = 4 * width
        body.append(nn.MaxPool2d(3, 2, 1))
    return _classifier(*body, channels=channels)


class _Excited(nn.Module):
    """EfficientNet's inverted residual with squeeze and excitation (Tan and Le, 2019)."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int, expand: int) -> None:
        super().__init__()
        wide, self.adds = inputs * expand, stride == 1 and inputs == outputs
        self.up = _conv(inputs, wide) if expand > 1 else nn.Identity()
        self.depthwise = _conv(wide, wide, size, stride, groups=wide)
        squeeze = nn.Conv2d(wide, max(1, inputs // 4), 1), nn.SiLU(), nn.Conv2d(max(1, inputs // 4), wide, 1)
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), *squeeze, nn.Sigmoid())
        self.down = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.up(x))
        y = self.down(y * self.gate(y))
        return x + y if self.adds else y


def _efficientnet() -> nn.Module:
    rows = [
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
    ]
    body: list[nn.Module] = [_conv(3, 32, 3, 2)]
    channels = 32
    for expand, outputs, depth, stride, size in rows:
        for number in range(depth):
            body.append(_Excited(channels, outputs, size, 1 if number else stride, expand))
            channels = outputs
    return _classifier(*body, _conv(channels, 1280), channels=1280)


class _Towers(nn.Module):
    """Two networks of different inputs that meet at the end: a ResNet-18 on images, and a transformer on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.embed = NETWORKS["resnet18"].make(), nn.Embedding(8000, 384)
        layer = nn.TransformerEncoderLayer(384, 6, 1536, batch_first=True)
        self.text, self.head = nn.TransformerEncoder(layer, 6), nn.Linear(384, 1000)

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        text = self.head(self.text(self.embed(tokens)).mean(1))
        return functional.normalize(self.image(image), dim=-1) @ functional.normalize(text, dim=-1).T


class _Bert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.model = BertModel(BertConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).last_hidden_state


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return Logits(ViTForImageClassification(ViTConfig()))


def _transformer() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Transformer(512, 8, 6, 6, batch_first=True), (torch.randn(1, 64, 512), torch.randn(1, 48, 512))


def _tokens(most: int) -> Tensor:
    return torch.randint(0, most, (1, 128))


def _on_image(make: Callable[[], nn.Module], size: int = 224) -> SplitNetwork:
    return lambda: (make(), (torch.randn(1, 3, size, size),))


SPLIT_NETWORKS: dict[str, SplitNetwork] = {
    **{name: _on_image(NETWORKS[name].make) for name in ("resnet50", "mobilenet_v2", "vgg11")},
    "efficientnet": _on_image(_efficientnet),
    "densenet121": _on_image(_densenet),
    "shufflenet_v2": _on_image(_shufflenet),
    "inception": _on_image(_inception),
    "unet": _on_image(lambda: UNet(64), 128),
    "vit_b": _on_image(_vit),
    "bert": lambda: (_Bert(), (_tokens(30000),)),
    "encoder_decoder": _transformer,
    "two_towers": lambda: (_Towers(), (torch.randn(1, 3, 224, 224), _tokens(8000))),
}
