"""The commands ``split`` and ``join``: a model cut into stages in a folder, and put together again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import (
    FILE,
    as_json,
    default_output,
    open_program,
    open_split,
    opening_options,
    parse_bytes,
)
from surgery.errors import FileError, InputError
from surgery.system.writing import check_folder, check_outputs, write_together

if TYPE_CHECKING:
    from surgery.stages.split import Split

__all__ = ["bench_folder", "join", "split"]

_OPENING = ("input_shapes", "factory", "trust", "seed")


def _size(_context: click.Context, _option: click.Parameter, text: str | None) -> int | None:
    return None if text is None else parse_bytes(text)


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="The new folder.  [default: MODEL.stages beside MODEL]")
@click.option("--stages", type=click.IntRange(1, 4096), help="How many stages.  [default: 2]")
@click.option("--link", default="1GB/s", show_default=True, help="Bytes or bits a second between stages, as 10Gbit/s.")
@click.option("--memory", metavar="SIZE", help="Most bytes that a stage may need, as 2GB.")
@click.option(
    "--balance",
    type=click.Choice(["time", "params", "memory"]),
    default="time",
    show_default=True,
    help="What the dearest stage has least of; time counts transfers.",
)
@click.option("--at", multiple=True, metavar="VALUE", help="Cut at this value; repeat it for all that may cross.")
@click.option("--relay", is_flag=True, help="Send values from each stage to the next alone, as schedules of torch do.")
@click.option(
    "--ties",
    type=click.Choice(["copy", "together"]),
    default="copy",
    show_default=True,
    help="Weights read in several stages: one copy in each, or keep all that reads one together.",
)
@click.option("--no-measure", is_flag=True, help="Estimate times; measure nothing.")
@click.option(
    "--prove", type=click.FloatRange(min=0), default=0.0, help="Seconds for a tighter bound, or a better cut."
)
@click.option("--dry-run", is_flag=True, help="Print the stages and write nothing.")
@click.option("--force", is_flag=True, help="Write into a folder that holds files; an older split is replaced.")
@opening_options
@click.option("--work-memory", metavar="SIZE", callback=_size, help="Most memory that work on MODEL may need, as 12G.")
@as_json
def split(model: Path, **given: Any) -> None:
    """Cut MODEL into stages that run one after another on several devices or machines.

    The folder gets a file for each stage, which is a model itself, and manifest.json: what each takes and gives, the
    bytes that cross, and the seconds of each.
    """
    from surgery.cli import show
    from surgery.stages.split import split as run

    output = None if given["dry_run"] else given["output"] or default_output(model, "stages")
    if output is not None:
        check_folder(output, [model], force=given["force"])
    opening = {name: given[name] for name in _OPENING} | {"memory": given["work_memory"]}
    with show.progress(quiet=given["json_"]) as progress:
        progress("load", 0, 1)
        with _naming_memory():
            program, inputs = open_program(model, **opening)
        cut = run(
            program,
            inputs,
            stages=given["stages"],
            link=given["link"],
            memory=given["memory"],
            balance=given["balance"],
            relay=given["relay"],
            ties=given["ties"],
            measure=not given["no_measure"],
            prove=given["prove"],
            at=given["at"],
            progress=progress,
        )
        if output is not None:
            progress("write", 0, 1)
            cut.save(output, force=given["force"])
    if given["json_"]:
        show.print_json(_json(model, output, cut))
    else:
        _tables(model, output, cut)


@contextmanager
def _naming_memory() -> Iterator[None]:
    """Let errors name this command's option for the memory of the work; ``--memory`` is that of a stage."""
    try:
        yield
    except FileError as error:
        next_step = error.next_step and error.next_step.replace("--memory", "--work-memory")
        raise type(error)(error.what, allowed=error.allowed, next_step=next_step) from error


@click.command()
@click.argument("folder", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The model: .pt2, .onnx, or .safetensors with --model.")
@click.option("--model", "factory", metavar="MODULE:FACTORY", help="What makes the module that gets the weights.")
@click.option("--memory", metavar="SIZE", callback=_size, help="Most memory that the work may need, as 12G.")
@click.option("--force", is_flag=True, help="Overwrite a file that exists.")
@as_json
def join(folder: Path, output: Path, factory: str | None, memory: int | None, force: bool, json_: bool) -> None:
    """Join the stages in FOLDER to the model that was split: its graph, its names, its weights."""
    from surgery.cli import show
    from surgery.files.save import model_files
    from surgery.stages.split import join as run
    from surgery.stages.split import load_split

    check_outputs([output], list(folder.iterdir()) if folder.is_dir() else [], force=force)
    with show.progress(quiet=json_) as progress:
        progress("load", 0, 1)
        cut = load_split(folder, memory=memory)
        progress("join", 0, 1)
        joined = run(cut, factory)
        write_together(model_files(joined, output), force=force)
    if json_:
        show.print_json({"input": str(folder), "output": str(output), "stages": len(cut.stages)})
    else:
        show.say(f"wrote {output}: {len(cut.stages)} stages joined")


def bench_folder(
    folder: Path, refused: Sequence[str], seconds: float, batch: int | None, json_: bool, **options: Any
) -> None:
    """Time the stages in a folder in a pipeline, against the whole model on one core; print both.

    Raises:
        InputError: options that a pipeline does not take, which ``refused`` names.
    """
    from surgery.cli import show
    from surgery.kinds.inputs import with_batch

    if refused:
        what = f"{refused[0]} with a folder of stages, each of which runs in one thread"
        raise InputError(what, next_step="leave it out, or join the stages first")
    with show.progress(quiet=json_) as progress:
        progress("load", 0, 1)
        opening = {name: options[name] for name in ("input_shapes", "memory", "seed")}
        cut, inputs = open_split(folder, **opening)
        inputs = inputs if batch is None else with_batch(inputs, batch)
        report = lambda share: progress("time", round(100 * share), 100)  # noqa: E731
        timing = cut.bench(inputs, seconds=seconds, seed=options["seed"], progress=report)
    if json_:
        show.print_json(timing.to_json())
        return
    show.table("Throughput and latency", timing.rows())
    show.say()
    s = timing.speedup
    show.say(f"throughput: {s.value:.2f}x, 95 % interval {s.low:.2f} to {s.high:.2f}; {s.verdict}")
    show.say(f"inputs: {', '.join(timing.inputs)}; outputs of the stages are {timing.error:.1e} off the whole's")
    show.say(f"onnxruntime {timing.environment.onnxruntime}, one thread a core, {timing.environment.cpu}")


def _json(model: Path, output: Path | None, cut: Split) -> dict[str, Any]:
    return {"input": str(model), "output": None if output is None else str(output)} | cut.report.to_json()


def _tables(model: Path, output: Path | None, cut: Split) -> None:
    from surgery.cli import show

    show.split_tables(model, cut.report)
    show.say()
    show.say("dry run: nothing was written" if output is None else f"wrote {output}")
