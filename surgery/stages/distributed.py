"""Stages for torch.distributed.pipelining, whose schedules connect only neighbours: what skips a stage is relayed.

    stage 0 gives a and b, stage 1 reads a and gives c, stage 2 reads b and c
    0 sends (a, b), 1 takes (a, b) and sends (b, c), 2 takes (b, c)

torch would find out the shapes that are sent by a run of each stage on numbers of no meaning, which would go into the
running statistics of batch norms in training. So they are found beforehand, by a run on tensors without numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import PipelineStage
from torch.func import functional_call
from torch.utils import _pytree as pytree

from surgery.errors import InputError
from surgery.kinds.base import Kind, Piece, Pieces
from surgery.kinds.inputs import Inputs
from surgery.text import first_line

__all__ = ["RelayStage", "pipeline_modules", "pipeline_stages"]


class RelayStage(nn.Module):
    """A stage that takes all that the one before it sends, and sends all that later stages read.

    The first takes what the model takes; the last returns what the model returns, if that is a tensor or a row of
    tensors, and its outputs in order otherwise. ``stage`` is the module of the stage itself.
    """

    def __init__(self, stage: nn.Module, piece: Piece, takes: Sequence[str], sends: Sequence[str]) -> None:
        super().__init__()
        self.stage = stage
        self.reads, self.gives = piece.inputs, piece.outputs
        self.takes, self.sends = tuple(takes), tuple(sends)
        self.numbers: dict[str, Any] = {}

    def fix(self, numbers: Mapping[str, Any]) -> None:
        """Take these values as given, so that they need not be sent: sizes, which all microbatches share."""
        self.numbers = dict(numbers)
        self.takes = tuple(name for name in self.takes if name not in numbers)
        self.sends = tuple(name for name in self.sends if name not in numbers)

    def forward(self, *args: Any) -> Any:
        """Run the stage; return what it sends."""
        known = self.numbers | dict(zip(self.takes, args, strict=True))
        found = self.stage(*(_writable(known[name]) for name in self.reads))
        known |= zip(self.gives, [found] if isinstance(found, Tensor) else list(found), strict=True)
        return tuple(known[name] for name in self.sends)


def _writable(value: Any) -> Any:
    """Return a value that a stage may change in place, as an activation does: autograd forbids it for received ones."""
    changed = isinstance(value, Tensor) and value.is_leaf and value.requires_grad and torch.is_grad_enabled()
    return value.clone() if changed else value


class _First(RelayStage):
    """The first stage, which is called as the model is."""

    def __init__(self, whole: tuple[Kind, Pieces], *rest: Any) -> None:
        super().__init__(*rest)
        self._whole = whole

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stage on the inputs of the model."""
        kind, pieces = self._whole
        return super().forward(*kind.leaves(pieces, args, kwargs))


class _Last(nn.Module):
    """The last stage, which returns what the model does."""

    def __init__(self, stage: RelayStage, kind: Kind, pieces: Pieces) -> None:
        super().__init__()
        self.relay = stage
        self._whole = (kind, pieces)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stage, and put the outputs together."""
        kind, pieces = self._whole
        leaves = self.relay(*args, **kwargs)
        found = kind.result(pieces, leaves)
        plain = isinstance(found, Tensor) or (
            isinstance(found, tuple | list) and all(isinstance(each, Tensor) for each in found)
        )
        return found if plain else leaves


def pipeline_modules(pieces: Pieces, kind: Kind) -> tuple[nn.Module, ...]:
    """Return the stages as modules, each of which takes what the one before returns; they share the stages' tensors.

    Raises:
        InputError: the stages are not models of PyTorch, or two of them would train one weight.
    """
    if kind.is_onnx:
        what = "stages that are ONNX models do not run under torch.distributed"
        raise InputError(what, next_step="split the module or program that they were exported from")
    _check_ties(pieces)
    made: list[nn.Module] = []
    takes: tuple[str, ...] = pieces.inputs
    for number, piece in enumerate(pieces.stages):
        sends = _sent(number, pieces, takes)
        parts = (kind.runnable(piece.model), piece, takes, sends)
        made.append(RelayStage(*parts) if number else _First((kind, pieces), *parts))
        takes = sends
    assert isinstance(made[-1], RelayStage)
    made[-1] = _Last(made[-1], kind, pieces)
    return tuple(made)


def _check_ties(pieces: Pieces) -> None:
    """Refuse stages in training mode that share a weight: two processes would train it apart, each in its own way."""
    seen: dict[int, tuple[int, str]] = {}
    for number, piece in enumerate(pieces.stages):
        if not (isinstance(piece.model, nn.Module) and piece.model.training):
            continue
        for name, parameter in piece.model.named_parameters():
            first, other = seen.setdefault(id(parameter), (number, name))
            if first != number and parameter.requires_grad:
                what = f"{other} is in the stages {first} and {number}, which would train it apart"
                raise InputError(what, next_step="split with ties='together' (--ties together), or call eval() first")


def _sent(number: int, pieces: Pieces, takes: Sequence[str]) -> tuple[str, ...]:
    """Return the names that a stage sends: those that it has and that are read later, or are outputs of the model."""
    later = pieces.stages[number + 1 :]
    if not later:
        return pieces.outputs
    wanted = set(pieces.outputs).union(*(stage.inputs for stage in later))
    return tuple(name for name in dict.fromkeys((*takes, *pieces.stages[number].outputs)) if name in wanted)


def pipeline_stages(
    pieces: Pieces,
    kind: Kind,
    microbatch: Inputs,
    *,
    device: str | torch.device = "cpu",
    group: dist.ProcessGroup | None = None,
) -> list[PipelineStage]:
    """Return the stages that this process runs, in a process group that is there: stage ``i`` on rank ``i % size``.

    ``microbatch`` is one as the schedule will make it, positional and keyword inputs; only its shapes count. Every
    process has to make its stages from the same pieces.

    Raises:
        InputError: there is no process group, or one of more processes than stages; or the stages do not run on the
            microbatch.
    """
    if not dist.is_initialized():
        raise InputError("there is no process group", next_step="call torch.distributed.init_process_group first")
    modules = pipeline_modules(pieces, kind)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if size > len(modules):
        raise InputError(f"{len(modules)} stages for {size} processes", allowed="at least one stage for each")
    crossing = _crossing(modules, microbatch)
    return [
        PipelineStage(
            module.to(device),
            number,
            len(modules),
            torch.device(device),
            input_args=crossing[number],
            output_args=crossing[number + 1],
            group=group,
        )
        for number, module in enumerate(modules)
        if number % size == rank
    ]


def _crossing(modules: Sequence[nn.Module], microbatch: Inputs) -> list[tuple[Tensor, ...]]:
    """Return tensors without numbers: the inputs of the first stage, and what each stage returns.

    Sizes and other numbers that would cross are fixed in the stages; only tensors are left to be sent.
    """
    first = tuple(arg for arg in microbatch[0] if isinstance(arg, Tensor))
    found = _shapes(modules, microbatch)
    relays = [module.relay if isinstance(module, _Last) else module for module in modules]
    numbers: dict[str, Any] = {}
    for module, row in zip(relays[:-1], found, strict=False):
        assert isinstance(module, RelayStage)
        numbers |= {name: value for name, value in zip(module.sends, row, strict=True) if not isinstance(value, Tensor)}
    if numbers:
        for number, module in enumerate(relays):
            assert isinstance(module, RelayStage)
            # What the first stage takes and the last one sends are inputs and outputs of the model, which
            # it takes and gives still.
            whole = module.takes if number == 0 else module.sends if number == len(relays) - 1 else ()
            module.fix({name: value for name, value in numbers.items() if name not in whole})
    rows = [first, *(tuple(value for value in row if isinstance(value, Tensor)) for row in found)]
    return [tuple(map(_without_numbers, row)) for row in rows]


def _shapes(modules: Sequence[nn.Module], microbatch: Inputs) -> list[tuple[Any, ...]]:
    """Return what each stage returns, from a run on tensors without numbers."""
    args, kwargs = microbatch
    found: list[tuple[Any, ...]] = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
        try:
            args, kwargs = pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
            for module in modules:
                state: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in _state(module)}
                args, kwargs = functional_call(module, state, args, kwargs), {}
                args = (args,) if isinstance(args, Tensor) else tuple(args)
                found.append(args)
        except Exception as error:  # models raise anything
            raise InputError(f"the stages do not run on the microbatch: {first_line(error)}") from error
    return found


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers; a run must not change those of the stage, such as the count of batches."""
    yield from module.named_parameters()
    yield from module.named_buffers()


def _without_numbers(value: Tensor) -> Tensor:
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return made.requires_grad_(value.requires_grad)
