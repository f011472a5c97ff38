"""Stages in a pipeline against the whole model on one core: throughput and latency, interleaved, in one run.

Stage ``i`` runs in a thread on a core of its own, in an onnxruntime session of one thread; so does the whole, on the
first of these cores. In each round both work through the same number of inputs, in a random order, and then each gets
some inputs one by one. *Seconds an input* is the time between two outputs while inputs wait in front of the first
stage; what the first input takes to come through is *latency*.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from surgery.cost.timing import Samples, Speedup, compare_samples
from surgery.errors import CheckError, InputError, only_own_errors
from surgery.kinds.base import Kind, Pieces
from surgery.kinds.inputs import Inputs
from surgery.kinds.onnx.session import open_session
from surgery.runtime.bench import Environment, describe_feeds, environment
from surgery.runtime.compare import compare_outputs
from surgery.runtime.written import write_model
from surgery.stages.exported import StageOnnx, write_stages
from surgery.stages.pipeline import Pipeline
from surgery.system.machine import usable_cores
from surgery.system.scratch import scratch_folder
from surgery.text import seconds as in_words

__all__ = ["PipelineTiming", "bench_pipeline", "bench_stages"]

_ROUNDS = 8
_ALONE = 3  # inputs one by one in each round
_MOST = 2000  # inputs of a round
_Values: TypeAlias = Mapping[str, ort.OrtValue]


@dataclass(frozen=True)
class PipelineTiming:
    """Seconds of the whole model on one core, and of its stages in a pipeline, in the same rounds.

    ``whole`` and ``pipeline`` are seconds an input at full throughput, a sample each round; the latencies are those of
    inputs that have the machine to themselves. ``stages`` are seconds of one run of each stage while all work.
    ``speedup`` is the throughput of the pipeline over that of the whole. ``error`` is the relative error of the
    pipeline's outputs against the whole's under onnxruntime, which fuses other nodes in stages; against the same stages
    in a row it is always 0, or the measurement fails. ``cores`` are those that the stages ran on.
    """

    whole: Samples
    pipeline: Samples
    whole_latency: Samples
    pipeline_latency: Samples
    stages: tuple[Samples, ...]
    speedup: Speedup
    error: float
    cores: tuple[int, ...]
    inputs: tuple[str, ...]
    environment: Environment

    def to_json(self) -> dict[str, Any]:
        """Return the timing as JSON values; times in seconds."""
        named = ("whole", "pipeline", "whole_latency", "pipeline_latency")
        return {
            **{name: _to_json(getattr(self, name)) for name in named},
            "stages": [_to_json(stage) for stage in self.stages],
            "speedup": asdict(self.speedup) | {"verdict": self.speedup.verdict},
            "error": self.error,
            "cores": list(self.cores),
            "inputs": list(self.inputs),
            "environment": asdict(self.environment),
        }

    def rows(self) -> list[tuple[str, ...]]:
        """Return a table: what ran, inputs a second, seconds an input with their spread, and the latency."""
        rows: list[tuple[str, ...]] = [("", "inputs a second", "seconds an input", "spread", "latency")]
        for name, rate, latency in (
            ("whole, one core", self.whole, self.whole_latency),
            (f"{len(self.stages)} stages", self.pipeline, self.pipeline_latency),
        ):
            spread = f"{100 * rate.spread:.1f} %"
            rows.append((name, f"{1 / rate.median:.4g}", in_words(rate.median), spread, in_words(latency.median)))
        for number, (stage, core) in enumerate(zip(self.stages, self.cores, strict=True)):
            rows.append((f"stage {number}, core {core}", "", in_words(stage.median), f"{100 * stage.spread:.1f} %", ""))
        return rows


def _to_json(samples: Samples) -> dict[str, Any]:
    return {"median_s": samples.median, "p90_s": samples.p90, "spread": samples.spread, "runs": samples.runs}


@only_own_errors
def bench_pipeline(
    pieces: Pieces,
    kind: Kind,
    inputs: Inputs,
    *,
    seconds: float = 10.0,
    cores: Sequence[int] | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> PipelineTiming:
    """Time the stages of a model in a pipeline against the whole on one core, for about ``seconds`` in all.

    ``cores`` are those of the stages, by default all that this process may use, one of each physical core first; stages
    beyond their number share them. ``progress`` gets the share of the time that has passed.

    Raises:
        InputError: the inputs do not fit, or ``seconds`` or ``cores`` are out of bounds.
        CaptureError, CheckError: a stage cannot be exported; or the pipeline gives other outputs than its stages do in
            a row.
    """
    usable = usable_cores()
    if not seconds >= 0:
        raise InputError(f"seconds={seconds}", allowed="0 or more")
    if cores is not None and (not cores or not set(cores) <= set(usable)):
        raise InputError(f"cores={list(cores)}", allowed=f"some of {', '.join(map(str, usable))}")
    chosen = list(cores or usable)
    places = tuple(chosen[number % len(chosen)] for number in range(len(pieces.stages)))
    with scratch_folder() as folder:
        stages = write_stages(pieces, kind, inputs, folder)
        whole = _write_whole(pieces, kind, inputs, folder)
        return bench_stages(whole, stages, places, seconds=seconds, seed=seed, progress=progress)


def _write_whole(pieces: Pieces, kind: Kind, inputs: Inputs, folder: Path) -> StageOnnx:
    file = write_model(kind.join(pieces), inputs, folder / "whole.onnx", "the whole model").file
    leaves = zip(pieces.inputs, kind.leaves(pieces, *inputs), strict=True)
    return StageOnnx(file, tuple(name for name, leaf in leaves if isinstance(leaf, Tensor)), pieces.outputs)


class _Session:
    """A stage in a session of one thread: it adds its outputs to the values by name, and keeps those that are read."""

    def __init__(self, stage: StageOnnx, keep: frozenset[str]) -> None:
        self._session = open_session(stage.file.path, threads=1)
        self._inputs = dict(zip(stage.file.feeds, stage.inputs, strict=True))
        self._given = [output.name for output in self._session.get_outputs()]
        self._outputs, self._keep = stage.outputs, keep
        self.seconds: list[float] = []

    def __call__(self, values: _Values) -> _Values:
        start = time.perf_counter()
        found = self._session.run_with_ort_values(self._given, {own: values[n] for own, n in self._inputs.items()})
        known = {**values, **dict(zip(self._outputs, found, strict=True))}
        self.seconds.append(time.perf_counter() - start)
        return {name: value for name, value in known.items() if name in self._keep}


def bench_stages(
    whole: StageOnnx,
    stages: Sequence[StageOnnx],
    cores: tuple[int, ...],
    *,
    seconds: float = 10.0,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> PipelineTiming:
    """Time stages that are ONNX files against the whole, as ``bench_pipeline`` does, each on one of the cores.

    Raises:
        CheckError: the pipeline gives other outputs than its stages do in a row.
    """
    item = _first_values(whole)
    alone = _Session(whole, frozenset(whole.outputs))
    parts = [_Session(stage, _read_after(number, stages, whole.outputs)) for number, stage in enumerate(stages)]
    error = _check(alone, parts, item, cores)
    rates: list[list[float]] = [[], []]
    latencies: list[list[float]] = [[], []]
    with Pipeline([alone], cores=cores[:1]) as first, Pipeline(parts, cores=cores) as second:
        both = (first, second)
        each = _items_each_round(both, item, seconds)
        for session in (alone, *parts):
            session.seconds.clear()
        generator = np.random.default_rng(seed)
        for number in range(_ROUNDS):
            for which in generator.permutation(2):
                rates[which].append(_seconds_each(both[which], item, each))
                latencies[which] += [_latency(both[which], item) for _ in range(_ALONE)]
            if progress is not None:
                progress((number + 1) / _ROUNDS)
    one, many = (Samples(tuple(rate)) for rate in rates)
    one_latency, many_latency = (Samples(tuple(latency)) for latency in latencies)
    return PipelineTiming(
        whole=one,
        pipeline=many,
        whole_latency=one_latency,
        pipeline_latency=many_latency,
        stages=tuple(Samples(tuple(part.seconds)) for part in parts),
        speedup=compare_samples(one, many, seed=seed),
        error=error,
        cores=cores,
        inputs=describe_feeds(whole.file.feeds),
        environment=environment(1),
    )


def _first_values(whole: StageOnnx) -> _Values:
    """Return the inputs of the whole model, by name."""
    given = dict(zip(whole.inputs, whole.file.feeds.values(), strict=True))
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}


def _read_after(number: int, stages: Sequence[StageOnnx], outputs: Sequence[str]) -> frozenset[str]:
    """Return the names of the values that are read by the stages after one, or are outputs of the model."""
    return frozenset(outputs).union(*(stage.inputs for stage in stages[number + 1 :]))


def _check(whole: _Session, parts: Sequence[_Session], item: _Values, cores: Sequence[int]) -> float:
    """Return the relative error of the stages against the whole; raise CheckError if a pipeline gives other outputs."""
    row = item
    for part in parts:
        row = part(row)
    with Pipeline(parts, cores=cores) as pipeline:
        # So many that all places are taken twice; bytes are compared, so that NaN in the same places is equal.
        for found in pipeline.map([item] * (2 * pipeline.flight)):
            if any(found[name].numpy().tobytes() != value.numpy().tobytes() for name, value in row.items()):
                raise CheckError("the stages in a pipeline give other outputs than in a row")
    outputs = [[torch.from_numpy(values[name].numpy()) for name in sorted(values)] for values in (whole(item), row)]
    return compare_outputs(*outputs).relative


def _items_each_round(pipelines: Sequence[Pipeline], item: _Values, seconds: float) -> int:
    """Return how many inputs a round has, so that all rounds take about as long as they shall."""
    for pipeline in pipelines:
        for _ in pipeline.map([item] * pipeline.flight):
            pass
    latency = min(_latency(pipelines[0], item) for _ in range(_ALONE))
    # Example of 10 s and a latency of 10 ms: 10 / 8 / 0.01 / 2 = 62.5, and 59 besides the three that come one by one.
    share = seconds / _ROUNDS / latency / 2  # both get as many, and the pipeline takes less time
    return int(min(_MOST, max(2 * pipelines[1].flight, share - _ALONE)))


def _seconds_each(pipeline: Pipeline, item: _Values, count: int) -> float:
    """Return the mean seconds between two outputs while inputs are waiting."""
    ends = [time.perf_counter() for _ in pipeline.map([item] * count)]
    # The first output comes after a whole latency, and does not count: n outputs have n - 1 gaps.
    return (ends[-1] - ends[0]) / (count - 1)


def _latency(pipeline: Pipeline, item: _Values) -> float:
    start = time.perf_counter()
    for _ in pipeline.map([item]):
        pass
    return time.perf_counter() - start
