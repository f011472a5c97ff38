"""Compare ADMM and fine-tuning with decomposition and fine-tuning of a trained CIFAR ResNet-20, at equal total epochs.

    python tools/bench_admm.py --weights resnet20.pt --data cifar10.npz --json admm.json
    python tools/bench_admm.py --weights resnet20.pt --data cifar10.npz --quick      # one method, few images

    decompose    decompose the trained network, and fine-tune it for all epochs
    admm         train it under the constraint for some of the epochs, decompose it, and fine-tune it for the others
    dense        go on training the dense network for all epochs, as a reference

The first two have the ranks of one plan, made from the trained weights, and the same batches, optimizer (SGD with
momentum) and peak learning rate. The rate rises over a fifth of each phase, then falls to zero. `cut` is the accuracy
right after the decomposition, and `accuracy` that at the end. `error` is the relative error of the decomposed weights,
and `residual` the last ||W - Z|| / ||W|| of ADMM; both are means over the sites, `error` weighted by parameters. Rows
that are already in the JSON file are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional
from torch.optim import SGD
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from examples.image_data import Data, batches, read_data
from surgery.errors import FileError, SurgeryError
from surgery.passes.decompose import decompose
from surgery.passes.preview import plan
from surgery.passes.results import DecomposeResult
from surgery.system.machine import cpu_name
from surgery.training.admm import ADMM
from tools.trained import ResNet20

METHODS = ("tt", "tucker")
SHARES = (1 / 2, 1 / 3)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # those that the weights were trained with
BATCH = 128


@dataclass(frozen=True)
class Task:
    """The settings of all rows: images, epochs in total and under ADMM, peak learning rate, weight of the penalty."""

    images: int
    test_images: int
    epochs: int
    admm_epochs: int
    rate: float
    rho: float


@dataclass(frozen=True)
class Row:
    """One way at one size, with one seed."""

    method: str
    keep_params: float
    way: str
    seed: int
    task: Task
    parameters: int
    cut: float
    accuracy: float
    error: float
    residual: float
    seconds: float

    @property
    def what(self) -> tuple[str, float, str]:
        """The settings of the row apart from the seed."""
        return self.method, self.keep_params, self.way


def load_network(path: Path, device: str) -> ResNet20:
    """Return the trained network."""
    if not path.is_file():
        raise FileError(f"{path} does not exist", next_step="give a state dict of a CIFAR ResNet-20 as --weights FILE")
    model = ResNet20()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def load_images(path: Path, task: Task) -> Data:
    """Return a random sample of the images, normalised as in training; the file has them in order of class."""
    data = read_data("cifar", path, None)
    mean, std = (torch.tensor(row)[:, None, None] for row in (MEAN, STD))
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(data.labels), generator=generator)[: task.images]
    test = torch.randperm(len(data.test_labels), generator=generator)[: task.test_images]
    return Data(data.images[some], data.labels[some], data.test_images[test], data.test_labels[test], mean, std)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Return the share of test images that are classified correctly."""
    model.eval()
    right = 0
    for images, labels in zip(data.test_images.split(500), data.test_labels.split(500), strict=True):
        x = data.normalised(images).contiguous(memory_format=torch.channels_last)
        right += int((model(x).argmax(1) == labels).sum())
    return right / len(data.test_labels)


def train(model: nn.Module, data: Data, task: Task, epochs: int, generator: torch.Generator) -> None:
    """Train for some epochs."""
    optimizer, scheduler = make_optimizer(model, task, epochs)
    for _ in range(epochs):
        epoch(model, optimizer, scheduler, data, generator)


def make_optimizer(model: nn.Module, task: Task, epochs: int) -> tuple[SGD, LRScheduler]:
    """Return SGD with the usual settings for this network, and a scheduler for all steps of the given epochs."""
    optimizer = SGD(model.parameters(), lr=task.rate, momentum=0.9, weight_decay=1e-4)
    steps = max(1, epochs * (task.images // BATCH))
    return optimizer, OneCycleLR(optimizer, task.rate, total_steps=steps, pct_start=0.2, cycle_momentum=False)


def epoch(model: nn.Module, optimizer: SGD, scheduler: LRScheduler, data: Data, generator: torch.Generator) -> None:
    """Take the steps of one epoch."""
    model.train()
    for images, labels in batches(data, BATCH, generator):
        optimizer.zero_grad()
        x = images.contiguous(memory_format=torch.channels_last)
        functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
        scheduler.step()


def constrain(model: nn.Module, data: Data, task: Task, generator: torch.Generator, method: str, ranks: str) -> ADMM:
    """Train under the constraint."""
    optimizer, scheduler = make_optimizer(model, task, task.admm_epochs)
    inputs = data.normalised(data.test_images[:1])
    run = ADMM(
        model,
        optimizer,
        ranks,
        example_inputs=inputs,
        factorization=method,
        rho=task.rho,
        epochs=task.admm_epochs,
    )
    for index in range(task.admm_epochs):
        epoch(model, optimizer, scheduler, data, generator)
        run.end_epoch(index)
    return run


def mean_error(result: DecomposeResult[Any]) -> float:
    """Return the mean of the weight errors, weighted by parameters."""
    total = sum(change.dense_parameters for change in result.changes)
    return sum(change.error * change.dense_parameters for change in result.changes) / total


def measure(weights: Path, data: Data, task: Task, seed: int, method: str, share: float, way: str) -> Row:
    """Run one method with one seed."""
    start, generator = time.perf_counter(), torch.Generator().manual_seed(seed)
    model: nn.Module = load_network(weights, data.images.device.type)
    inputs, ranks = data.normalised(data.test_images[:1]), f"keep_params={share:.4f}"
    left, error, residual = task.epochs, 0.0, 0.0
    if way == "admm":
        run = constrain(model, data, task, generator, method, ranks)
        result, left = run.finish(), task.epochs - task.admm_epochs
        residual = sum(run.residuals[-1].values()) / len(run.residuals[-1])
    elif way == "decompose":
        result = decompose(model, inputs, ranks=plan(model, inputs, ranks=ranks, factorization=method))
    if way != "dense":
        model, error = result.model, mean_error(result)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch types it by position alone
    cut = accuracy(model, data)
    train(model, data, task, left, generator)
    count = sum(parameter.numel() for parameter in model.parameters())
    found = accuracy(model, data)
    return Row(method, share, way, seed, task, count, cut, found, error, residual, time.perf_counter() - start)


def show(rows: list[Row]) -> Table:
    """Return the table: means over the seeds, and the extremes of the accuracy at the end."""
    task, seeds = rows[0].task, len({row.seed for row in rows})
    about = f"{task.epochs} epochs in all, {task.admm_epochs} of them ADMM, {task.images} images, {seeds} seeds"
    table = Table(title=f"ResNet-20 on CIFAR-10; {about}")
    for column in ("method", "kept", "way", "parameters", "error", "residual", "cut %", "accuracy %", "from", "to"):
        table.add_column(column, justify="left" if column in ("method", "way") else "right")
    for what in dict.fromkeys(row.what for row in rows):
        same = [row for row in rows if row.what == what]
        cuts, ends = [100 * row.cut for row in same], [100 * row.accuracy for row in same]
        errors, residuals = [row.error for row in same], [row.residual for row in same]
        means = f"{mean(errors):.3f}", f"{mean(residuals):.3f}", f"{mean(cuts):.2f}", f"{mean(ends):.2f}"
        method, kept, way = what
        spread = f"{min(ends):.2f}", f"{max(ends):.2f}"
        table.add_row(method, f"{kept:.2f}", way, f"{same[0].parameters:,}", *means, *spread)
    return table


def read_rows(path: Path | None) -> list[Row]:
    """Return the rows of earlier runs."""
    if path is None or not path.is_file():
        return []
    return [Row(**{**row, "task": Task(**row["task"])}) for row in json.loads(path.read_text())["rows"]]


def device_name(device: str) -> str:
    """Return the name of the device that trained the rows."""
    return torch.cuda.get_device_name() if device == "cuda" else cpu_name()


def write_rows(path: Path | None, rows: list[Row], device: str) -> None:
    """Write all rows."""
    if path is not None:
        versions = {"torch": torch.__version__, "threads": torch.get_num_threads(), "device": device_name(device)}
        path.write_text(json.dumps({**versions, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="state dict of a CIFAR ResNet-20")
    parser.add_argument("--data", type=Path, required=True, help=".npz file of CIFAR-10 as JPEG images")
    parser.add_argument("--epochs", type=int, default=12, help="of each row, in total")
    parser.add_argument("--admm-epochs", type=int, help="half of them by default")
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--rho", type=float, help="by default 1 / (rate x steps of an epoch)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    parser.add_argument("--quick", action="store_true", help="one method at 2x, 2,000 images, 2 epochs")
    parser.add_argument("--json", type=Path, help="keep the rows here; those it has are not run again")
    args = parser.parse_args()
    epochs, images, test = (2, 2_000, 1_000) if args.quick else (args.epochs, args.images, 10_000)
    rho = 1 / (args.rate * max(1, images // BATCH)) if args.rho is None else args.rho
    task = Task(images, test, epochs, args.admm_epochs or epochs // 2, args.rate, rho)
    methods, shares = (METHODS[:1], SHARES[:1]) if args.quick else (METHODS, SHARES)
    ways = [("-", 1.0, "dense"), *((m, s, way) for m in methods for s in shares for way in ("decompose", "admm"))]
    try:
        data, rows = load_images(args.data, task).to(args.device), read_rows(args.json)
        for seed, way in itertools.product(range(args.seeds), ways):
            if not any(row.task == task and row.seed == seed and row.what == way for row in rows):
                rows.append(row := measure(args.weights, data, task, seed, *way))
                write_rows(args.json, rows, args.device)
                said = f"seed {seed}: {row.method} {row.keep_params:.2f} {row.way}: {100 * row.accuracy:.2f} %"
                print(said, file=sys.stderr)
    except SurgeryError as error:
        sys.exit(f"error: {error}")
    Console(width=120).print(show([row for row in rows if row.task == task]))


if __name__ == "__main__":
    main()
