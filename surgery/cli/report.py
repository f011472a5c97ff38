"""The commands that explain a result: its report as a page, how two plans differ, which sites cost the most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import FILE, as_json, default_output, load_function, model_options, open_program
from surgery.errors import InputError
from surgery.system.writing import check_outputs

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from surgery.passes.bisect import Bisection

__all__ = ["bisect", "plan", "report"]


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="The page.  [default: MODEL.report.html beside MODEL]")
@click.option("--force", is_flag=True, help="Overwrite a file that exists.")
@as_json
def report(model: Path, output: Path | None, force: bool, json_: bool) -> None:
    """Write what decompose did to MODEL, and why, as one HTML page; with --json only print it, unless -o is given.

    MODEL may be a folder of stages: then the page shows where the network was cut.
    """
    from surgery.cli import show
    from surgery.report import render, render_split
    from surgery.stages.folder import is_folder, read_report
    from surgery.system.writing import text_writer, write_atomically

    target = None if json_ and output is None else output or default_output(model, "report.html")
    if target is not None:
        check_outputs([target], [model], force=force)
    if is_folder(model):
        cut = read_report(model)
        found, page = cut.to_json(), render_split(cut, name=model.name)
    else:
        found = _read_report(model)
        page = render(found)  # also where no page is asked for: nothing is passed on that one could not show
    if target is not None:
        write_atomically(target, text_writer(page), force=force)
    if json_:
        show.print_json(found)
    else:
        show.say(f"wrote {target}")


def _read_report(model: Path) -> dict[str, Any]:
    """Return the report in MODEL, with the name and the size that its file has now."""

    from surgery.files.load import load
    from surgery.files.save import model_size
    from surgery.report import read

    found = read(load(model))
    after = found.get("after")
    if isinstance(after, dict):
        found["after"] = after | {"file_size": model_size(model)}
    return found | {"output": str(model)}


@click.group()
def plan() -> None:
    """Work with plan files."""


@plan.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@as_json
def diff(a: Path, b: Path, json_: bool) -> None:
    """Show each site on which the plans A and B differ."""
    from surgery.cli import show
    from surgery.plans.plan import Plan

    lines = Plan.read(a).diff(Plan.read(b))
    if json_:
        show.print_json({"equal": not lines, "differences": lines})
    else:
        for line in lines or ["the plans are equal"]:
            show.say(line, indent="  ")


@click.command()
@click.argument("model", type=FILE)
@click.argument("decomposed", type=FILE, required=False)
@click.option("--plan", "plan_file", type=FILE, help="Carry out this plan file on MODEL, instead of DECOMPOSED.")
@click.option("--eval", "metric", required=True, metavar="MODULE:FUNCTION", help="The metric; higher is better.")
@click.option(
    "--least",
    type=click.FloatRange(0, 1),
    default=0.1,
    show_default=True,
    help="Groups of sites that cost less than this share of the whole loss are not told apart.",
)
@model_options
@as_json
def bisect(
    model: Path,
    decomposed: Path | None,
    plan_file: Path | None,
    metric: str,
    least: float,
    json_: bool,
    **options: Any,
) -> None:
    """Find the sites of DECOMPOSED, made of MODEL, that cost the most of a metric."""
    from surgery.cli import show
    from surgery.passes.bisect import bisect as run

    if (decomposed is None) == (plan_file is None):
        raise InputError("bisect needs one decomposed model", allowed="DECOMPOSED or --plan FILE, one of them")
    evaluate = load_function(metric)
    with show.progress(quiet=json_) as progress:
        progress("load", 0, 1)
        program, inputs = open_program(model, **options)
        other = _second(program, inputs, decomposed, plan_file, options, progress)
        found = run(program, other, inputs, metric=evaluate, least=least, progress=progress)
    if json_:
        show.print_json(_bisection_json(found))
    else:
        show.bisection_tables(found)


def _second(
    program: ExportedProgram,
    inputs: Any,
    decomposed: Path | None,
    plan_file: Path | None,
    options: dict[str, Any],
    progress: Any,
) -> ExportedProgram:
    """Return the decomposed program: from its file, or by carrying out the plan."""
    from surgery.passes.decompose import decompose
    from surgery.plans.plan import Plan

    if decomposed is not None:
        return open_program(decomposed, **options)[0]
    assert plan_file is not None  # the command has seen to it
    return decompose(program, inputs, ranks=Plan.read(plan_file), progress=progress).model


def _bisection_json(found: Bisection) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(found) | {"loss": found.loss}
