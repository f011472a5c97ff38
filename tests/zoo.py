"""Small whole networks, and the graph kinds they come in.

``ZOO[name]()`` builds a network in eval mode, with seeded weights of decaying spectrum and batch norms that have seen
data, and its example inputs: a tuple (positional) or a dict (by keyword), with a batch of 2.
``GRAPH_KINDS[kind](model, inputs)`` turns it into a graph. ``graph(name, kind)`` does both once a session: do not
mutate what it returns.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils.parametrizations import weight_norm

from tests.cases import decaying

Inputs = tuple[Any, ...] | dict[str, Any]
Builder = Callable[[], tuple[nn.Module, Inputs]]


# --- building blocks -----------------------------------------------------------------------------------------------


def conv_bn(columns: int, rows: int, size: int = 3, stride: int = 1, *, groups: int = 1, act: bool = True) -> nn.Module:
    parts = [nn.Conv2d(columns, rows, size, stride, size // 2, groups=groups, bias=False), nn.BatchNorm2d(rows)]
    return nn.Sequential(*parts, *([nn.ReLU()] if act else []))


class Residual(nn.Module):
    """A body with a shortcut, projected where the shape changes."""

    def __init__(self, body: nn.Module, columns: int, rows: int, stride: int) -> None:
        super().__init__()
        self.body = body
        same = columns == rows and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(columns, rows, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def basic(columns: int, rows: int, stride: int) -> nn.Module:
    body = nn.Sequential(conv_bn(columns, rows, 3, stride), conv_bn(rows, rows, act=False))
    return Residual(body, columns, rows, stride)


def bottleneck(columns: int, rows: int, stride: int) -> nn.Module:
    middle = rows // 2
    inner = conv_bn(columns, middle, 1), conv_bn(middle, middle, 3, stride)
    body = nn.Sequential(*inner, conv_bn(middle, rows, 1, act=False))
    return Residual(body, columns, rows, stride)


def inverted(columns: int, rows: int, stride: int, expand: int = 3) -> nn.Module:
    """MobileNetV2's block: expand, depthwise, project."""
    wide = columns * expand
    return nn.Sequential(
        conv_bn(columns, wide, 1), conv_bn(wide, wide, 3, stride, groups=wide), conv_bn(wide, rows, 1, act=False)
    )


def classifier(*body: nn.Module, channels: int, dims: int = 2) -> nn.Module:
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dims - 1]
    return nn.Sequential(*body, pool(1), nn.Flatten(), nn.Linear(channels, 10))


# --- hand-written networks -----------------------------------------------------------------------------------------


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand, self.project = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.scale * self.project(F.gelu(self.expand(y)))
        return x + y.permute(0, 3, 1, 2)


class UNet(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = conv_bn(3, width), conv_bn(width, 2 * width, stride=2)
        self.middle = conv_bn(2 * width, 4 * width, stride=2)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.merge2 = conv_bn(4 * width, 2 * width)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1)
        self.merge1 = conv_bn(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(first)
        y = self.merge2(torch.cat([self.up2(self.middle(second)), second], dim=1))
        return self.head(self.merge1(torch.cat([self.up1(y), first], dim=1)))


class Tied(nn.Module):
    """Two linear layers with one weight and a bias each."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(12, width), nn.Linear(width, 5)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(F.relu(self.second(F.relu(self.first(self.enter(x))))))


class CalledTwice(nn.Module):
    """One convolution called on two input shapes, one linear layer called twice on the same."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.shared = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.twice, self.head = nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(self.shared(x)).mean((2, 3)) + F.relu(self.shared(F.avg_pool2d(x, 2))).mean((2, 3))
        return self.head(F.relu(self.twice(F.relu(self.twice(x)))))


class TwoNames(nn.Module):
    """One module registered under two names, and called by both."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.alias = self.conv
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alias(F.relu(self.conv(self.stem(x)))).mean((2, 3)))


class Functional(nn.Module):
    """Parameters of its own under F.conv2d, F.conv_transpose2d and F.linear."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.offset = nn.Parameter(torch.randn(8, 3, 3, 3) / 5), nn.Parameter(torch.randn(8))
        self.grouped = nn.Parameter(torch.randn(12, 4, 3, 3) / 6)
        self.upward = nn.Parameter(torch.randn(12, 8, 2, 2) / 5)
        self.matrix, self.shift = nn.Parameter(torch.randn(6, 8) / 3), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.conv2d(x, self.kernel, self.offset, stride=(2, 1), padding=1))
        x = F.relu(F.conv2d(x, self.grouped, None, padding=(1, 2), dilation=(1, 2), groups=2))
        x = F.conv_transpose2d(x, self.upward, stride=2)
        return F.linear(x.mean((2, 3)), self.matrix, self.shift)


class Attention(nn.Module):
    """nn.MultiheadAttention, whose three projections share one packed weight."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norm, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head((x + self.mlp(x)).mean(1))


class Recurrent(nn.Module):
    """An LSTM of two layers behind an embedding, then a GRU in both directions that starts from its last states."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(30, width), nn.LSTM(width, 16, num_layers=2, batch_first=True)
        self.gru = nn.GRU(16, 16, bidirectional=True)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        states, (last, _) = self.lstm(self.embedding(tokens))
        return self.head(self.gru(states.transpose(0, 1), last)[0].mean(0))


class ControlFlow(nn.Module):
    """Branches and loops over shapes, which torch.export follows and torch.fx's symbolic tracing cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.small = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.rows = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x) if x.shape[-1] > 4 else self.small(x)
        parts = [self.rows(y[:, :, i].mean(-1)) for i in range(y.shape[2] // 3)]
        return torch.stack(parts, dim=1)


# --- finishing -----------------------------------------------------------------------------------------------------


def images(*size: int) -> Inputs:
    return (torch.randn(2, *size),)


def tokens(vocabulary: int, length: int) -> Tensor:
    return torch.randint(0, vocabulary, (2, length))


@contextlib.contextmanager
def seeded(name: str) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(zlib.crc32(name.encode()))
        yield


def season(model: nn.Module) -> nn.Module:
    """Give weights a decaying spectrum, norms a life behind them and biases a value; return it in eval mode."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not bool(parameter.any()):
                parameter.normal_(std=0.1)
            parameter.copy_(decaying(parameter))
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(std=0.3)
                module.running_var.uniform_(0.5, 2.0)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
    return model.eval()


def network(build: Callable[[], nn.Module], inputs: Callable[[], Inputs]) -> Builder:
    """A builder that gives the same network and inputs each time."""

    def built() -> tuple[nn.Module, Inputs]:
        with seeded("zoo"):
            return season(build()), inputs()

    return built


def weight_normed() -> tuple[nn.Module, Inputs]:
    with seeded("weight norm"):
        layers = season(nn.Sequential(nn.Conv1d(4, 12, 5, padding=2), nn.ReLU(), nn.Conv1d(12, 6, 3, stride=2)))
        weight_norm(layers[0])
        weight_norm(layers[2])
        return layers.eval(), images(4, 16)


# --- from transformers (random weights; nothing is downloaded) -----------------------------------------------------


def architecture(
    model: str,
    config: str,
    inputs: Callable[[], Inputs],
    change: Callable[[Any], object] = lambda network: None,
    **options: Any,
) -> Builder:
    def built() -> tuple[nn.Module, Inputs]:
        import transformers

        with seeded(model):
            network = getattr(transformers, model)(getattr(transformers, config)(**options))
            change(network)
            return season(network), inputs()

    return built


def without_repeats(model: Any) -> None:
    """Leave out the blocks of a MobileNetV2 that are like the one before, all but the first: they show nothing new."""
    layers = model.mobilenet_v2.layer
    first = next(block for block in layers if block.use_residual)
    model.mobilenet_v2.layer = nn.ModuleList(b for b in layers if b is first or not b.use_residual)


_CNN_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
_TRANSFORMER: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def masked_tokens() -> Inputs:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": tokens(40, 9), "attention_mask": mask}


ZOO: dict[str, Builder] = {
    "resnet-basic": network(
        lambda: classifier(conv_bn(3, 8), basic(8, 8, 1), basic(8, 16, 2), channels=16), lambda: images(3, 16, 16)
    ),
    "resnet-bottleneck": network(
        lambda: classifier(conv_bn(3, 16), bottleneck(16, 16, 1), bottleneck(16, 32, 2), channels=32),
        lambda: images(3, 16, 16),
    ),
    "mobilenet": network(
        lambda: classifier(conv_bn(3, 8, stride=2), inverted(8, 12, 1), inverted(12, 16, 2), channels=16),
        lambda: images(3, 16, 16),
    ),
    "convnext": network(
        lambda: classifier(nn.Conv2d(3, 8, 4, stride=4), ConvNeXtBlock(8), ConvNeXtBlock(8), channels=8),
        lambda: images(3, 16, 16),
    ),
    "unet": network(UNet, lambda: images(3, 16, 16)),
    "cnn-1d": network(
        lambda: classifier(
            nn.Conv1d(4, 12, 5, padding="same"), nn.ReLU(),
            nn.Conv1d(12, 12, 3, padding="same", dilation=2), nn.ReLU(),
            nn.Conv1d(12, 16, 3, stride=2, padding=1, padding_mode="circular"), nn.ReLU(),
            channels=16, dims=1,
        ),
        lambda: images(4, 24),
    ),
    "cnn-3d": network(
        lambda: classifier(
            nn.Conv3d(2, 8, 3, padding=1), nn.ReLU(), nn.Conv3d(8, 12, (1, 3, 3), stride=(1, 2, 2)), nn.ReLU(),
            channels=12, dims=3,
        ),
        lambda: images(2, 5, 8, 8),
    ),
    "mlp": network(
        lambda: nn.Sequential(
            nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 16, bias=False), nn.ReLU(), nn.Linear(16, 4)
        ),
        lambda: images(20),
    ),
    "tied": network(Tied, lambda: images(12)),
    "called-twice": network(CalledTwice, lambda: images(3, 12, 12)),
    "two-names": network(TwoNames, lambda: images(3, 8, 8)),
    "functional": network(Functional, lambda: images(3, 10, 10)),
    "attention": network(Attention, lambda: images(7, 6)),
    "recurrent": network(Recurrent, lambda: (tokens(30, 6),)),
    "weight-norm": weight_normed,
    "control-flow": network(ControlFlow, lambda: images(3, 9, 9)),
    "hf-resnet": architecture(
        "ResNetForImageClassification", "ResNetConfig", lambda: images(3, 32, 32),
        embedding_size=8, layer_type="basic", **_CNN_STAGES,
    ),
    "hf-mobilenet": architecture(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", lambda: images(3, 32, 32), without_repeats,
        depth_multiplier=0.1, min_depth=4, depth_divisible_by=4, finegrained_output=False, num_labels=5,
    ),
    "hf-convnext": architecture(
        "ConvNextForImageClassification", "ConvNextConfig", lambda: images(3, 32, 32), num_stages=2, **_CNN_STAGES
    ),
    "hf-vit": architecture(
        "ViTForImageClassification", "ViTConfig", lambda: images(3, 16, 16),
        image_size=16, patch_size=4, num_labels=5, **_TRANSFORMER,
    ),
    "hf-swin": architecture(
        "SwinForImageClassification", "SwinConfig", lambda: images(3, 32, 32),
        image_size=32, patch_size=4, embed_dim=8, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=5,
    ),
    "hf-bert": architecture(
        "BertForSequenceClassification", "BertConfig", masked_tokens,
        vocab_size=40, max_position_embeddings=16, num_labels=3, **_TRANSFORMER,
    ),
    "hf-gpt2": architecture(
        "GPT2LMHeadModel", "GPT2Config", lambda: {"input_ids": tokens(40, 9)},
        vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=2, use_cache=False, bos_token_id=0, eos_token_id=0,
    ),
}  # fmt: skip


# --- the graph kinds -----------------------------------------------------------------------------------------------


def call(model: Any, inputs: Inputs) -> Any:
    """Run a module or graph on its example inputs."""
    runnable = model.module() if isinstance(model, ExportedProgram) else model
    with torch.no_grad():
        return runnable(**inputs) if isinstance(inputs, dict) else runnable(*inputs)


def export(model: nn.Module, inputs: Inputs, *, dynamic: bool = False) -> ExportedProgram:
    args, kwargs = ((), inputs) if isinstance(inputs, dict) else (inputs, {})
    batch = Dim("batch", max=64)
    every = [{0: batch} for _ in inputs]
    shapes = dict(zip(inputs, every, strict=True)) if isinstance(inputs, dict) else tuple(every)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes .*_flat_weights", UserWarning)  # LSTM's own cache
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes if dynamic else None)


def trace(model: nn.Module, inputs: Inputs) -> torch.fx.GraphModule:
    """The graph of module calls; where symbolic tracing fails, the ATen graph."""
    try:
        traced = torch.fx.symbolic_trace(model)
        call(traced, inputs)
    except Exception:
        return export(model, inputs).module()
    return traced


GRAPH_KINDS: dict[str, Callable[[nn.Module, Inputs], Any]] = {
    "module": lambda model, inputs: model,
    "graph": trace,
    "aten-graph": lambda model, inputs: export(model, inputs).module(),
    "program": export,
    "program-dynamic": functools.partial(export, dynamic=True),
}

# The networks whose "graph" is a graph of modules; the others' is that of torch.export, with ATen calls.
TRACEABLE = {name for name in ZOO if not name.startswith("hf-")} - {"control-flow"}
# The kinds of each network that differ from one another: what cannot be traced comes as its ATen graph once.
KINDS_OF = {name: [kind for kind in GRAPH_KINDS if kind != "graph" or name in TRACEABLE] for name in ZOO}


@functools.cache
def graph(name: str, kind: str) -> tuple[Any, Inputs]:
    """Return the network as this graph kind, and its example inputs; made once a session, not to be mutated."""
    if kind == "aten-graph" or (kind == "graph" and name not in TRACEABLE):
        program, inputs = graph(name, "program")
        return program.module(), inputs
    model, inputs = ZOO[name]()
    return GRAPH_KINDS[kind](model, inputs), inputs
