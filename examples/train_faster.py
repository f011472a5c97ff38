"""Train a network faster, decomposed partway through and recomposed at the end, and compare with other ways.

    python examples/train_faster.py --data fashion [--path FOLDER] [--epochs 15] [--seeds 3] [--configs dense,surgery]
    python examples/train_faster.py --data cifar --path cifar10_jpeg.npz
    python examples/train_faster.py --network vit --rate 0.001 [--save FOLDER]

The results in the repository are those of `--images 4000 --epochs 20 --width 96 --rate 0.03`, and for the transformer
of `--network vit --images 4000 --epochs 15 --seeds 1 --rate 0.001`.

    dense        the original network to the end
    surgery      surgery.LowRankTraining with its defaults, recomposed at the end
    compressed   dense with fewer epochs and a shorter schedule, for as long as `surgery` took
    paper        EVBMF ranks (Tucker) after a twentieth of the epochs, a fresh optimizer (Elhoushi et al. 2019)
    pufferfish   a quarter of the ranks (channel SVD) after a sixth of the epochs, first layer dense, a fresh optimizer

All train on the same images in the same order, in the memory format in which the dense network is fastest on this
machine. Seconds are those of training, with everything that a switch takes (measuring, factoring, recomposing).
Accuracy is measured after each epoch with the clock stopped, on some of the test images, and after the last epoch on
all of them. For `surgery` the last accuracy is that of the original class with the recomposed weights. Each finished
run is kept in the JSON file; start the script again to continue.

Fashion-MNIST comes from the Debian package `dataset-fashion-mnist`; CIFAR-10 is an .npz file of JPEG images.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in examples/ only

from examples.image_data import Data, batches, read_data
from examples.train_networks import NETWORKS
from examples.training_results import ORDER, Result, Task, plot, read_results, summary, write_results
from surgery.errors import InputError, SurgeryError
from surgery.passes.preview import find_sites
from surgery.training import LowRankTraining
from surgery.training.propose import try_formats

BATCH = 32
EVAL_BATCH = 500
GLANCE = 1_000  # test images used after each epoch; all of them are used after the last


def build(task: Task, data: Data) -> nn.Module:
    """Return a fresh network for a task."""
    channels, side = data.images.shape[1:3]
    return NETWORKS[task.network](channels, side, task.width)


def optimizer_of(model: nn.Module, task: Task) -> torch.optim.Optimizer:
    """Return SGD for the convolutional network and AdamW for the transformer, as is usual."""
    if task.network == "vit":
        return torch.optim.AdamW(model.parameters(), lr=task.rate, weight_decay=0.05)
    return torch.optim.SGD(model.parameters(), lr=task.rate, momentum=0.9, nesterov=True, weight_decay=5e-4)


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, count: int | None = None) -> float:
    """Return the share of the test images, or of the first ones, that a model classifies correctly."""
    model.eval()
    images, labels = data.test_images[:count], data.test_labels[:count]
    pairs = zip(images.split(EVAL_BATCH), labels.split(EVAL_BATCH), strict=True)
    right = sum(int((model(data.normalised(x)).argmax(1) == y).sum()) for x, y in pairs)
    return right / len(labels)


class Way:
    """One way to train, given by its actions after each epoch; this base class trains the dense network."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, epochs: int) -> None:
        self.model, self.optimizer = model, optimizer

    def end_epoch(self, epoch: int) -> None:
        """Act after an epoch."""

    def finish(self) -> str:
        """Act after the last epoch; return notes on the run."""
        return ""


class Surgery(Way):
    """``surgery.LowRankTraining``, with its defaults."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, epochs: int) -> None:
        super().__init__(model, optimizer, inputs, epochs)
        self.run = LowRankTraining(model, optimizer, inputs, epochs=epochs)

    def end_epoch(self, epoch: int) -> None:
        """Let LowRankTraining decide whether to switch."""
        event = self.run.end_epoch(epoch)
        if event is not None:
            print(event)

    def finish(self) -> str:
        """Return the history."""
        self.run.finish()
        return repr(self.run.history)


class Fixed(Way):
    """A switch at a fixed epoch to given ranks, with a fresh optimizer; the network stays factored to the end."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, at: int, settings: dict[str, Any]
    ) -> None:
        super().__init__(model, optimizer, inputs, at)
        fixed = {"decompose_at": at, "recompose_at": None, "frobenius_decay": False, **settings}
        self.run = LowRankTraining(model, optimizer, inputs, **fixed)

    def end_epoch(self, epoch: int) -> None:
        """Switch at the given epoch, and drop the optimizer's state."""
        event = self.run.end_epoch(epoch)
        if event is not None and event.kind == "decompose":
            self.optimizer.state.clear()

    def finish(self) -> str:
        """Return the history."""
        self.run.finish()
        return repr(self.run.history)


def paper(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, epochs: int) -> Way:
    """Return the way of Elhoushi et al. 2019, with a switch at epoch 10 of 200."""
    settings = {"ranks": "vbmf", "factorization": "tucker" if isinstance(model, nn.Sequential) else "svd"}
    return Fixed(model, optimizer, inputs, max(1, round(epochs / 20)), settings)


def pufferfish(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, epochs: int) -> Way:
    """Return Pufferfish's way: a switch at epoch 15 of 90 to a quarter of the channels, first layer and head dense."""
    sites, _ = find_sites(model, inputs)
    ranks = {site.name: min(site.operator.in_channels, site.operator.out_channels) // 4 for site in sites[1:-1]}
    return Fixed(model, optimizer, inputs, max(1, round(epochs / 6)), {"ranks": ranks, "factorization": "svd"})


WAYS: dict[str, Callable[[nn.Module, torch.optim.Optimizer, Tensor, int], Way]] = {
    "dense": Way,
    "surgery": Surgery,
    "compressed": Way,
    "paper": paper,
    "pufferfish": pufferfish,
}


def train(
    config: str, seed: int, task: Task, data: Data, epochs: int, *, channels_last: bool
) -> tuple[Result, nn.Module]:
    """Train one way with one seed; return its times and accuracies, and the network."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = build(task, data)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = optimizer_of(model, task)
    total = epochs * (len(data.labels) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, task.rate, total_steps=total, cycle_momentum=False)
    inputs = data.normalised(data.images[:BATCH])
    start = time.perf_counter()
    way = WAYS[config](model, optimizer, inputs, epochs)
    spent, seconds, found, notes = time.perf_counter() - start, [], [], ""
    for epoch in range(epochs):
        start = time.perf_counter()
        _train_epoch(model.train(), optimizer, schedule, batches(data, BATCH, generator))
        way.end_epoch(epoch)
        notes = way.finish() if epoch == epochs - 1 else ""
        spent += time.perf_counter() - start
        seconds.append(spent)
        if epoch == epochs - 1:
            found.append(accuracy(_original(model, task, data) if config == "surgery" else model, data))
        else:
            found.append(accuracy(model, data, GLANCE))
        print(f"{config} seed {seed} epoch {epoch + 1}/{epochs}: {spent:.1f} s, {100 * found[-1]:.2f} %", flush=True)
    return Result(config, seed, task, epochs, seconds, found, notes), model


def _train_epoch(model: nn.Module, optimizer: Any, schedule: Any, stream: Iterator[tuple[Tensor, Tensor]]) -> None:
    for images, labels in stream:
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels, label_smoothing=0.1).backward()
        optimizer.step()
        schedule.step()


def save(model: nn.Module, task: Task, data: Data, folder: Path) -> None:
    """Save a trained dense network and the normalised test images in the format that `tools/trained.py` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    images = data.normalised(data.test_images)
    values = {"width": task.width, "state": model.state_dict(), "images": images, "labels": data.test_labels}
    torch.save(values, folder / f"{task.network}.pt")


def _original(model: nn.Module, task: Task, data: Data) -> nn.Module:
    """Return a fresh dense network with the weights of a recomposed one."""
    fresh = build(task, data)
    fresh.load_state_dict(model.state_dict(), strict=True)
    return fresh


def length(config: str, seed: int, task: Task, done: list[Result]) -> int:
    """Return the epochs of a run: for `compressed`, as many as fit into the time that `surgery` took.

    Raises:
        InputError: the runs of `dense` and `surgery`, whose times are needed, are not done.
    """
    if config != "compressed":
        return task.epochs
    times = {r.config: r.seconds[-1] for r in done if r.seed == seed and r.task == task}
    if not {"dense", "surgery"} <= set(times):
        raise InputError("compressed needs the times of dense and surgery", next_step="add them to --configs")
    return max(1, round(task.epochs * times["surgery"] / times["dense"]))


def main() -> None:
    """Do the runs that are not done yet, then print the table and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=sorted(NETWORKS), default="cnn")
    parser.add_argument("--data", choices=("fashion", "cifar"), default="fashion")
    parser.add_argument("--path", type=Path, help="folder of the IDX files, or the .npz file of CIFAR-10")
    parser.add_argument("--configs", help="comma-separated, of " + ", ".join(ORDER) + "  [default: all]")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--images", type=int, help="train only on this many images")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="also keep the last dense network there")
    parser.add_argument("--json", type=Path, default=Path("train_faster.json"))
    parser.add_argument("--plot", type=Path, default=Path("train_faster.png"))
    options = parser.parse_args()
    try:
        configs = options.configs.split(",") if options.configs else list(ORDER)
        if unknown := set(configs) - set(ORDER):
            raise InputError(f"way {sorted(unknown)[0]!r}", allowed=", ".join(ORDER))
        data = read_data(options.data, options.path, options.images)
        task = Task(options.network, options.data, len(data.labels), options.epochs, options.width, options.rate)
        results = read_results(options.json)
        channels_last = try_formats(build(task, data), data.normalised(data.images[:BATCH]))[0]
        for seed in range(options.seeds):
            for config in (c for c in ORDER if c in configs):
                if any((r.config, r.seed, r.task) == (config, seed, task) for r in results):
                    continue
                epochs = length(config, seed, task, results)
                result, model = train(config, seed, task, data, epochs, channels_last=channels_last)
                results.append(result)
                write_results(options.json, results)
                if options.save is not None and config == "dense":
                    save(model, task, data, options.save)
    except SurgeryError as error:
        raise SystemExit(f"error: {error}") from error
    shown = [r for r in results if r.task == task]
    print(summary(shown))
    plot(shown, options.plot)


if __name__ == "__main__":
    main()
