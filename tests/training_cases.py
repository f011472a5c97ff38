"""Small networks and loops for the tests of training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from surgery.training import LowRankTraining

__all__ = ["FULL", "OPTIMIZERS", "RANKS", "Net", "batch", "loss_of", "make_run", "train"]

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda parameters: SGD(parameters, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda parameters: Adam(parameters, lr=1e-3, weight_decay=1e-3),
    "amsgrad": lambda parameters: Adam(parameters, lr=1e-3, amsgrad=True),
    "adamw": lambda parameters: AdamW(parameters, lr=1e-3, weight_decay=0.1),
}


class Net(nn.Module):
    """Two convolutions with a batch-norm and a dropout, and two linear layers; one of all has no bias."""

    def __init__(self, width: int = 8, *, drop: float = 0.2) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
        self.drop = nn.Dropout(drop)
        self.hidden = nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (N, 3) of images (N, 2, H, W)."""
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(x)).mean((2, 3))
        return self.head(torch.relu(self.hidden(self.drop(x))))


RANKS: dict[str, int | tuple[int, ...] | None] = {"first": (4, 2), "second": (4, 3), "hidden": 3, "head": None}
FULL: dict[str, int | tuple[int, ...] | None] = {"first": (8, 2), "second": (8, 8), "hidden": 8}


def batch(dtype: torch.dtype = torch.float32, *, size: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images and labels that tell the channels apart."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (size,), generator=generator)
    images = torch.randn(size, 2, 6, 6, generator=generator, dtype=torch.float64)
    images[:, 0] += labels[:, None, None]
    return images.to(dtype), labels


def loss_of(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross entropy of a batch."""
    return nn.functional.cross_entropy(model(data[0]), data[1])


def train(run: LowRankTraining, *, steps: int = 3, seed: int = 0) -> None:
    """Take steps on batches of a seed."""
    run.model.train()
    dtype = next(run.model.parameters()).dtype
    for step in range(steps):
        run.optimizer.zero_grad()
        loss_of(run.model, batch(dtype, seed=100 * seed + step)).backward()
        run.optimizer.step()


def make_run(
    optimizer: str = "sgd", *, dtype: torch.dtype = torch.float32, seed: int = 0, width: int = 8, **options: object
) -> LowRankTraining:
    """Return a run on a fresh network, with ranks and epochs that nothing has to be measured for."""
    torch.manual_seed(seed)
    model = Net(width).to(dtype)
    settings = {"decompose_at": 1, "ranks": RANKS, "recompose_at": None, **options}
    return LowRankTraining(model, OPTIMIZERS[optimizer](model.parameters()), batch(dtype)[0], **settings)  # type: ignore[arg-type]
