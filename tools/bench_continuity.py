"""Measure the training loss after the switch, with and without the optimizer's state carried across it.

    python tools/bench_continuity.py [--switches 5] [--steps 50] [--json FILE] [--plot FILE.png]

A small network of 3x3 convolutions learns the Fashion-MNIST sample of `examples/data` (2,000 images), once for each
optimizer, learning rate and switch. Switches come after 1, 2, 3, ... epochs, each with its own seed. At the switch the
run is copied: one copy stays dense, the others get the same factors and then see the same batches. They differ only in
the optimizer:

- `carried`: moments are carried over by the chain rule, as in `surgery.LowRankTraining`;
- `factors anew`: the moments of the factors start from zero, all others continue;
- `all anew`: a fresh optimizer, as in Elhoushi et al. 2019.

A second table has the second moments of the factors' gradients that the rule predicts, divided by those measured on the
factored network: with its coherence c, and as if the entries of a gradient were independent.

The jump is the mean training loss over the steps minus that of the dense copy on the same batches. The cost of the
truncation is in all three jumps; the differences between them show the cost of the optimizer's state. The learning rate
matters: a fresh Adam takes larger steps at first, which helps if the rate is lower than the network could take. So the
table also has the loss of the dense copy, by which rates can be compared.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

from surgery.passes.recompose import recompose
from surgery.training import LowRankTraining
from surgery.training.propose import ForTraining, Request, TrainingEvidence, sites_of
from surgery.training.switch import switch_to_factors
from surgery.training.transport import Jacobian

SAMPLE = Path(__file__).resolve().parent.parent / "examples" / "data" / "fashion_sample.npz"
BATCH = 50
RANKS = {"3": (32, 16), "6": (32, 32)}
SIDES = ("dense", "carried", "factors anew", "all anew")
OPTIMIZERS: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    "SGD, momentum 0.9": lambda model, rate: SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4),
    "AdamW": lambda model, rate: AdamW(model.parameters(), lr=rate),
}
RATES = {"SGD, momentum 0.9": (0.02, 0.05, 0.1), "AdamW": (1e-3, 3e-3, 1e-2)}


@dataclass(frozen=True)
class Jump:
    """The losses of each copy over the steps after one switch."""

    optimizer: str
    rate: float
    epoch: int
    seed: int
    losses: dict[str, list[float]]

    def mean(self, side: str) -> float:
        """Return the mean loss of a copy minus that of the dense copy."""
        return statistics.fmean(self.losses[side]) - statistics.fmean(self.losses["dense"])


def build() -> nn.Sequential:
    """Return a network of 32, 64 and 64 channels with batch-norm for images (N, 1, 28, 28)."""
    layers: list[nn.Module] = []
    for columns, rows, stride in ((1, 32, 2), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(columns, rows, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(rows), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def read_sample() -> tuple[Tensor, Tensor]:
    """Return normalised images (2000, 1, 28, 28) and their labels."""
    with np.load(SAMPLE) as sample:
        images = torch.from_numpy(sample["images"]).unsqueeze(1).float() / 255
        labels = torch.from_numpy(sample["labels"]).long()
    return (images - images.mean()) / images.std(), labels


def batches(data: tuple[Tensor, Tensor], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(data[1]), generator=generator).view(-1, BATCH):
            yield data[0][index], data[1][index]


def steps(model: nn.Module, optimizer: Optimizer, stream: Iterator[tuple[Tensor, Tensor]], count: int) -> list[float]:
    """Take training steps and return the loss before each."""
    losses = []
    for _ in range(count):
        images, labels = next(stream)
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def switch(side: str, model: nn.Module, optimizer: Optimizer, inputs: Tensor) -> None:
    """Factor the convolutions at half ranks, and drop the optimizer's state that this kind of copy starts anew."""
    if side == "dense":
        return
    before = set(map(id, model.parameters()))
    LowRankTraining(model, optimizer, inputs, decompose_at=1, ranks=RANKS, recompose_at=None).end_epoch(0)
    for parameter in list(optimizer.state):
        if side == "all anew" or (side == "factors anew" and id(parameter) not in before):
            optimizer.state.pop(parameter)


def measure(name: str, rate: float, epoch: int, count: int) -> Jump:
    """Train up to a switch, and return the losses of each copy after it."""
    seed = epoch
    torch.manual_seed(seed)
    data, model = read_sample(), build()
    optimizer = OPTIMIZERS[name](model, rate)
    steps(model, optimizer, batches(data, seed), epoch * len(data[1]) // BATCH)
    losses = {}
    for side in SIDES:
        pair = copy.deepcopy((model, optimizer))
        switch(side, *pair, data[0][:BATCH])
        losses[side] = steps(*pair, batches(data, seed + 1000), count)
    return Jump(name, rate, epoch, seed, losses)


@dataclass(frozen=True)
class Predicted:
    """Predicted over measured second moments, summed over the entries of one factor."""

    epoch: int
    site: str
    factor: int
    coherent: float
    independent: float


def second_moments(epoch: int, seed: int, count: int = 40) -> list[Predicted]:
    """Return how well the rule predicts second moments, from those of the composed weight and from Adam's mean."""
    torch.manual_seed(seed)
    data, model = read_sample(), build()
    optimizer = OPTIMIZERS["AdamW"](model, 3e-3)
    steps(model, optimizer, batches(data, seed), epoch * len(data[1]) // BATCH)
    means = {name: optimizer.state[model.get_submodule(name).weight]["exp_avg"] for name in RANKS}
    inputs = data[0][:BATCH]
    sites = sites_of(model, inputs)
    record, *_ = switch_to_factors(model, inputs, ForTraining(Request(RANKS)).plan(sites, TrainingEvidence()), sites)
    composed = recompose(model, inputs).model
    rows = []
    for site in record:
        name = site.names[0]
        factors, compose = site.bind(model)
        of_factors = squares(model, factors, data, count)
        (of_weight,) = squares(composed, [composed.get_parameter(f"{name}.weight")], data, count)
        jacobian = Jacobian(compose, factors)
        predicted = zip(
            jacobian.pull_squares(of_weight, means[name]), jacobian.squared().pull(of_weight), of_factors, strict=True
        )
        for at, (coherent, independent, real) in enumerate(predicted):
            total = float(real.sum())
            rows.append(Predicted(epoch, name, at, float(coherent.sum()) / total, float(independent.sum()) / total))
    return rows


def squares(model: nn.Module, weights: list[nn.Parameter], data: tuple[Tensor, Tensor], count: int) -> list[Tensor]:
    """Return the mean squared gradients of the given weights over batches; each model sees the same batches."""
    found, stream = [torch.zeros_like(weight) for weight in weights], batches(data, 77)
    for _ in range(count):
        images, labels = next(stream)
        gradients = torch.autograd.grad(functional.cross_entropy(model(images), labels), weights)
        found = [mean + gradient.square() / count for mean, gradient in zip(found, gradients, strict=True)]
    return found


def show_predicted(rows: list[Predicted]) -> Table:
    """Return the table of predicted over measured second moments."""
    table = Table(title="second moments, predicted over measured")
    for head in ("after epoch", "site", "factor", "with c", "independent"):
        table.add_column(head, justify="right")
    for row in rows:
        values = (row.epoch, row.site, row.factor, f"{row.coherent:.2f}", f"{row.independent:.2f}")
        table.add_row(*map(str, values))
    return table


def show(jumps: list[Jump]) -> Table:
    """Return the table of mean jumps, one row for each optimizer and rate."""
    table = Table(title="mean training loss after the switch (others: minus dense)")
    for head in ("optimizer", "rate", "switches", *SIDES):
        table.add_column(head, justify="left" if head == "optimizer" else "right")
    for name, rate, rows in grouped(jumps):
        dense = statistics.fmean(loss for jump in rows for loss in jump.losses["dense"])
        means = [statistics.fmean(jump.mean(side) for jump in rows) for side in SIDES[1:]]
        table.add_row(name, f"{rate:g}", str(len(rows)), f"{dense:.4f}", *(f"{mean:+.4f}" for mean in means))
    return table


def grouped(jumps: list[Jump]) -> Iterator[tuple[str, float, list[Jump]]]:
    """Yield the jumps of each optimizer and rate."""
    for name, rates in RATES.items():
        for rate in rates:
            yield name, rate, [jump for jump in jumps if (jump.optimizer, jump.rate) == (name, rate)]


def plot(jumps: list[Jump], path: Path) -> None:
    """Draw the loss of each copy minus that of the dense one, averaged over the switches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), layout="constrained")
    for at, (name, rate, rows) in enumerate(grouped(jumps), start=1):
        axes = figure.add_subplot(2, 3, at, title=f"{name}, rate {rate:g}", xlabel="steps after the switch")
        dense = np.mean([jump.losses["dense"] for jump in rows], axis=0)
        for side in SIDES[1:]:
            axes.plot(np.mean([jump.losses[side] for jump in rows], axis=0) - dense, label=side)
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    for axes in figure.axes[::3]:
        axes.set_ylabel("training loss, minus dense")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure all switches, print the tables, and write the requested files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--switches", type=int, default=5)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    jumps = [
        measure(name, rate, epoch, options.steps)
        for name, rates in RATES.items()
        for rate in rates
        for epoch in range(1, options.switches + 1)
    ]
    predicted = [row for epoch in (1, options.switches) for row in second_moments(epoch, epoch)]
    console = Console()
    console.print(show(jumps))
    console.print(show_predicted(predicted))
    if options.json:
        rows = [{**asdict(jump), "jump": {side: jump.mean(side) for side in SIDES[1:]}} for jump in jumps]
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        found = {"versions": versions, "switches": rows, "second moments": [asdict(row) for row in predicted]}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        plot(jumps, options.plot)


if __name__ == "__main__":
    main()
