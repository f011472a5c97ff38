"""What the commands print: tables and lines for people, JSON for programs.

Texts from outside (names, reasons, paths, what libraries say) are printed by ``say``, ``table`` and ``reasons`` alone,
which escape them. On a terminal no line is wider than it is; elsewhere nothing is cut or broken.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from surgery.files.save import model_size
from surgery.sites import Skip, left_alone
from surgery.system.tables import layout
from surgery.text import change, count, rank_text, seconds, shown, wrap

if TYPE_CHECKING:
    from surgery.passes.bisect import Bisection
    from surgery.passes.original import Original
    from surgery.passes.recompose import RecomposeResult
    from surgery.passes.results import DecomposeResult
    from surgery.runtime.bench import Timing
    from surgery.runtime.compare import Difference
    from surgery.runtime.export import ExportReport
    from surgery.stages.report import SplitReport

__all__ = [
    "STEPS",
    "bisection_tables",
    "decompose_tables",
    "difference_tables",
    "export_json",
    "export_lines",
    "found_json",
    "found_tables",
    "print_json",
    "progress",
    "reasons",
    "recompose_json",
    "recompose_tables",
    "say",
    "split_tables",
    "table",
    "timing_tables",
]

# what progress is shown as, by the names of steps that passes report
STEPS = {
    "load": "loading",
    "plan": "choosing ranks",
    "calibrate": "running the calibration inputs",
    "differentiate": "measuring sensitivity",
    "match": "making inputs that match the batch norms",
    "measure": "measuring sites",
    "factor": "factoring",
    "fit": "fitting factors",
    "correct": "correcting batch norms",
    "evaluate": "evaluating",
    "time": "timing both models",
    "operations": "measuring operations",
    "cut": "seeking the best cuts",
    "stages": "measuring stages",
    "write": "writing",
    "join": "joining",
    "export": "exporting",
    "recompose": "fusing",
}


_MANY = 12  # names for one reason, of which a terminal shows no more
# a number, or some as 9,1, that stands for itself, not in a name
_NUMBER = re.compile(r"""(?<![\w.'"-])\d+(?:\.\d+)?(?:,\d+)*""")


def _columns() -> int | None:
    """Return how wide the terminal is that standard output goes to; None where it goes elsewhere."""
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None


def _write(line: str, *, bold: bool = False) -> None:
    """Write a line that is escaped already; what the encoding of the stream lacks is escaped as well."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    said = line.encode(encoding, "backslashreplace").decode(encoding)
    click.echo(click.style(said, bold=True) if bold and os.environ.get("TERM") != "dumb" else said)


def say(text: str = "", *, indent: str = "", bold: bool = False) -> None:
    """Print a text as one line, or as several of whole words on a terminal; all but the first are indented."""
    for line in wrap(shown(text), _columns(), indent):
        _write(line, bold=bold)


def table(title: str, rows: Sequence[Sequence[str]], *, words: int = 1) -> None:
    """Print a table of which the first row has the headings, and the first ``words`` columns texts."""
    if title:
        say(title, bold=True)
    head, body = layout(rows, words=words, columns=_columns())
    for line in head:
        _write(line, bold=True)
    for line in body:
        _write(line)


def reasons(title: str, places: Iterable[tuple[str, str, str, int]]) -> None:
    """Print each reason, and beneath it the places that have it: (name, operator, reason, MACs), 0 for not known.

    Reasons that differ in numbers alone are one reason, with the smallest and the largest number.
    """
    groups: dict[str, list[tuple[str, str, str, int]]] = defaultdict(list)
    for place in places:
        groups[_NUMBER.sub("#", place[2])].append(place)
    if not groups:
        return
    say()
    say(title, bold=True)
    for group in groups.values():
        macs = sum(place[3] for place in group)
        facts = [f"{len(group)} places"] * (len(group) > 1) + [f"{count(macs)} MACs"] * bool(macs)
        say(_in_common([place[2] for place in group]) + f" ({', '.join(facts)})" * bool(facts), indent="  ")
        names = [f"{name} ({operator})" if operator else name for name, operator, *_ in group]
        if _columns() is not None and len(names) > _MANY:
            names[_MANY:] = [f"and {len(names) - _MANY} more"]
        say(f"    {', '.join(names)}", indent="    ")


def _in_common(alike: Sequence[str]) -> str:
    """Return reasons that differ in numbers alone as one.

    >>> _in_common(["rank 30 is above its full rank 10", "rank 30 is above its full rank 9,1"])
    'rank 30 is above its full rank 9,1 to 10'
    """
    numbers = (sorted(set(each), key=_size_of) for each in zip(*map(_NUMBER.findall, alike), strict=True))
    ranges = (each[0] if len(each) == 1 else f"{each[0]} to {each[-1]}" for each in numbers)
    return _NUMBER.sub(lambda _: next(ranges), alike[0])


def _size_of(number: str) -> tuple[float, ...]:
    return tuple(map(float, number.split(",")))


def _skips(title: str, skips: Iterable[Skip]) -> None:
    reasons(title, ((skip.name, skip.operator, skip.reason, skip.macs) for skip in skips))


def print_json(data: Any) -> None:
    """Print JSON to standard output."""
    click.echo(json.dumps(data, indent=2))


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each step on standard error while it works; nothing afterwards, or where it is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[step] = bars.add_task(STEPS.get(step) or shown(step))
            bars.update(tasks[step], completed=done, total=total)

        yield report


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "scalar"


def found_json(original: Original) -> dict[str, Any]:
    """Return the sites, skips and totals of a model."""
    total = original.totals.macs or 1
    sites = [
        {
            "name": site.name,
            "aliases": list(site.aliases),
            "operator": site.description,
            "weight_shape": list(site.operator.weight.shape),
            "input_shape": list(site.input_shape),
            "calls": site.calls,
            "parameters": site.parameters,
            "macs": site.macs,
            "share": site.macs / total,
        }
        for site in original.sites.values()
    ]
    return {"sites": sites, "skips": [asdict(skip) for skip in original.skips], "totals": asdict(original.totals)}


def found_tables(path: Path, original: Original) -> None:
    """Print the sites, skips and totals of a model."""
    if (left := left_alone(original.skips, original.totals.macs, exported=_is_program(path))) is not None:
        say(left)
    sites = list(original.sites.values())
    calls = any(site.calls != 1 for site in sites)
    rows = [["name", "operator", "weight", "input", *["calls"] * calls, "parameters", "MACs", "share of MACs"]]
    total = original.totals.macs or 1
    for site in sites:
        shapes = (_shape(site.operator.weight.shape), _shape(site.input_shape), *[str(site.calls)] * calls)
        costs = (count(site.parameters), count(site.macs), f"{100 * site.macs / total:.1f} %")
        rows.append([site.name, site.description, *shapes, *costs])
    table(f"Sites of {path}", rows, words=2)
    _skips("Left alone", original.skips)
    say()
    say(
        f"{len(original.sites)} sites, {len(original.skips)} left alone; "
        f"{count(original.totals.parameters)} parameters and {count(original.totals.macs)} MACs in all"
    )


def _is_program(path: Path) -> bool:
    return path.suffix == ".pt2"


def _size(path: Path | None) -> int | None:
    return None if path is None or not path.exists() else model_size(path)


def decompose_tables(
    files: tuple[Path, Path | None], result: DecomposeResult[Any], timing: Timing | str | None
) -> None:
    """Print a row for each site that was factored, the reasons for the others, the whole model, then the verdict."""
    if (left := left_alone(result.skips, result.before.macs, exported=_is_program(files[0]))) is not None:
        say(left)
    timed = any(c.latency is not None for c in result.changes)
    rows = [["site", "operator", "method", "rank", "weight error", "MACs", *["latency"] * timed]]
    for c in result.changes:
        error = "-" if c.error is None else f"{c.bounded}{c.error:.3g}"
        macs = f"{count(c.dense_macs)} -> {count(c.macs)}"
        latency = "-" if c.latency is None else f"{seconds(c.dense_latency)} -> {seconds(c.latency)}"
        rows.append([c.site, c.operator, c.factorization, rank_text(c.rank), error, macs, *[latency] * timed])
    if result.changes:
        table("Factored", rows, words=3)
    reasons("Notes", ((c.site, "", c.note, 0) for c in result.changes if c.note))
    _skips("Left alone", result.skips)
    say()
    table("Model", _totals(files, result, timing))
    say()
    for line in _verdict(files[1], result, timing):
        say(line)


def _totals(
    files: tuple[Path, Path | None], result: DecomposeResult[Any], timing: Timing | str | None
) -> list[tuple[str, ...]]:
    rows: list[tuple[str, float | None, float | None, Callable[[Any], str]]] = [
        ("parameters", result.before.parameters, result.after.parameters, count),
        ("MACs", result.before.macs, result.after.macs, count),
    ]
    if files[1] is not None:
        rows.append(("file size (bytes)", _size(files[0]), _size(files[1]), count))
    if timing is not None and not isinstance(timing, str):
        rows.append(("latency", timing.models[0].median_s, timing.models[1].median_s, seconds))
    told = [(name, put(before), put(after), change(before, after)) for name, before, after, put in rows]
    return [("", "before", "after", "change"), *told]


def _verdict(output: Path | None, result: DecomposeResult[Any], timing: Timing | str | None) -> Iterator[str]:
    if isinstance(timing, str):
        yield f"latency was not measured: {timing}"
    elif timing is not None:
        c = timing.comparisons[0]
        predicted = None if result.search is None else result.search.predicted
        expected = "" if predicted is None else f", {predicted:.2f}x expected"
        yield f"{c.verdict}: {c.speedup:.2f}x, 95 % interval {c.low:.2f} to {c.high:.2f}{expected} ({_where(timing)})"
    if result.search is not None and result.search.metrics is not None:
        before, after = result.search.metrics
        yield f"metric: {before:.6g} -> {after:.6g}"
    if result.promise is not None:
        yield str(result.promise)
    if result.promise is None or result.promise.kind != "max_error":
        yield from [] if result.seen is None else [str(result.seen)]
    if not result.changes:
        yield "no site was factored: the model is the original"
        for speedup, error in [] if result.search is None else result.search.reached:
            yield f"within reach: {speedup:.2f}x at an output error of {error:.3g} (--best-effort takes the nearest)"
    if output is None and result.plan.ranks == "measured":
        yield "a plan without a promise: to keep one, auto may take higher ranks, or leave sites dense"
    yield "dry run: nothing was written" if output is None else f"wrote {output}"


def _where(timing: Timing) -> str:
    e = timing.environment
    return f"onnxruntime {e.onnxruntime}, {e.threads} threads, {e.cpu} {e.instruction_set}, torch {e.torch}"


def recompose_json(files: tuple[Path, Path], result: RecomposeResult[Any]) -> dict[str, Any]:
    """Return what was fused and what was refused."""
    return {
        "input": str(files[0]),
        "output": str(files[1]),
        "changes": [asdict(c) for c in result.changes],
        "skips": [asdict(skip) for skip in result.skips],
    }


def recompose_tables(files: tuple[Path, Path, Path | None], result: RecomposeResult[Any]) -> None:
    """Print each fused chain and each refusal, and the files."""
    rows = [["site", "operator", "parts", "parameters before", "after"]]
    for c in result.changes:
        rows.append([c.site, c.operator, str(len(c.parts)), count(c.parameters_before), count(c.parameters)])
    if result.changes:
        table("Fused", rows, words=2)
    reasons("Notes", ((c.site, "", c.note, 0) for c in result.changes if c.note))
    _skips("Left alone", result.skips)
    say()
    fused = len(result.changes)
    say(f"{fused} {'chain' if fused == 1 else 'chains'} fused, {len(result.skips)} refused")
    for path in files[1:]:
        if path is not None:
            say(f"wrote {path}")


def export_json(report: ExportReport) -> dict[str, Any]:
    """Return what was written and how far onnxruntime is from PyTorch."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(report).items()}


def export_lines(report: ExportReport) -> None:
    """Print what was written and how far onnxruntime is from PyTorch."""
    dynamic = ", dynamic sizes kept" if report.dynamic else ""
    say(f"wrote {report.path} ({count(report.size)}B, opset {report.opset}{dynamic})")
    say(f"inputs: {', '.join(report.inputs)}")
    say(f"onnxruntime against PyTorch: relative error {report.relative_error:.2e}, largest {report.max_abs_error:.2e}")


def timing_tables(timing: Timing) -> None:
    """Print the latency of each model, each comparison, and where it was measured."""
    rows = [["model", "median", "p90", "spread", "runs", "speed-up", "95 % interval", "verdict"]]
    for m, c in zip(timing.models, (None, *timing.comparisons), strict=True):
        compared = ("", "", "") if c is None else (f"{c.speedup:.2f}x", f"{c.low:.2f} to {c.high:.2f}", c.verdict)
        rows.append([m.path, seconds(m.median_s), seconds(m.p90_s), f"{100 * m.spread:.1f} %", str(m.runs), *compared])
    table("Latency", rows if timing.comparisons else [row[:5] for row in rows])
    say()
    say(f"inputs: {', '.join(timing.inputs)}")
    say(f"{_where(timing)}; spread is the interquartile range over the median")


def difference_tables(files: tuple[Path, Path], difference: Difference) -> None:
    """Print the differences of each output."""
    rows = [["output", "shape", "largest difference", "relative error"]]
    for output in difference.outputs:
        rows.append([output.name or "output", _shape(output.shape), f"{output.max_abs:.3e}", f"{output.relative:.3e}"])
    table(f"Outputs of {files[1]} against {files[0]}", rows)


def split_tables(model: Path, report: SplitReport) -> None:
    """Print the stages of a model, what crosses between them, and how good the cut is."""
    table(f"Stages of {model}", report.rows(), words=3)
    say()
    for line in report.lines():
        say(line, indent="  ")


def bisection_tables(found: Bisection) -> None:
    """Print who is to blame, what could not be tried, and the metric of both models."""
    rows = [["sites", "gain when dense again", "share of the loss"]]
    for blame in found.blames:
        rows.append([", ".join(blame.sites), f"{blame.gain:+.4g}", f"{100 * blame.gain / found.loss:.0f} %"])
    if found.blames:
        table("", rows)
    _skips("Not tried", found.skips)
    say()
    say(f"metric {found.original:.6g} -> {found.decomposed:.6g}, {found.evaluations} evaluations")
    if found.blames:
        site = shlex.quote(found.blames[0].sites[0])
        say(f"to undo a site: surgery decompose MODEL --plan PLAN --exclude {site}")
    else:
        say("decomposing has cost nothing of the metric")
