"""ONNX files of others at equal measured speed-up: `auto` with calibration data against plain ranks by energy.

    python tools/bench_onnx.py --data FOLDER [--files FOLDER] [--json examples/results/onnx.json [--resume]]
    python tools/bench_onnx.py --data FOLDER --only magika --targets 1.5 --samples 64

``--data`` has ``onnx_files.py``, which fetches the files, makes inputs and scores changed files. Calibration data are
the inputs on which it computes the score of its calibration split, without those that are in its test split too; all
scores are those of the test split. Higher is better.

    auto    ``decompose(calibration=..., ranks=Goal.speedup(target))``
    svd     plain SVD at one energy for all sites, no data and no promise: the largest energy found whose speed-up is
            that of `auto`, or the target if `auto` returned the original
    tucker  the same with Tucker factors

Speed-ups are those of ``surgery.time_apart`` on one input: the original, `auto` and the plain ones together, each alone
in new processes that take turns. The energies are searched by bisection with shorter timings. A plain factorization
that is slower than it was to be is marked "<"; one that never gets so fast is shown where it was fastest. Where the
target is out of reach, `auto` returns the original, and what was reachable stands below the table.

With ``--json``, what is done is written after each file; with ``--resume``, files in it are not measured again if they
were measured with the same options, versions and machine. They are marked as "from before".
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a script finds modules in tools/ only

import surgery
from surgery.cost.base import make_backend
from surgery.kinds.onnx.session import open_session
from surgery.kinds.registry import kind_of
from surgery.passes.results import DecomposeResult
from surgery.plans.goal import Goal
from surgery.runtime.bench import Environment, ModelComparison, environment
from surgery.system.tables import table
from tools.real_onnx import Files, chosen, open_files, option_parser

NAMES = ("ocr-recogniser", "ddddocr", "tumor-vgg16", "magika", "nudenet")
TARGETS = (1.25, 1.5, 2.0)
PLAIN = ("svd", "tucker")
SPAN = (0.05, 0.9999)  # of the energies that are tried
STEPS = 6  # of the bisection, for each target
NEAR = 1.02  # speed-ups that differ by less are equal
_Feed = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One changed file: how it was made, its speed-up with the 95 % interval, the spread of its times, its score.

    ``energy`` is that of a plain factorization, and ``reached`` whether it is as fast as it was to be.
    """

    way: str
    speedup: float
    low: float
    high: float
    spread: float
    score: float
    factored: int
    energy: float | None = None
    reached: bool = True


@dataclass(frozen=True)
class Row:
    """One target for one file: what `auto` said, the points, and the seconds that `auto` took."""

    target: float
    original: bool
    said: str
    points: tuple[Point, ...]
    seconds: float


@dataclass(frozen=True)
class Report:
    """All about one file. ``samples`` were used for calibration; ``batch`` is the batch that the file is fixed to."""

    file: str
    metric: str
    samples: int
    batch: int | None
    score: float
    median_s: float
    spread: float
    rows: tuple[Row, ...]
    seconds: float


def tell(text: str) -> None:
    """Say on standard error what is going on."""
    print(text, file=sys.stderr, flush=True)


class Told:
    """Progress of a decomposition: each step is told when it begins, and each half minute."""

    def __init__(self, what: str) -> None:
        self._what, self._step, self._start, self._last = what, "", time.perf_counter(), 0.0

    def __call__(self, step: str, done: int, total: int) -> None:
        """Tell a step that is new, or that has gone on for long."""
        since = time.perf_counter() - self._start
        if step != self._step or since > self._last + 30:
            self._step, self._last = step, since
            tell(f"{self._what}: {step} {done}/{total}, after {since:.0f} s")


class Bench:
    """One file: its model, its calibration data, and how changed models are timed and scored."""

    def __init__(self, files: Files, name: str, options: argparse.Namespace) -> None:
        self.name, self._files, self._options = name, files, options
        self.model: Any = surgery.load(files.path(name))
        self.example = files.inputs(name, 1, 0)[0]
        self._scores: dict[tuple[str, float], float] = {}  # of plain factorizations
        test: list[_Feed] = []
        self.score = self._score(self.model, test)
        self.calibration = self._calibration({_key(feed) for feed in test})

    def _score(self, model: Any, seen: list[_Feed] | None = None, *, split: str = "test") -> float:
        """Return the score of a model; the inputs on which it was computed are appended to ``seen``."""
        raw = kind_of(model).onnx_bytes(model)
        assert raw is not None, "it is an ONNX model"
        session = open_session(raw, threads=self._options.threads)
        count = self._options.samples if split == "calibration" else self._options.score

        def run(feed: _Feed) -> list[Any]:
            if seen is not None:
                seen.append(feed)
            return list(session.run(None, feed))

        return self._files.score(self.name, run, count, split)

    def _calibration(self, test: set[bytes]) -> list[dict[str, Tensor]]:
        found: list[_Feed] = []
        self._score(self.model, found, split="calibration")
        fresh = [feed for feed in found if _key(feed) not in test]
        tell(f"{self.name}: {len(fresh)} inputs to calibrate, {len(found) - len(fresh)} more are in the test split")
        return [{key: torch.from_numpy(np.array(value)) for key, value in feed.items()} for feed in fresh]

    def automatic(self, target: float) -> DecomposeResult[Any]:
        """Return the answer of `auto` to a target."""
        goal = Goal.speedup(target, backend=make_backend(threads=self._options.threads))
        told = Told(f"{self.name} {target:g}x")
        return surgery.decompose(self.model, self.example, calibration=self.calibration, ranks=goal, progress=told)

    def times(self, models: Sequence[Any], seconds: float) -> surgery.Timing:
        """Time the original and models, each alone in new processes."""
        names = ["original", *(str(number) for number in range(len(models)))]
        given = {"names": names, "threads": self._options.threads, "seconds": seconds * (len(models) + 1)}
        return surgery.time_apart([self.model, *models], self.example, **given)

    def score_of(self, way: str, model: Any, energy: float | None) -> float:
        """Return the score of a changed model on the test split."""
        if energy is None:
            return self._score(model)
        if (way, energy) not in self._scores:
            self._scores[way, energy] = self._score(model)
        return self._scores[way, energy]


def _key(feed: _Feed) -> bytes:
    return b"".join(np.ascontiguousarray(value).tobytes() for value in feed.values())


class Energies:
    """The search for the largest energy at which a plain factorization is fast enough; what was timed is kept."""

    def __init__(self, bench: Bench, method: str, seconds: float) -> None:
        self._bench, self._method, self._seconds = bench, method, seconds
        self.results: dict[float, DecomposeResult[Any]] = {}
        self._speeds: dict[float, float] = {}
        self._known: dict[str, float] = {}  # by plan

    def speed(self, energy: float) -> float:
        """Return the speed-up at an energy."""
        if energy not in self._speeds:
            model, example = self._bench.model, self._bench.example
            result = surgery.decompose(model, example, ranks=f"energy={energy!r}", factorization=self._method)
            plan = str([(d.site, d.rank) for d in result.plan])
            if plan not in self._known:
                timing = self._bench.times([result.model], self._seconds) if result.changes else None
                self._known[plan] = 1.0 if timing is None else timing.comparisons[0].speedup
            self.results[energy], self._speeds[energy] = result, self._known[plan]
            tell(f"{self._bench.name} {self._method} at energy {energy:.5f}: {self._speeds[energy]:.2f}x")
        return self._speeds[energy]

    def search(self, aim: float) -> float:
        """Return the largest energy found with a speed-up of ``aim``; that of the fastest model if there is none."""
        low, high = SPAN
        for energy in sorted(self._speeds):  # other targets have narrowed the span
            low, high = (energy, high) if self._speeds[energy] >= aim else (low, min(high, max(energy, low)))
        for _ in range(STEPS if self.speed(low) >= aim else 0):
            if aim <= self.speed(low) < aim * NEAR or low >= high:
                break
            middle = _between(low, high)
            low, high = (middle, high) if self.speed(middle) >= aim else (low, middle)
        fast = [energy for energy, speed in self._speeds.items() if speed >= aim]
        return max(fast) if fast else max(self._speeds, key=lambda energy: self._speeds[energy])


def _between(low: float, high: float) -> float:
    """Return the energy between two, halfway in the logarithm of what is lost."""
    return round(1 - math.sqrt((1 - low) * (1 - high)), 5)


def measure(bench: Bench, target: float, plain: dict[str, Energies], seconds: float) -> Row:
    """Return the row of a target: `auto`, and each plain factorization that is as fast."""
    start = time.perf_counter()
    result = bench.automatic(target)
    taken = time.perf_counter() - start
    timing = None if result.search is None else result.search.timing
    aim = target if timing is None or not result.changes else timing.comparisons[0].speedup
    energies: dict[str, float | None] = {method: each.search(aim) for method, each in plain.items()}
    made = {"auto": result} | {method: plain[method].results[e] for method, e in energies.items() if e is not None}
    made = {way: each for way, each in made.items() if each.changes}
    if not made:
        return Row(target, True, str(result.promise), (), taken)
    timing = bench.times([each.model for each in made.values()], seconds)
    least = timing.comparisons[0].speedup if result.changes else target
    points = []
    for at, (way, each) in enumerate(made.items()):
        found: ModelComparison = timing.comparisons[at]
        energy = energies.get(way)
        seen = (found.speedup, found.low, found.high, timing.models[at + 1].spread)
        score, reached = bench.score_of(way, each.model, energy), found.speedup * NEAR >= least
        points.append(Point(way, *seen, score, len(each.changes), energy, reached))
    return Row(target, not result.changes, str(result.promise), tuple(points), taken)


def report(files: Files, name: str, options: argparse.Namespace) -> Report:
    """Measure one file at all targets."""
    start = time.perf_counter()
    bench = Bench(files, name, options)
    plain = {method: Energies(bench, method, options.seconds) for method in PLAIN}
    own = bench.times([], options.seconds).models[0]
    rows = tuple(measure(bench, target, plain, options.seconds) for target in options.targets)
    return Report(
        name,
        files.metric(name),
        len(bench.calibration),
        kind_of(bench.model).fixed_batch(bench.model),
        bench.score,
        own.median_s,
        own.spread,
        rows,
        time.perf_counter() - start,
    )


def show(reports: Sequence[Report], before: set[str]) -> None:
    """Print one line for each file and target, and what `auto` said of each."""
    cells = [["file", "target", "original", *(h for way in ("auto", *PLAIN) for h in (way, "at", "+-")), "plan"]]
    for each in reports:
        for row in each.rows:
            points = {point.way: point for point in row.points}
            shown = [cell for way in ("auto", *PLAIN) for cell in _cells(points.get(way))]
            mark = f"{each.file} (from before)" if each.file in before else each.file
            cells.append([mark, f"{row.target:g}x", f"{each.score:.4f}", *shown, f"{row.seconds:.0f} s"])
    print(table(cells))
    for each in reports:
        batch = "any batch" if each.batch is None else f"batches of {each.batch}"
        print(
            f"{each.file}: metric {each.metric}, {each.samples} samples in {batch}, original {1e3 * each.median_s:.2f} "
            f"ms (spread {100 * each.spread:.0f} %), {each.seconds:.0f} s in all"
        )
        for row in each.rows:
            print(f"  {row.said}")


def _cells(point: Point | None) -> list[str]:
    if point is None:
        return ["-", "original", ""]
    half = (point.high - point.low) / 2
    return [f"{point.score:.4f}", f"{'' if point.reached else '<'}{point.speedup:.2f}x", f"{half:.2f}"]


def _asked(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that figures depend on."""
    names = ("targets", "samples", "score", "seconds")
    return {name: getattr(options, name) for name in names}


def _where(where: Environment) -> dict[str, Any]:
    return {key: value for key, value in asdict(where).items() if key != "load"}


def kept(options: argparse.Namespace, where: Environment) -> list[Report]:
    """Return the reports of earlier runs that need not be made again."""
    if not (options.resume and options.json and options.json.is_file()):
        return []
    known = json.loads(options.json.read_text())
    now = json.loads(json.dumps({"asked": _asked(options), "environment": _where(where)}))
    same = {key: known.get(key) for key in now}
    same["environment"] = {key: value for key, value in (same["environment"] or {}).items() if key != "load"}
    if same != now:
        tell(f"{options.json} was measured with other options or elsewhere: all is measured anew")
        return []
    return [_read(values) for values in known["files"]]


def _read(values: dict[str, Any]) -> Report:
    rows = [Row(**row | {"points": tuple(Point(**point) for point in row["points"])}) for row in values["rows"]]
    return Report(**values | {"rows": tuple(rows)})


def write(path: Path, values: dict[str, Any]) -> None:
    """Write a file whole, or leave the one from before."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(values, indent=2) + "\n")
    Path(file.name).replace(path)


def main() -> None:
    """Measure, print and write."""
    warnings.simplefilter("ignore")  # torch warns about itself
    parser = option_parser((__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", type=float, nargs="+", default=list(TARGETS), help="speed-ups to ask for")
    parser.add_argument("--samples", type=int, default=256, help="about so many calibration samples")
    parser.add_argument("--score", type=int, help="test samples of a score  [default: those of onnx_files.py]")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to measure each model")
    parser.add_argument("--threads", type=int, help="of onnxruntime  [default: the physical cores]")
    parser.add_argument("--resume", action="store_true", help="keep what --json has, and measure the rest")
    options = parser.parse_args()
    options.threads = options.threads or make_backend().threads
    files, where = open_files(options), environment(options.threads)
    names = chosen(options.only or NAMES, files.names)
    reports = kept(options, where)
    before, failed = {each.file for each in reports}, []
    try:
        for name in (name for name in names if name not in before):
            try:
                reports.append(report(files, name, options))
            except Exception as error:  # the other files go on
                failed.append(f"{name} failed: {type(error).__name__}: {str(error)[:300]}")
                tell(failed[-1])
            if options.json:
                rows = [asdict(each) for each in reports]
                write(options.json, {"asked": _asked(options), "environment": asdict(where), "files": rows})
    except KeyboardInterrupt:
        tell("interrupted: what is done is shown")
    show(reports, before)
    for text in failed:
        print(text)
    print(
        f"{where.cpu}, {where.threads} threads, load {where.load} at the start, onnxruntime {where.onnxruntime}, torch "
        f"{where.torch}"
    )


if __name__ == "__main__":
    main()
