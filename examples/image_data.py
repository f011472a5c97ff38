"""Fashion-MNIST and CIFAR-10 as uint8 tensors, and augmented batches of them, for the examples that train."""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from surgery.errors import FileError, InputError
from tools.train_demo import DATA, read_split

__all__ = ["Data", "augment", "batches", "read_data"]

MAX_SHIFT = 2


@dataclass(frozen=True)
class Data:
    """Uint8 images (N, C, H, W) and labels of both splits, and the mean and deviation of the training pixels."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: Tensor
    std: Tensor

    def normalised(self, images: Tensor) -> Tensor:
        """Return uint8 images as the normalised floats that the network takes."""
        return (images.float() / 255 - self.mean) / self.std

    def to(self, device: str) -> Data:
        """Return the data on another device."""
        return Data(*(getattr(self, field.name).to(device) for field in fields(self)))


def read_data(name: str, path: Path | None, count: int | None) -> Data:
    """Return a data set, or a sample of its training split.

    Raises:
        FileError: the files are missing, or do not belong to this data set.
    """
    rows = _read_fashion(path or DATA) if name == "fashion" else _read_cifar(path)
    images, labels = rows[0], rows[1]
    if count is not None:  # at random: a file may have its images in order of class
        some = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:count]
        images, labels = images[some], labels[some]
    pixels = images.float() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))
    return Data(images, labels, rows[2], rows[3], mean[:, None, None], std[:, None, None])


def _read_fashion(folder: Path) -> tuple[Tensor, ...]:
    train, test = read_split(folder, "train"), read_split(folder, "t10k")
    return train.images, train.labels, test.images, test.labels


def _read_cifar(path: Path | None) -> tuple[Tensor, ...]:
    if path is None or not path.is_file():
        step = "give the .npz file of JPEG images as --path FILE, or take --data fashion"
        raise FileError(f"{path or 'the CIFAR-10 file'} does not exist", next_step=step)
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("CIFAR-10 is stored as JPEG images", next_step="pip install pillow") from error
    rows = []
    with np.load(path) as file:
        for split in ("train", "test"):
            stream, offsets = file[f"{split}_jpg"].tobytes(), file[f"{split}_off"]
            files = (io.BytesIO(stream[start:end]) for start, end in itertools.pairwise(offsets))
            images = np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])
            rows += [torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(file[f"{split}_y"])]
    return rows[0], rows[1].long(), rows[2], rows[3].long()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each image shifted by up to `MAX_SHIFT` pixels each way, and mirrored in half the cases.

    The shifts depend only on the generator, which is on the CPU, and not on the device of the images.
    """
    count, channels, height, width = images.shape
    padded = functional.pad(images, (MAX_SHIFT,) * 4)
    down, right = torch.randint(2 * MAX_SHIFT + 1, (2, count, 1), generator=generator).to(images.device)
    mirrored = (torch.rand(count, 1, generator=generator) < 0.5).to(images.device)
    steps = torch.arange(width, device=images.device)
    rows = (down + torch.arange(height, device=images.device))[:, None, :, None]
    columns = (right + torch.where(mirrored, steps.flip(0), steps))[:, None, None, :]
    which = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    return padded[which, channel, rows, columns]


def batches(data: Data, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one shuffled, augmented epoch; the incomplete last batch is left out."""
    order = torch.randperm(len(data.labels), generator=generator).to(data.labels.device)
    for index in order[: len(order) // size * size].view(-1, size):
        yield data.normalised(augment(data.images[index], generator)), data.labels[index]
