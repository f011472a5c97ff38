"""Small architectures with random weights: those of torchvision in its own spelling, and those of transformers by name.

torchvision itself is not needed. Its networks are built here from their blocks, with ``inplace=True`` wherever
torchvision has it, because the output of torch.export depends on such spellings and not on sizes. The models of
transformers are built from small configurations; nothing is downloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["TORCHVISION", "TRANSFORMERS", "transformer"]

Inputs = tuple[Any, ...] | dict[str, Any]


def _conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, *, act: bool = True, **more: Any) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False, **more)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if act else []))


def _head(*body: nn.Module, channels: int) -> nn.Sequential:
    end = nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(1), nn.Dropout(0.2, inplace=True), nn.Linear(channels, 5)
    return nn.Sequential(*body, *end)


class _ResNetBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = _conv(width, width), _conv(width, width, act=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        out += x
        return self.relu(out)


class _DenseBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 8, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(16), nn.Conv2d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = torch.cat([x, self.conv1(F.relu(self.norm1(x), inplace=True))[:, :8]], 1)
        return torch.cat([first, self.conv2(F.relu(self.norm2(first), inplace=True))], 1)


class _Fire(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], 1)


class _Shuffle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(_conv(4, 4, 1), _conv(4, 4, 3, act=False, groups=4), _conv(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        out = torch.cat((kept, self.branch(changed)), dim=1)
        n, c, h, w = out.shape
        return out.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class _Excite(nn.Module):
    """Squeeze and excitation, with a choice of activations."""

    def __init__(self, act: nn.Module, scale: nn.Module) -> None:
        super().__init__()
        self.expand, self.act = _conv(8, 16, act=False), act
        self.fc1, self.fc2, self.scale = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1), scale
        self.project = _conv(16, 8, 1, act=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.expand(x))
        scale = self.scale(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(y, 1)), inplace=True)))
        return x + self.project(y * scale)


class _Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.three = _conv(8, 4, 1), nn.Sequential(_conv(8, 4, 1), _conv(4, 4))
        self.pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), _conv(8, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x), self.pooled(x), F.avg_pool2d(x, 3, 1, 1)], 1)


class _Pyramid(nn.Module):
    """DeepLabV3's spatial pyramid, enlarged to the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.dilated = _conv(3, 8, stride=2), nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.pool, self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1)), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.stem(x)
        pooled = F.interpolate(self.pool(y), size=y.shape[-2:], mode="bilinear", align_corners=False)
        out = self.head(torch.cat([self.dilated(y), pooled], 1))
        return {"out": F.interpolate(out, size=x.shape[-2:], mode="bilinear", align_corners=False)}


class _SwinShift(nn.Module):
    """Shifted windows of Swin: pad, roll, partition, attend with a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.qkv, self.norm = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 24), nn.LayerNorm(8)
        self.table = nn.Parameter(torch.randn(49, 2))
        self.register_buffer("index", torch.randint(0, 49, (16, 16)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(self.norm(self.patch(x).permute(0, 2, 3, 1)), (0, 0, 0, 1, 0, 1))[:, :8, :8]
        mask = x.new_zeros((8, 8))
        mask[0:4, 0:4] = 1
        x = torch.roll(x, shifts=(-2, -2), dims=(1, 2)).view(-1, 2, 4, 2, 4, 8).permute(0, 1, 3, 2, 4, 5)
        q, k, v = self.qkv(x.reshape(-1, 16, 8)).reshape(-1, 16, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = q * 4**-0.5 @ k.transpose(-2, -1) + self.table[self.index.view(-1)].view(16, 16, 2).permute(2, 0, 1)
        scores = scores.masked_fill(mask.view(-1)[:16] == 0, -100.0)
        return (F.softmax(scores, dim=-1) @ v).transpose(1, 2).flatten(2)


def _image(size: int = 32) -> Inputs:
    return (torch.randn(2, 3, size, size),)


def _plain(*layers: nn.Module) -> Callable[[], tuple[nn.Module, Inputs]]:
    return lambda: (nn.Sequential(*layers), _image())


def _encoder() -> tuple[nn.Module, Inputs]:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    return nn.TransformerEncoder(layer, 2), (torch.randn(2, 5, 8),)


def _training() -> tuple[nn.Module, Inputs]:
    """A network in training mode: its batch norms count their batches."""
    return _head(_conv(3, 8), nn.Dropout2d(0.1, inplace=True), channels=8).train(), _image()


def _video() -> tuple[nn.Module, Inputs]:
    body = nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(inplace=True), nn.AdaptiveAvgPool3d(1)
    return nn.Sequential(*body, nn.Flatten()), (torch.randn(2, 3, 4, 8, 8),)


TORCHVISION: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "AlexNet": lambda: (_head(nn.Conv2d(3, 8, 5, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2), channels=8), _image()),
    "VGG": lambda: (_head(_conv(3, 8), nn.MaxPool2d(2, 2), _conv(8, 8), channels=8), _image()),
    "ResNet": lambda: (_head(_conv(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1), _ResNetBlock(8), channels=8), _image()),
    "DenseNet": lambda: (_head(_conv(3, 8), _DenseBlock(8), nn.AvgPool2d(2, 2), channels=24), _image()),
    "SqueezeNet": lambda: (_head(_conv(3, 8), _Fire(), nn.MaxPool2d(3, 2, ceil_mode=True), channels=16), _image()),
    "ShuffleNet": lambda: (_head(_conv(3, 8), _Shuffle(), channels=8), _image()),
    "GoogLeNet": lambda: (_head(_conv(3, 8), nn.LocalResponseNorm(3), _Inception(), channels=20), _image()),
    "MobileNetV2": lambda: (_head(_conv(3, 8, groups=1), nn.ReLU6(inplace=True), channels=8), _image()),
    "MobileNetV3": lambda: (
        _head(_conv(3, 8), _Excite(nn.Hardswish(inplace=True), nn.Hardsigmoid(inplace=True)), channels=8), _image()
    ),
    "EfficientNet": lambda: (
        _head(_conv(3, 8), _Excite(nn.SiLU(inplace=True), nn.Sigmoid()), channels=8), _image()
    ),
    "DeepLabV3": lambda: (_Pyramid(), _image()),
    "Swin": lambda: (_SwinShift(), _image()),
    "R3D": _video,
    "TransformerEncoder": _encoder,
    "in training": _training,
}  # fmt: skip

_SMALL: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 64, "d_model": 16, "encoder_layers": 1,
    "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32, "d_ff": 32, "d_kv": 8, "num_layers": 2, "num_heads": 2, "n_embd": 16, "n_layer": 2,
    "n_head": 2, "n_positions": 64, "image_size": 32, "patch_size": 8, "embedding_size": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "ffn_dim": 32, "word_embed_proj_dim": 16, "dim": 16, "n_layers": 2,
    "n_heads": 2, "hidden_dim": 32, "emb_dim": 16, "decoder_start_token_id": 1, "use_cache": False, "d_inner": 32,
    "state_size": 4, "rotary_dim": 4, "num_codebooks": 2, "n_ctx": 64, "dff": 32, "ffn_hidden_size": 32,
}  # fmt: skip

# model types of transformers whose small configurations export; each with what it needs beyond _SMALL
_TYPES = """
    albert apertus arcee bart beit bert bert-generation big_bird biogpt bitnet blenderbot camembert canine
    clip_text_model clip_vision_model cohere cohere2 convbert ctrl data2vec-text data2vec-vision deberta deberta-v2
    deit dinov2 distilbert electra ernie esm falcon fnet gemma gemma2 glm gpt2 gpt_bigcode gpt_neox gptj granite
    helium ijepa layoutlm llama m2m_100 mamba marian mbart megatron-bert mistral mobilebert modernbert mpnet mpt mt5
    nemotron nystromformer olmo2 openai-gpt opt pegasus persimmon phi phi3 qwen2 qwen3 rembert roberta roformer
    segformer siglip_vision_model splinter squeezebert stablelm starcoder2 t5 umt5 vit vit_mae xglm xlm-roberta
    xlnet xmod yolos
"""
TRANSFORMERS: dict[str, dict[str, Any]] = {name: {} for name in _TYPES.split()}


def _inputs(model: Any) -> Inputs:
    ids = torch.randint(3, 60, (2, 9))
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 32, 32)}
    given = {"input_ids": ids}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids
    return {name: value for name, value in given.items() if name in inspect.signature(model.forward).parameters}


def transformer(kind: str) -> tuple[nn.Module, Inputs]:
    """Return a small model of this type, with random weights, and inputs by keyword."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    of_this: Any = CONFIG_MAPPING[kind]
    known = of_this().to_dict()
    small = {name: value for name, value in _SMALL.items() if isinstance(known.get(name), int | float | None)}
    config = of_this(**{name: small[name] for name in small if name in known} | TRANSFORMERS[kind])
    config.use_cache = False
    model = transformers.AutoModel.from_config(config).eval()
    return model, _inputs(model)
