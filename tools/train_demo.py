"""Trains the network of the demo on Fashion-MNIST; writes `fashion_resnet.pt2` and `fashion_sample.npz`.

    OMP_NUM_THREADS=2 python tools/train_demo.py

The images come from the Debian package `dataset-fashion-mnist` (`apt-get install dataset-fashion-mnist`). One seed
draws the weights, the order and the augmentation. The same machine, thread count and torch version give the same file.
The test images influence no choice: they are used once, at the end, by the exported program loaded from its file.
"""

from __future__ import annotations

import argparse
import gzip
import struct
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from examples.fashion_resnet import FashionResNet, build
from surgery.errors import FileError, InputError, SurgeryError

ROOT = Path(__file__).resolve().parent.parent
DATA = Path("/usr/share/datasets/fashion-mnist")
OUT = ROOT / "examples" / "data"
MODEL_NAME, SAMPLE_NAME = "fashion_resnet.pt2", "fashion_sample.npz"
INSTALL = "run `apt-get install dataset-fashion-mnist`, or give the folder of the four files as --data FOLDER"
SIDE = 28
MAX_SHIFT = 2
EVAL_BATCH = 500


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, 1, 28, 28) and their labels int64 (N)."""

    images: Tensor
    labels: Tensor

    def head(self, count: int) -> Split:
        """Return the first `count` images with their labels."""
        return Split(self.images[:count], self.labels[:count])


@dataclass(frozen=True)
class Recipe:
    """How to train: SGD with Nesterov momentum under one learning-rate cycle."""

    epochs: int
    batch: int
    peak_lr: float
    weight_decay: float
    label_smoothing: float
    seed: int
    bf16: bool


def read_idx(path: Path, *, magic: int) -> np.ndarray:
    """Return the uint8 array of one gzipped IDX file; the last byte of `magic` is its number of dimensions."""
    if not path.is_file():
        raise FileError(f"{path} does not exist", next_step=INSTALL)
    try:
        raw = gzip.decompress(path.read_bytes())
        found, *shape = struct.unpack_from(f">{1 + magic % 256}I", raw)
        values = np.frombuffer(raw, dtype=np.uint8, offset=4 * (1 + len(shape)))
        if found != magic:
            raise ValueError(f"its magic number is {found}")
        return values.reshape(shape).copy()
    except (OSError, EOFError, ValueError, struct.error) as error:
        allowed = f"a gzipped IDX file with magic number {magic}"
        raise FileError(f"{path} cannot be read: {error}", allowed=allowed, next_step=INSTALL) from error


def read_split(folder: Path, prefix: str) -> Split:
    """Return the split named `prefix` ("train" or "t10k")."""
    images = read_idx(folder / f"{prefix}-images-idx3-ubyte.gz", magic=0x0803)
    labels = read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", magic=0x0801)
    if images.shape != (len(labels), SIDE, SIDE):
        allowed = f"({len(labels)}, {SIDE}, {SIDE}), one image a label"
        raise FileError(f"the {prefix} images in {folder} have shape {images.shape}", allowed=allowed)
    return Split(torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long())


def to_float(images: Tensor) -> Tensor:
    """Return uint8 images as the float32 in 0..1 that the model takes."""
    return images.float() / 255


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return each uint8 image shifted by up to `MAX_SHIFT` pixels each way, and mirrored in half the cases."""
    count = len(images)
    padded = functional.pad(images, (MAX_SHIFT,) * 4).squeeze(1)
    shifts = torch.randint(2 * MAX_SHIFT + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5
    steps = torch.arange(SIDE)
    rows = shifts[0] + steps
    columns = shifts[1] + torch.where(mirrored, steps.flip(0), steps)
    which = torch.arange(count)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def batches(split: Split, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one shuffled, augmented epoch as (float32 images, labels); the incomplete last batch is left out."""
    order = torch.randperm(len(split.labels), generator=generator)
    for index in order[: len(order) // size * size].view(-1, size):
        yield to_float(augment(split.images[index], generator)), split.labels[index]


def make_optimizer(
    model: FashionResNet, recipe: Recipe, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return the optimizer, which decays only matrices and kernels, and its cycle over all `steps`."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=recipe.peak_lr, momentum=0.9, nesterov=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_lr, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    return optimizer, cycle


def train(split: Split, recipe: Recipe) -> FashionResNet:
    """Return the trained network in eval mode; print one line for each epoch."""
    torch.manual_seed(recipe.seed)
    generator = torch.Generator().manual_seed(recipe.seed)
    model = build()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub leaves it out
    pixels = to_float(split.images)
    model.mean.fill_(pixels.mean())
    model.std.fill_(pixels.std())
    steps = len(split.labels) // recipe.batch
    optimizer, cycle = make_optimizer(model, recipe, steps * recipe.epochs)
    start = time.perf_counter()
    for epoch in range(1, recipe.epochs + 1):
        loss_sum, hits = 0.0, 0
        for images, labels in batches(split, recipe.batch, generator):
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
                logits = model(images.contiguous(memory_format=torch.channels_last))
            loss = functional.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cycle.step()
            loss_sum += loss.item()
            hits += int((logits.argmax(1) == labels).sum())
        accuracy = hits / (steps * recipe.batch)
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch:3d}: train loss {loss_sum / steps:.4f}, accuracy {accuracy:.2%}, {seconds:.0f} s", flush=True
        )
    model.eval()
    return model


def save_model(model: FashionResNet, path: Path) -> None:
    """Export with a dynamic batch and write the archive, whole or not at all."""
    plain = build().eval()  # contiguous weights: strides of channels_last would be baked into the archive
    plain.load_state_dict({name: value.contiguous() for name, value in model.state_dict().items()})
    example = (torch.zeros(2, 1, SIDE, SIDE),)  # two images: export takes a batch of one for a constant
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(plain, example, dynamic_shapes=({0: batch},))
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        torch.export.save(program, written)
        written.replace(path)


def save_sample(split: Split, path: Path) -> None:
    """Write `images` uint8 (N, 28, 28) and `labels` uint8 (N), compressed."""
    images = split.images.squeeze(1).numpy()
    labels = split.labels.numpy().astype(np.uint8)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        written = Path(folder) / path.name
        np.savez_compressed(written, images=images, labels=labels)
        written.replace(path)


def load_sample(path: Path) -> Split:
    """Return the sample read back from its file."""
    with np.load(path, allow_pickle=False) as arrays:
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"])
    return Split(images.unsqueeze(1), labels.long())


@torch.no_grad()
def predict(model: torch.nn.Module, images: Tensor) -> Tensor:
    """Return logits (N, 10) of uint8 images, in batches."""
    return torch.cat([model(to_float(part)) for part in images.split(EVAL_BATCH)])


def measure_accuracy(model: torch.nn.Module, split: Split) -> float:
    """Return the share of images whose largest logit is at the label."""
    return float((predict(model, split.images).argmax(1) == split.labels).double().mean())


def check(trained: FashionResNet, path: Path, images: Tensor) -> torch.nn.Module:
    """Return the program loaded from `path`, after checking that it is the trained network.

    Its state dict must fit the original class, its logits must be those of the trained network, and it must accept any
    batch size.
    """
    program = torch.export.load(path)
    original = build().eval()
    original.load_state_dict(program.state_dict, strict=True)
    loaded = program.module()
    expected = predict(trained, images)
    for count in (1, 3, len(images)):
        for model in (loaded, original):
            # float32 sums of up to 128 x 9 products, in an order that depends on the memory format
            torch.testing.assert_close(predict(model, images[:count]), expected[:count], rtol=1e-4, atol=1e-4)
    return loaded


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options; the defaults are the recipe of the shipped file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the four IDX .gz files (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to (%(default)s)")
    parser.add_argument("--limit", type=int, help="train on the first LIMIT images only, to try the script out")
    parser.add_argument("--sample", type=int, default=2000, help="test images in the sample (%(default)s)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the training images (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, help="images a step (%(default)s)")
    parser.add_argument("--peak-lr", type=float, default=0.2, help="top of the learning-rate cycle (%(default)s)")
    parser.add_argument("--weight-decay", type=float, default=5e-4, help="on matrices and kernels (%(default)s)")
    parser.add_argument("--label-smoothing", type=float, default=0.05, help="share spread evenly (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (%(default)s)")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True, help="train under autocast")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Train, write, load back, check and print what was measured."""
    train_split, test_split = read_split(options.data, "train"), read_split(options.data, "t10k")
    train_split = train_split.head(options.limit or len(train_split.labels))
    recipe = Recipe(**{name: getattr(options, name) for name in Recipe.__dataclass_fields__})
    if not (recipe.epochs >= 1 and 1 <= recipe.batch <= len(train_split.labels)):
        what = f"{recipe.epochs} epochs of {recipe.batch} images a step"
        raise InputError(what, allowed=f"at least one epoch, and 1..{len(train_split.labels)} images a step")
    options.out.mkdir(parents=True, exist_ok=True)
    model_path, sample_path = options.out / MODEL_NAME, options.out / SAMPLE_NAME
    start = time.perf_counter()
    trained = train(train_split, recipe)
    seconds = time.perf_counter() - start
    save_model(trained, model_path)
    save_sample(test_split.head(options.sample), sample_path)
    sample = load_sample(sample_path)
    loaded = check(trained, model_path, sample.images)
    print(recipe)
    print(f"parameters          {sum(p.numel() for p in trained.parameters()):>12,}")
    print(f"training seconds    {seconds:>12.0f}  ({torch.get_num_threads()} threads)")
    print(f"accuracy, test set  {measure_accuracy(loaded, test_split):>12.2%}  ({len(test_split.labels):,} images)")
    print(f"accuracy, sample    {measure_accuracy(loaded, sample):>12.2%}  ({len(sample.labels):,} images)")
    for path in (model_path, sample_path):
        print(f"{path.name:20s}{path.stat().st_size:>12,}  bytes")


def main() -> None:
    """Run as a command; an expected error is one line."""
    try:
        run(parse())
    except SurgeryError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_status)


if __name__ == "__main__":
    main()
