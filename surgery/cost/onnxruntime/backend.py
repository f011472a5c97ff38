"""onnxruntime on the CPU as a backend.

A latency depends on shapes and geometry, on the machine and on the runtime, not on the values of weights. All operators
are measured in float32 (``model`` says why), so that the dtype is not part of a key. An operator and its chain are
measured in one interleaved run, and kept as a pair. Whole models run alone, in new processes (``processes``).

The number of channels that onnxruntime's convolutions like on this machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch

from surgery.algebra import Chain, Conv, Geometry, Operator, Shape
from surgery.cost.base import Backend, Comparison, ModelFile, ModelTimes, NodeTimes, Seconds
from surgery.cost.onnxruntime.model import BESIDE, build_choice, build_model, entries
from surgery.cost.onnxruntime.processes import Blocks, TimingJob, compare_generations, time_generations
from surgery.cost.onnxruntime.profile import profile
from surgery.cost.onnxruntime.sessions import bind
from surgery.cost.timing import Budget, Samples, Speedup, compare_samples, interleave
from surgery.errors import FileError
from surgery.kinds.onnx.session import check_threads, open_session
from surgery.system.machine import cpu_name, physical_cores
from surgery.system.scratch import scratch_folder

__all__ = ["OnnxRuntime", "channel_multiple"]


@cache
def channel_multiple() -> int:
    """Return the channel block of onnxruntime's fast convolution here: ranks that are multiples of it waste nothing.

    onnxruntime asks MLAS (``MlasNchwcGetBlockSize``): 16 with AVX-512, 8 with other vector units of x86-64, 16 with
    NEON in recent versions. This number is found, not guessed: onnxruntime optimises a convolution to one channel, and
    its filter comes back padded to a whole block. Without blocked convolutions, or room for a temporary file, the
    number is 16 with AVX-512 and 8 otherwise.
    """
    graph = _optimised(build_model(Conv(torch.ones(1, 64, 3, 3), geometry=Geometry.pointwise(2)), (1, 64, 3, 3)))
    if graph is not None and any(node.domain == "com.microsoft.nchwc" for node in graph.node):
        return max(int(weight.dims[0]) for weight in graph.initializer)
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8


def _optimised(model: bytes) -> onnx.GraphProto | None:
    """Return the graph that onnxruntime makes of a model; None if there is no room for the file that this takes."""
    try:
        with scratch_folder() as folder:
            file = folder / "optimised.onnx"
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.optimized_model_filepath = str(file)
            ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            return onnx.load(file).graph
    except FileError:
        return None


_PROTOCOL = 2  # raise it whenever the way of measuring changes: stored latencies are then measured anew


class OnnxRuntime(Backend):
    """Measures under onnxruntime on this CPU.

    ``threads`` defaults to the physical cores; ``budget`` is for one measurement of operators; ``path`` and ``keep``
    are those of ``Backend``. ``measured`` counts the measurements of operators that really ran.

    >>> from surgery.algebra.operators import Linear
    >>> backend = OnnxRuntime(threads=1, budget=Budget(seconds=0.01), keep=False)
    >>> backend.measure(Linear(torch.ones(4, 4)), (1, 4)) > 0
    True
    """

    name = "onnxruntime"

    def __init__(
        self,
        *,
        threads: int | None = None,
        budget: Budget | None = None,
        seed: int = 0,
        path: Path | None = None,
        keep: bool = True,
    ) -> None:
        super().__init__(path=path, keep=keep)
        self.threads = physical_cores() if threads is None else threads
        self.budget = budget or Budget(seconds=0.3, max_rounds=500)
        self.seed = seed
        self.measured = 0

    @property
    def key(self) -> dict[str, Any]:
        """The threads, the processor, and the versions of the runtime and of the way of measuring."""
        return {
            "threads": self.threads,
            "onnxruntime": ort.__version__,
            "cpu": cpu_name(),
            "instruction_set": torch.backends.cpu.get_cpu_capability(),
            "protocol": _PROTOCOL,
        }

    @property
    def channel_multiple(self) -> int:
        """The channel block of the fast convolution here."""
        return channel_multiple()

    def time_pair(self, dense: Operator | Chain, chain: Operator | Chain, shape: Shape) -> Comparison:
        """Time two as the branches of one model."""
        session = self._open(lambda beside: build_choice(dense, chain, shape, beside))
        x = self._input(dense, shape)
        runs = [bind(session, {"input": x, "second": np.array(choice)}) for choice in (False, True)]
        first, second = self._interleave(runs)
        found = compare_samples(first, second, seed=self.seed)
        return Comparison(first.median, second.median, found.value, found.low, found.high, found.verdict)

    def time_one(self, operator: Operator | Chain, shape: Shape) -> Seconds:
        """Time one as a model of its own."""
        session = self._open(lambda beside: build_model(operator, shape, beside))
        return Seconds(self._interleave([bind(session, {"input": self._input(operator, shape)})])[0].median)

    def time_models(
        self,
        models: Sequence[ModelFile],
        *,
        threads: int | None = None,
        seconds: float = 5.0,
        seed: int = 0,
        settled: Callable[[Sequence[Speedup]], bool] | None = None,
        patience: int = 1,
        progress: Callable[[float], None] | None = None,
    ) -> ModelTimes:
        """Time models each in processes of its own, which take turns (``time_generations``)."""
        check_threads(threads)

        def enough(generations: Sequence[Sequence[Blocks]]) -> bool:
            return settled is None or settled(_speedups(generations))

        with scratch_folder() as folder:
            jobs = []
            for index, model in enumerate(models):
                inputs = folder / f"{index}.npz"
                np.savez(inputs, *model.feeds.values())  # by place: names of inputs need not be names of files
                jobs.append(TimingJob(model.name, model.path, inputs, threads))
            generations = time_generations(
                jobs, seconds=seconds, seed=seed, settled=enough, patience=patience, progress=progress
            )
        samples = tuple(_pooled(processes) for processes in zip(*generations, strict=True))
        return ModelTimes(samples, _speedups(generations))

    def time_nodes(
        self,
        model: ModelFile,
        *,
        threads: int | None = None,
        seconds: float = 2.0,
        progress: Callable[[float], None] | None = None,
    ) -> NodeTimes:
        """Time the kernels of a model, in this process (``profile``)."""
        return profile(model, threads=threads, seconds=seconds, progress=progress)

    def _open(self, build: Callable[[BinaryIO], bytes]) -> ort.InferenceSession:
        """Return a session of a model that is built with its large weights in a file beside it."""
        with scratch_folder() as folder:
            path = folder / "operators.onnx"
            with open(folder / BESIDE, "wb") as beside:
                path.write_bytes(build(beside))
            return open_session(path, threads=self.threads, spin=True, name="the operators")

    def _interleave(self, runs: list[Callable[[], None]]) -> tuple[Samples, ...]:
        self.measured += 1
        return interleave(runs, self.budget, seed=self.seed)

    def _input(self, operator: Operator | Chain, shape: Shape) -> npt.NDArray[Any]:
        generator = np.random.default_rng(self.seed)
        if limit := entries(operator):
            return generator.integers(limit, size=shape, dtype=np.int64)
        return generator.standard_normal(shape, dtype=np.float32)


def _speedups(generations: Sequence[Sequence[Blocks]]) -> tuple[Speedup, ...]:
    """Return the speed-up of each later model over the first, from the blocks of all in each generation."""
    first, *others = zip(*generations, strict=True)
    return tuple(compare_generations(first, later) for later in others)


def _pooled(processes: Sequence[Blocks]) -> Samples:
    return Samples(tuple(seconds for blocks in processes for block in blocks for seconds in block))
