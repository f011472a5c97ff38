"""Stages for torch.distributed.pipelining, whose schedules connect only neighbours: what skips a stage is relayed.

    stage 0 gives a and b, stage 1 reads a and gives c, stage 2 reads b and c
    0 sends (a, b), 1 takes (a, b) and sends (b, c), 2 takes (b, c)

torch would find out the shapes that are sent by a run of each stage on numbers of no meaning, which would go into the
running statistics of batch norms in training. So they are found beforehand, by a run on tensors without numbers.

gloo sends only tensors that are contiguous. Others are sent with their dimensions in the order of memory, and the
receiver restores the order of the model, so that the kernels, and with them the bits, are those of the whole.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

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
from surgery.kinds.layers.tensors import memory
from surgery.system.quiet import quiet
from surgery.text import first_line

__all__ = ["RelayStage", "pipeline_modules", "pipeline_stages"]

_TOGETHER = "split with ties='together' (--ties together)"
_Order: TypeAlias = tuple[int, ...]  # of dimensions


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
        self.taken_as: dict[str, _Order] = {}
        self.sent_as: dict[str, _Order] = {}
        self.apart = ""

    def fix(self, numbers: Mapping[str, Any]) -> None:
        """Take these values as given, so that they need not be sent: sizes, which all microbatches share."""
        self.numbers = dict(numbers)
        self.takes = tuple(name for name in self.takes if name not in numbers)
        self.sends = tuple(name for name in self.sends if name not in numbers)

    def forward(self, *args: Any) -> Any:
        """Run the stage; return what it sends."""
        known = self.numbers | dict(zip(self.takes, args, strict=True))
        known |= {name: known[name].permute(_inverse(order)) for name, order in self.taken_as.items()}
        found = self.stage(*(_writable(known[name]) for name in self.reads))
        given = [found] if isinstance(found, Tensor) else list(found)
        known |= zip(self.gives, self._own(given), strict=True)
        known |= {name: known[name].permute(order).contiguous() for name, order in self.sent_as.items()}
        return tuple(known[name] for name in self.sends)

    def _own(self, values: Sequence[Any]) -> list[Any]:
        """Return the outputs, none of which is a buffer: the next microbatch may change it while it is on its way."""
        held = {memory(tensor) for tensor in (*self.stage.parameters(), *self.stage.buffers())} - {0}
        found = [v.clone() if isinstance(v, Tensor) and memory(v) in held else v for v in values]
        if self.apart:
            for value in found:
                if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
                    value.register_hook(self._refuse)
        return found

    def _refuse(self, _gradient: Tensor) -> None:
        raise InputError(self.apart, next_step=_TOGETHER)


def _order(value: Tensor) -> _Order:
    """Return the dimensions of a tensor in the order of memory, those with the longest steps first.

    Where that does not make it contiguous, as for one whose entries share memory, the order is that of the model.
    """
    plain, steps = tuple(range(value.dim())), value.stride()
    order = tuple(sorted(plain, key=lambda dim: -steps[dim]))
    return plain if value.is_contiguous() or not value.permute(order).is_contiguous() else order


def _inverse(order: _Order) -> _Order:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


def _writable(value: Any) -> Any:
    """Return a value that a stage may change in place, as an activation does: autograd forbids it for received ones."""
    if not (isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()):
        return value
    base = value if value._base is None else value._base
    return value.clone() if base.is_leaf else value


class _First(RelayStage):
    """The first stage, which is called as the model is."""

    def __init__(self, whole: tuple[Kind, Pieces], *rest: Any) -> None:
        super().__init__(*rest)
        self._whole = whole
        self._shapes: list[tuple[int, ...] | None] = []

    def expect(self, microbatch: Inputs) -> None:
        """Let all microbatches be refused whose inputs have other shapes than these."""
        self._shapes = self._shapes_of(self._leaves(*microbatch))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stage on the inputs of the model.

        Raises:
            InputError: the microbatch is of another shape, for which the next process has no room.
        """
        leaves = self._leaves(args, kwargs)
        for name, found, wanted in zip(self.takes, self._shapes_of(leaves), self._shapes, strict=False):
            if found != wanted:
                what = f"a microbatch with {name} of shape {found}, in stages made for {wanted}"
                raise InputError(what, next_step="let the number of microbatches divide the batch into such ones")
        return super().forward(*leaves)

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        kind, pieces = self._whole
        return kind.leaves(pieces, args, kwargs)

    def _shapes_of(self, leaves: Sequence[Any]) -> list[tuple[int, ...] | None]:
        return [tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves]


class _Last(nn.Module):
    """The last stage, which returns what the model does."""

    relay: RelayStage

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
    made: list[RelayStage] = []
    takes: tuple[str, ...] = pieces.inputs
    for number, piece in enumerate(pieces.stages):
        sends = _sent(number, pieces, takes)
        parts = (kind.runnable(piece.model), piece, takes, sends)
        made.append(RelayStage(*parts) if number else _First((kind, pieces), *parts))
        takes = sends
    _watch_ties(pieces, made)
    return (*made[:-1], _Last(made[-1], kind, pieces))


def _watch_ties(pieces: Pieces, relays: Sequence[RelayStage]) -> None:
    """Let nobody train a weight that several stages have: each process would train it in its own way.

    Stages in training mode are refused at once, others when a gradient comes.

    Raises:
        InputError: stages that share a weight are in training mode.
    """
    seen: dict[Hashable, tuple[int, str]] = {}
    for number, relay in enumerate(relays):
        for name, parameter in relay.stage.named_parameters(remove_duplicate=False):
            if not parameter.requires_grad:
                continue
            for key in (name, id(parameter)):  # a saved stage has a copy of the weight, of the same name
                first, other = seen.setdefault(key, (number, name))
                if first != number:
                    what = f"{other} is in the stages {first} and {number}, which would train it apart"
                    relay.apart = relays[first].apart = what
        model = pieces.stages[number].model
        if relay.apart and isinstance(model, nn.Module) and model.training:
            raise InputError(relay.apart, next_step=f"{_TOGETHER}, or call eval() first, to run them without training")


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
        InputError: there is no process group, or the stages cannot be shared out equally among its processes; or they
            do not run on the microbatch.
    """
    if not dist.is_initialized():
        raise InputError("there is no process group", next_step="call torch.distributed.init_process_group first")
    modules = pipeline_modules(pieces, kind)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if len(modules) % size:
        what = f"{len(modules)} stages for {size} processes"
        raise InputError(what, allowed="as many stages as processes, or a multiple of that")
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


def _relay(module: nn.Module) -> RelayStage:
    found = module.relay if isinstance(module, _Last) else module
    assert isinstance(found, RelayStage)
    return found


def _crossing(modules: Sequence[nn.Module], microbatch: Inputs) -> list[tuple[Tensor, ...]]:
    """Return tensors without numbers: the inputs of the first stage, and what each stage sends, or returns in the end.

    Sizes and other numbers that would cross are fixed in the stages; only tensors are left to be sent.
    """
    rows = [tuple(arg for arg in microbatch[0] if isinstance(arg, Tensor))]
    found = _shapes(modules, microbatch)
    relays = [_relay(module) for module in modules]
    numbers: dict[str, Any] = {}
    for before, after, row in zip(relays[:-1], relays[1:], found, strict=False):
        named = dict(zip(before.sends, row, strict=True))
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        before.sent_as = after.taken_as = {name: _order(value) for name, value in tensors.items()}
        rows.append(tuple(value.permute(_order(value)).contiguous() for value in tensors.values()))
        numbers |= {name: value for name, value in named.items() if name not in tensors}
    if numbers:
        for number, relay in enumerate(relays):
            # What the first stage takes and the last one sends are inputs and outputs of the model, which
            # it takes and gives still.
            whole = relay.takes if number == 0 else relay.sends if number == len(relays) - 1 else ()
            relay.fix({name: value for name, value in numbers.items() if name not in whole})
    if len(modules) > 1 and isinstance(modules[0], _First):
        modules[0].expect(microbatch)
    rows.append(tuple(value for value in found[-1] if isinstance(value, Tensor)))
    return [tuple(map(_without_numbers, row)) for row in rows]


def _shapes(modules: Sequence[nn.Module], microbatch: Inputs) -> list[tuple[Any, ...]]:
    """Return what each stage returns, from a run on tensors without numbers."""
    args, kwargs = microbatch
    found: list[tuple[Any, ...]] = []
    with quiet(), FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.enable_grad():
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
