"""What the commands print: rich tables for people, JSON for programs."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from surgery.leftover import left_alone
from surgery.sites import Skip
from surgery.text import change, count, rank_text, seconds

if TYPE_CHECKING:
    from surgery.benchmark import Timing
    from surgery.comparison import Difference
    from surgery.export import ExportReport
    from surgery.graphs import Found
    from surgery.passes.decompose import DecomposeResult
    from surgery.passes.recompose import RecomposeResult

__all__ = [
    "STEPS",
    "decompose_tables",
    "difference_tables",
    "export_json",
    "export_lines",
    "found_json",
    "found_tables",
    "print_json",
    "progress",
    "recompose_json",
    "recompose_tables",
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
    "export": "exporting",
    "recompose": "fusing",
}


def _console() -> Console:
    """Return a console on standard output; as wide as the terminal, and wide where there is none to wrap for."""
    return Console(width=None if sys.stdout.isatty() else 140, highlight=False)


def print_json(data: Any) -> None:
    """Print JSON to standard output."""
    sys.stdout.write(json.dumps(data, indent=2) + "\n")


@contextlib.contextmanager
def progress(*, quiet: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar for each step on standard error while it works; nothing afterwards, or where it is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def report(step: str, done: int, total: int) -> None:
            if step not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[step] = bars.add_task(STEPS.get(step, step))
            bars.update(tasks[step], completed=done, total=total)

        yield report


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", box=None, pad_edge=False)
    for i, name in enumerate(columns):
        words = i == 0 or name in ("operator", "method", "reason", "verdict")
        table.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=i == 0)
    return table


def _shape(shape: Any) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _skips_table(skips: tuple[Skip, ...]) -> Table:
    table = _table("Left alone", "name", "operator", "reason")
    for skip in skips:
        table.add_row(skip.name, skip.operator, skip.reason)
    return table


def found_json(found: Found) -> dict[str, Any]:
    """Return the sites, skips and totals of a model."""
    total = found.totals.macs or 1
    sites = [
        {
            "name": spot.site.name,
            "aliases": list(spot.site.aliases),
            "operator": spot.site.description,
            "weight_shape": list(spot.site.operator.weight.shape),
            "input_shape": list(spot.site.input_shape),
            "calls": spot.site.calls,
            "parameters": spot.site.parameters,
            "macs": spot.site.macs,
            "share": spot.site.macs / total,
        }
        for spot in found.spots
    ]
    return {"sites": sites, "skips": [asdict(skip) for skip in found.skips], "totals": asdict(found.totals)}


def found_tables(path: Path, found: Found) -> None:
    """Print the sites, skips and totals of a model."""
    console = _console()
    if (left := left_alone(found.skips, found.totals.macs, exported=_is_program(path))) is not None:
        console.print(left, markup=False)
    columns = ("name", "operator", "weight", "input", "calls", "parameters", "MACs", "share of MACs")
    table = _table(f"Sites of {path}", *columns)
    total = found.totals.macs or 1
    for site in (spot.site for spot in found.spots):
        shapes = (_shape(site.operator.weight.shape), _shape(site.input_shape))
        costs = (str(site.calls), count(site.parameters), count(site.macs), f"{100 * site.macs / total:.1f} %")
        table.add_row(site.name, site.description, *shapes, *costs)
    console.print(table)
    if found.skips:
        console.print()
        console.print(_skips_table(found.skips))
    console.print(
        f"\n{len(found.spots)} sites, {len(found.skips)} left alone; "
        f"{count(found.totals.parameters)} parameters and {count(found.totals.macs)} MACs in all"
    )


def _is_program(path: Path) -> bool:
    return path.suffix == ".pt2"


def _size(path: Path | None) -> int | None:
    return None if path is None or not path.exists() else path.stat().st_size


def decompose_tables(files: tuple[Path, Path | None], result: DecomposeResult, timing: Timing | str | None) -> None:
    """Print a row for each site, then the model before and after, then the verdict."""
    console = _console()
    if (left := left_alone(result.skips, result.before.macs, exported=_is_program(files[0]))) is not None:
        console.print(left, markup=False)
    table = _table("Sites", "site", "operator", "method", "rank", "weight error", "MACs", "latency", "reason")
    for c in result.changes:
        error = "-" if c.error is None else f"{c.error:.3g}"
        macs = f"{count(c.dense_macs)} -> {count(c.macs)}"
        latency = "-" if c.latency is None else f"{seconds(c.dense_latency)} -> {seconds(c.latency)}"
        table.add_row(c.site, c.operator, c.factorization, rank_text(c.rank), error, macs, latency, c.note)
    for skip in result.skips:
        table.add_row(skip.name, skip.operator, "dense", "-", "-", count(skip.macs), "-", skip.reason)
    console.print(table)
    console.print()
    console.print(_totals_table(files, result, timing))
    console.print()
    for line in _verdict(files[1], result, timing):
        console.print(line)


def _totals_table(files: tuple[Path, Path | None], result: DecomposeResult, timing: Timing | str | None) -> Table:
    table = _table("Model", "", "before", "after", "change")
    rows: list[tuple[str, float | None, float | None, Callable[[Any], str]]] = [
        ("parameters", result.before.parameters, result.after.parameters, count),
        ("MACs", result.before.macs, result.after.macs, count),
    ]
    if files[1] is not None:
        rows.append(("file size (bytes)", _size(files[0]), _size(files[1]), count))
    if timing is not None and not isinstance(timing, str):
        rows.append(("latency", timing.models[0].median_s, timing.models[1].median_s, seconds))
    for name, before, after, say in rows:
        table.add_row(name, say(before), say(after), change(before, after))
    return table


def _verdict(output: Path | None, result: DecomposeResult, timing: Timing | str | None) -> Iterator[str]:
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
    if output is None and result.plan.ranks == "auto":
        yield "a plan without a promise: to keep one, auto may take higher ranks, or leave sites dense"
    yield "dry run: nothing was written" if output is None else f"wrote {output}"


def _where(timing: Timing) -> str:
    e = timing.environment
    return f"onnxruntime {e.onnxruntime}, {e.threads} threads, {e.cpu} {e.instruction_set}, torch {e.torch}"


def recompose_json(files: tuple[Path, Path], result: RecomposeResult) -> dict[str, Any]:
    """Return what was fused and what was refused."""
    return {
        "input": str(files[0]),
        "output": str(files[1]),
        "changes": [asdict(c) for c in result.changes],
        "skips": [asdict(skip) for skip in result.skips],
    }


def recompose_tables(files: tuple[Path, Path, Path | None], result: RecomposeResult) -> None:
    """Print each fused chain and each refusal, and the files."""
    console = _console()
    table = _table("Fused", "site", "operator", "parts", "parameters before", "after")
    for c in result.changes:
        table.add_row(c.site, c.operator, str(len(c.parts)), count(c.parameters_before), count(c.parameters))
    console.print(table)
    for c in result.changes:
        if c.note:
            console.print(f"note: {c.site}: {c.note}")
    if result.skips:
        console.print()
        console.print(_skips_table(result.skips))
    console.print(f"\n{len(result.changes)} chains fused, {len(result.skips)} refused")
    for path in files[1:]:
        if path is not None:
            console.print(f"wrote {path}")


def export_json(report: ExportReport) -> dict[str, Any]:
    """Return what was written and how far onnxruntime is from PyTorch."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(report).items()}


def export_lines(report: ExportReport) -> None:
    """Print what was written and how far onnxruntime is from PyTorch."""
    console = _console()
    dynamic = ", dynamic sizes kept" if report.dynamic else ""
    console.print(f"wrote {report.path} ({count(report.size)}B, opset {report.opset}{dynamic})")
    console.print(f"inputs: {', '.join(report.inputs)}", markup=False)
    console.print(
        f"onnxruntime against PyTorch: relative error {report.relative_error:.2e}, largest {report.max_abs_error:.2e}"
    )


def timing_tables(timing: Timing) -> None:
    """Print the latency of each model, each comparison, and where it was measured."""
    console = _console()
    table = _table("Latency", "model", "median", "p90", "spread", "runs", "speed-up", "95 % interval", "verdict")
    for m, c in zip(timing.models, (None, *timing.comparisons), strict=True):
        compared = () if c is None else (f"{c.speedup:.2f}x", f"{c.low:.2f} to {c.high:.2f}", c.verdict)
        spread = f"{100 * m.spread:.1f} %"
        table.add_row(m.path, seconds(m.median_s), seconds(m.p90_s), spread, str(m.runs), *compared)
    console.print(table)
    console.print(f"\n{_where(timing)}; spread is the interquartile range over the median")


def difference_tables(files: tuple[Path, Path], difference: Difference) -> None:
    """Print the differences of each output."""
    console = _console()
    title = f"Outputs of {files[1]} against {files[0]}"
    table = _table(title, "output", "shape", "largest difference", "relative error")
    for output in difference.outputs:
        table.add_row(output.name or "output", _shape(output.shape), f"{output.max_abs:.3e}", f"{output.relative:.3e}")
    console.print(table)
