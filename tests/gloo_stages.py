"""What each of two processes does that run stages together; it writes what they computed as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn.functional import cross_entropy

from surgery.errors import InputError
from surgery.kinds.base import Kind, Pieces
from surgery.kinds.inputs import Inputs
from surgery.kinds.registry import kind_of
from surgery.stages.distributed import pipeline_stages

BATCHES = 4


class Net(nn.Module):
    """Values that skip stages, among them an input, a transposed one and a buffer that counts; batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act, self.second = nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1)
        self.third, self.fc = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
        self.table = nn.Embedding(5, 8)
        self.seen = nn.Buffer(torch.zeros(1))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(1)
        y = self.act(self.norm(self.first(x))).transpose(2, 3)
        z = self.third(torch.tanh(self.second(y)))
        return self.fc((y + z).mean((2, 3)) + self.table(labels)) + self.seen


def build() -> nn.Module:
    """Return the same network each time."""
    torch.manual_seed(0)
    return Net()


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Return images, labels that are inputs, and targets: a batch for all microbatches."""
    torch.manual_seed(1)
    return torch.randn(2 * BATCHES, 3, 6, 6), torch.arange(2 * BATCHES) % 5, torch.arange(2 * BATCHES) % 3


def cut(model: Any, stages: int) -> tuple[Pieces, Kind]:
    """Cut a model into stages of equally many operations."""
    x, labels, _ = data()
    kind = kind_of(model)
    cuttable = kind.cuttable(model, ((x[:2], labels[:2]), {}))
    number_of = list(range(len(cuttable.network.operations)))
    for group in cuttable.network.together:
        for number in group:
            number_of[number] = max(group)
    count = len(number_of)
    return cuttable.cut([stages * number // count for number in number_of]), kind


def run(schedule: Any, rank: int, size: int, *, train: bool) -> Any:
    """Run one batch through a schedule: the first process has the inputs, the last the targets."""
    x, labels, targets = data()
    given = (x, labels) if rank == 0 else ()
    last = {"target": targets} if rank == size - 1 else {}
    if train:
        return schedule.step(*given, **last)
    with torch.no_grad():
        return schedule.eval(*given, **last)


def train(kind_of_schedule: Any, stages: int, rank: int, size: int) -> dict[str, Any]:
    """Train through stages; return how far outputs, gradients and buffers of this process are from the whole's."""
    model, whole = build(), build()
    pieces, kind = cut(model, stages)
    x, labels, targets = data()
    mine = pipeline_stages(pieces, kind, ((x[:2], labels[:2]), {}))
    one = mine if issubclass(kind_of_schedule, ScheduleInterleaved1F1B) else mine[0]
    found = run(kind_of_schedule(one, BATCHES, loss_fn=cross_entropy), rank, size, train=True)
    outputs = []
    for rows in zip(x.chunk(BATCHES), labels.chunk(BATCHES), targets.chunk(BATCHES), strict=True):
        outputs.append(whole(*rows[:2]))
        (cross_entropy(outputs[-1], rows[2]) / BATCHES).backward()
    own = {name for stage in mine for name in _names(model, stage.submod)}
    wanted = {name: parameter.grad for name, parameter in whole.named_parameters()} | dict(whole.named_buffers())
    gradients = {name: _gap(p.grad, wanted[name]) for name, p in model.named_parameters() if name in own}
    buffers = {name: _gap(buffer, wanted[name]) for name, buffer in model.named_buffers() if name in own}
    equal = None if found is None else torch.equal(found, torch.cat(outputs))
    return {"equal": equal, "gradients": gradients, "buffers": buffers}


def _names(model: nn.Module, stage: nn.Module) -> list[str]:
    """Return the names that a model has for the tensors of a stage."""
    held = {id(tensor) for tensor in (*stage.parameters(), *stage.buffers())}
    return [n for n, t in (*model.named_parameters(), *model.named_buffers()) if id(t) in held]


def _gap(found: Tensor | None, wanted: Tensor | None) -> float:
    """Return the largest difference, relative to the largest number."""
    assert found is not None
    assert wanted is not None
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6))


def infer(stages: int, rank: int, size: int) -> bool | None:
    """Run a program's stages; return whether the outputs are those of the whole to the bit, if they come out here."""
    x, labels, _ = data()
    program = torch.export.export(build().eval(), (x[:2], labels[:2]))
    mine = pipeline_stages(*cut(program, stages), ((x[:2], labels[:2]), {}))
    found = run(ScheduleGPipe(mine[0], BATCHES), rank, size, train=False)
    whole = program.module()
    rows = zip(x.chunk(BATCHES), labels.chunk(BATCHES), strict=True)
    return None if found is None else torch.equal(found, torch.cat([whole(*row) for row in rows]))


def refused() -> list[str]:
    """Return what is said of stages that do not fit the processes, and of a microbatch that does not fit the stages."""
    x, labels, _ = data()
    small: Inputs = ((x[:2], labels[:2]), {})
    said = []
    for stages, given in ((3, x[:2]), (2, x[:1])):
        try:
            mine = pipeline_stages(*cut(build(), stages), small)
            if mine[0].is_first:
                mine[0].submod(given, labels[:2])
        except InputError as error:
            said.append(str(error))
    return said


def work(rank: int, folder: Path) -> None:
    """Do all checks, with the other process."""
    found = {
        "inference": infer(2, rank, 2),
        "gpipe": train(ScheduleGPipe, 2, rank, 2),
        "1f1b": train(Schedule1F1B, 2, rank, 2),
        "refused": refused(),
        "interleaved": train(ScheduleInterleaved1F1B, 4, rank, 2),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))
