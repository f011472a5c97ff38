"""Split a model into stages that run one after another, save and load them, and join them again."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from surgery.errors import InputError, SurgeryError, only_own_errors
from surgery.files.load import GivenModel, model_of
from surgery.kinds.base import Kind, Piece, Pieces
from surgery.kinds.inputs import Inputs, normalise_inputs
from surgery.kinds.registry import KINDS, kind_of
from surgery.stages.bench import PipelineTiming, bench_pipeline
from surgery.stages.costs import operation_times, stage_times
from surgery.stages.decide import Asked, decide
from surgery.stages.folder import FolderContent, read_folder, write_stages
from surgery.stages.manifest import SUFFIXES
from surgery.stages.problem import Balance, Ties
from surgery.stages.programs import program_pieces
from surgery.stages.report import SplitReport
from surgery.system.progress import Progress, silent
from surgery.text import first_line

__all__ = ["Split", "in_a_row", "join", "load_split", "measured", "split"]


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    """A model that was cut: its stages, which are models themselves, and what they cost.

    ``kind`` and ``pieces`` are what other parts of surgery work on. ``example`` are the inputs that it was cut with.
    """

    report: SplitReport
    kind: Kind
    pieces: Pieces
    origin: str
    example: Inputs | None = field(default=None)

    @property
    def stages(self) -> tuple[Any, ...]:
        """The stages in order, models of the same kind as the whole; each takes its inputs by position."""
        return tuple(piece.model for piece in self.pieces.stages)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs of the whole model."""
        return self.pieces.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs of the whole model."""
        return self.pieces.outputs

    def __str__(self) -> str:
        return str(self.report)

    def __repr__(self) -> str:
        return f"Split({len(self.stages)} stages of a {self.kind.label}; {self.report.verdict})"

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the whole model returns for these inputs, from its stages, run in a row.

        Raises:
            InputError: they are not the inputs that the model takes, or a stage does not run.
        """
        given = self.kind.leaves(self.pieces, args, kwargs)
        values = dict(zip(self.inputs, given, strict=True))
        for at, piece in enumerate(self.pieces.stages):
            values |= self._run_stage(at, piece, values)
            later = {name for stage in self.pieces.stages[at + 1 :] for name in stage.inputs} | set(self.outputs)
            values = {name: value for name, value in values.items() if name in later}
        return self.kind.result(self.pieces, [values[name] for name in self.outputs])

    def _run_stage(self, at: int, piece: Piece, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values that a stage gives, by name."""
        try:
            found = self.kind.run_stage(piece.model, [values[name] for name in piece.inputs])
        except SurgeryError:
            raise
        except Exception as error:  # whatever a model raises
            what = f"stage {at} does not run on what it gets: {first_line(error)}"
            raise InputError(what, next_step="give inputs as those that the model was split with") from error
        if len(found) != len(piece.outputs):
            raise InputError(f"stage {at} gives {len(found)} values", allowed=f"{len(piece.outputs)}: {piece.outputs}")
        return dict(zip(piece.outputs, found, strict=True))

    def join(self) -> Any:
        """Return the model that was split: its graph and its names, with the numbers that the stages have now.

        Raises:
            InputError: the stages do not fit each other any more.
        """
        return self.kind.join(self.pieces)

    @only_own_errors
    def bench(
        self,
        example_inputs: Any = None,
        *,
        seconds: float = 10.0,
        cores: Sequence[int] | None = None,
        seed: int = 0,
        progress: Callable[[float], None] | None = None,
    ) -> PipelineTiming:
        """Time the stages in a pipeline on this machine, one core for each, against the whole model on one core.

        Both run under onnxruntime, interleaved, for about ``seconds`` in all. ``example_inputs`` are by default those
        that the model was split with, or that it brings along. ``cores`` are by default all that may be used; stages
        beyond their number share them.

        Raises:
            InputError: the inputs are not known, or do not fit.
            CaptureError, CheckError: a stage cannot be exported to ONNX.

        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> timing = split(net, torch.ones(1, 8), measure=False).bench(seconds=0.0)
        >>> timing.error < 1e-6
        True
        """
        given = self._example() if example_inputs is None else normalise_inputs(example_inputs)
        return bench_pipeline(self.pieces, self.kind, given, seconds=seconds, cores=cores, seed=seed, progress=progress)

    @only_own_errors
    def to_pipeline(
        self, microbatch: Any = None, *, device: str | torch.device = "cpu", group: Any = None
    ) -> list[Any]:
        """Return the ``torch.distributed.pipelining.PipelineStage`` of each stage that this process runs.

        Stage ``i`` runs on rank ``i % size`` of a process group that is there. With as many processes as stages,
        ``ScheduleGPipe`` and ``Schedule1F1B`` of torch take the one stage; with fewer, schedules such as
        ``ScheduleInterleaved1F1B`` take them all. Values that skip a stage are relayed. Every process splits or loads
        the same model; the first gives the schedule the inputs, the last the target. Outputs that are no tensor or row
        of tensors, as dicts, come as a tuple, in the order of ``outputs``.

        ``microbatch`` is one as the schedule will make it, in the form of ``example_inputs``, which are the default;
        all have its shape. Stages of a module have its own parameters: each process trains those that it runs, and only
        their numbers are new in its ``join()``. Saved stages are in evaluation mode.

        Raises:
            InputError: there is no process group, or the stages cannot be shared out equally among its processes; the
                stages are ONNX models, do not run on the microbatch, or would train one weight apart.

        >>> mine = split(net, torch.ones(2, 8)).to_pipeline()  # doctest: +SKIP
        >>> learning = torch.optim.SGD(mine[0].submod.parameters(), lr=0.1)  # doctest: +SKIP
        >>> schedule = ScheduleGPipe(mine[0], n_microbatches=4, loss_fn=loss)  # doctest: +SKIP
        >>> schedule.step(*([x] if mine[0].is_first else []), target=y if mine[0].is_last else None)  # doctest: +SKIP
        """
        from surgery.stages.distributed import pipeline_stages

        given = self._example() if microbatch is None else normalise_inputs(microbatch)
        return list(pipeline_stages(self.pieces, self.kind, given, device=device, group=group))

    def _example(self) -> Inputs:
        found = self.kind.brought_inputs(self.join()) if self.example is None else self.example
        if found is None:
            raise InputError("the stages do not know the shape of their inputs", next_step="give example_inputs")
        return found

    @only_own_errors
    def save(self, folder: str | os.PathLike[str], *, force: bool = False) -> None:
        """Write the stages and their manifest into a folder, which is made; all files appear, or none.

        Stages of programs are ``stage0.pt2``, ``stage1.pt2``, ..., those of ONNX models ``stage0.onnx``, ... Stages of
        modules are exported in evaluation mode, and saved as programs. ``force`` writes into a folder that holds files;
        those of an older split are replaced.

        Raises:
            FileError: the folder cannot be written, or holds files already.
            InputError, CaptureError: a stage cannot be saved.

        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> cut = split(net, torch.ones(1, 4), measure=False)
        >>> cut.save("net.stages")  # doctest: +SKIP
        """
        kind, pieces = self.kind, self.pieces
        if kind.name not in SUFFIXES:
            kind, pieces = KINDS["program"], program_pieces(kind, pieces, self._example())
        write_stages(FolderContent(kind, pieces, self.origin, self.report), folder, force=force)


@only_own_errors
def split(
    model: GivenModel | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    stages: int | None = None,
    link: str | float = "1GB/s",
    memory: str | int | None = None,
    balance: Balance = "time",
    relay: bool = False,
    ties: Ties = "copy",
    measure: bool = True,
    prove: float = 0.0,
    at: Sequence[str] = (),
    progress: Progress | None = None,
) -> Split:
    """Cut a model into stages that run one after another, so that the slowest of them is as fast as can be.

    The stages in a row compute what the model computes, bit for bit on a CPU; but torch's fused kernels for whole
    layers, which ``nn.TransformerEncoder`` runs in evaluation without gradients, round differently.

    Args:
        model: an nn.Module, a GraphModule, an ExportedProgram, an ONNX model, or the path of a file with one.
        example_inputs: as ``decompose`` takes them; sizes and times are those of a run on them.
        stages: how many, 2 by default; with ``at`` as many as follow from the cuts.
        link: bytes or bits a second between two stages, as "1GB/s" or "10Gbit/s", or a number of bytes.
        memory: the most bytes that a stage may need, as "2GB".
        balance: what the dearest stage has least of: "time" with transfers, "params", or "memory".
        relay: whether values go through all stages on their way, as in torch's schedules, or straight to their readers.
        ties: with "copy", each stage that reads a weight has it, and the report says which weights are in several;
            "together" keeps all that reads one weight in one stage, as training needs it.
        measure: whether operations and stages are timed; else their times are estimates.
        prove: seconds for an integer program to raise the proven bound, or find a better cut, where that is not settled
            without it; then the answer depends on the machine's speed.
        at: names of the values to cut at, in place of a search; no others may cross. Each stage has a copy of the
            weights that it reads.
        progress: is told of each step.

    Raises:
        InputError: arguments that cannot be used, or a cut that does not separate the graph; there is no split into so
            many stages, or none within ``memory``.
        CaptureError: the graph of the model cannot be captured.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.ones(1, 8)
    >>> cut = split(net, x, stages=2, measure=False)
    >>> len(cut.stages), bool(torch.equal(cut.run(x), net(x)))
    (2, True)
    """
    asked = Asked.read(
        stages=stages, at=at, link=link, memory=memory, balance=balance, relay=relay, ties=ties, prove=prove
    )
    opened = model_of(model)
    inputs, report = normalise_inputs(example_inputs), progress or silent
    kind = kind_of(opened)
    cuttable = kind.cuttable(opened, inputs)
    example = inputs if any(inputs) else kind.brought_inputs(opened)
    times = operation_times(cuttable, kind, example, measure=measure, progress=report)
    decided = decide(cuttable.network, asked, times, report)
    found = Split(decided.report, kind, cuttable.cut(decided.stage_of), kind.name, example)
    return measured(found, progress=report) if measure else found


def measured(cut: Split, *, progress: Progress = silent) -> Split:
    """Return a split whose report has the measured seconds of each stage, run on the example inputs, if it can be."""
    times = None if cut.example is None else stage_times(cut.kind, cut.pieces, cut.example, progress)
    if times is None:
        return cut
    rows = tuple(replace(row, measured_s=time) for row, time in zip(cut.report.stages, times, strict=True))
    return replace(cut, report=replace(cut.report, stages=rows))


@only_own_errors
def load_split(folder: str | os.PathLike[str], *, memory: int | None = None) -> Split:
    """Return the split that ``Split.save`` or ``surgery split`` wrote; no code of its files is run.

    It is refused, before the memory is taken, if work on it may need more than ``memory`` bytes, by default nine tenths
    of the free memory.

    Raises:
        FileError: there is no such folder, its manifest is damaged, or a stage is not what the manifest says.
        UnsafeFileError: a stage is a link, or a file that would run code.

    >>> load_split("net.stages").report  # doctest: +SKIP
    """
    found = read_folder(folder, memory=memory)
    return Split(found.report, found.kind, found.pieces, found.origin)


@only_own_errors
def join(source: Split | str | os.PathLike[str], model: str | Callable[[], nn.Module] | nn.Module | None = None) -> Any:
    """Return the model that was split, from a folder or a ``Split``: its graph, names and state dict.

    Stages of a module that were saved are programs, and so is what they are joined to. ``model`` gives the module
    instead: a module, or what makes one, as ``surgery.load`` takes it. It gets the numbers that the stages have now.

    Raises:
        FileError: as ``load_split``.
        InputError: the stages do not fit each other, or ``model`` does not work.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> back = join(split(net, torch.ones(1, 8), measure=False))
    >>> list(back.state_dict()) == list(net.state_dict())
    True
    """
    cut = source if isinstance(source, Split) else load_split(source)
    joined = cut.join()
    if model is None:
        return joined
    from surgery.files.weights import with_weights

    return with_weights(model, cut.kind.tensors(joined))


class _InARow(nn.Module):
    """A module that runs the stages of a split, one after another."""

    def __init__(self, cut: Split) -> None:
        super().__init__()
        self._cut = cut

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._cut.run(*args, **kwargs)


def in_a_row(cut: Split) -> nn.Module:
    """Return a module that runs the stages of a split, one after another, as the whole model is called."""
    return _InARow(cut)
