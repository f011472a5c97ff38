"""The command ``decompose``: its options as one value, what they ask for, and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.asked import DecomposeOptions, asked_for
from surgery.cli.names import FILE
from surgery.cli.options import as_json, default_output, model_options, open_program
from surgery.errors import SurgeryError
from surgery.system.writing import Writer, check_outputs, text_writer, write_together

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from surgery.passes.job import Asked
    from surgery.passes.results import DecomposeResult
    from surgery.plans.planner import Progress
    from surgery.runtime.bench import Timing

__all__ = ["decompose"]


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="The new file.  [default: MODEL.decomposed.pt2 beside MODEL]")
@click.option(
    "--ranks",
    show_default="auto",
    metavar="SPEC",
    help="auto, measured, vbmf, full, energy=0.9, keep_params=0.5, keep_macs=0.5, a whole number, or rank,rank.",
)
@click.option(
    "--factorization",
    show_default="auto",
    metavar="NAME",
    help="auto, tucker, svd, spatial, cp, tt, tr or depthwise.",
)
@click.option("--include", multiple=True, metavar="GLOB", help="Only sites that match; may be repeated.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No sites that match; may be repeated.")
@click.option(
    "--joint",
    multiple=True,
    metavar="SITE,SITE,...",
    help="Sites that share all factors but the last; may be repeated. inputs: all alike sites that read one value.",
)
@click.option("--plan", "plan_file", type=FILE, help="Carry out this plan file instead of making a plan.")
@click.option("--save-plan", type=FILE, help="Write the plan as JSON.")
@click.option("--dry-run", is_flag=True, help="Plan and print, but factor and write nothing (but --save-plan).")
@click.option(
    "--solver",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="auto; als, pp or gd for cp; tensorly for TensorLy's own.",
)
@click.option(
    "--calibration",
    type=FILE,
    help="Inputs by name, as .npz or .pt, or token ids, as .jsonl, to fit to.",
)
@click.option("--groups", type=int, help="With --calibration: groups to fit sites in.  [default: what costs little]")
@click.option("--max-error", type=float, help="For auto: largest relative output error.  [default: 0.05]")
@click.option("--target-speedup", type=float, help="For auto: least speed-up of the whole model.")
@click.option("--eval", "metric", metavar="MODULE:FUNCTION", help="A metric of a module; higher is better.")
@click.option("--max-drop", type=float, help="With --eval: by how much the metric may fall.")
@click.option("--cost", type=click.Choice(["latency", "macs", "params"]), default="latency", show_default=True)
@click.option("--no-promise", is_flag=True, help="For auto: the rule measured, which promises nothing.")
@click.option("--best-effort", is_flag=True, help="Where a speed-up is out of reach: the nearest, not the original.")
@click.option("--timing/--no-timing", default=True, help="Measure latencies (auto always does, for its choice).")
@click.option("--backend", show_default="onnxruntime", metavar="NAME", help="What measures latencies: onnxruntime.")
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@model_options
@as_json
def decompose(**given: Any) -> None:
    """Factor the sites of MODEL into chains of lower rank, and write the new model."""
    from surgery.cli import show
    from surgery.report import collect

    options = DecomposeOptions.read(given)
    target = None if options.dry_run else options.output or default_output(options.model, "decomposed.pt2")
    _check_files(options, target)
    asked = asked_for(options)
    with show.progress(quiet=options.json_) as progress:
        progress("load", 0, 1)
        program, inputs = open_program(options.model, **options.opening)
        result = _result(options, asked, program, inputs, progress)
        measured: Timing | str | None = None if result.search is None else result.search.timing
        if measured is None and options.timing and not options.dry_run and result.changes:
            measured = _time([program, result.model], inputs, progress)
        _write(options, target, result, measured)
    named = (options.model, target)
    if options.json_:
        show.print_json(collect(result, timing=measured, files=named))
    else:
        show.decompose_tables(named, result, measured)
    if result.promise is not None and not result.promise.kept:
        raise click.exceptions.Exit(3)


def _check_files(options: DecomposeOptions, target: Path | None) -> None:
    outputs = [path for path in (target, options.save_plan) if path is not None]
    read = [path for path in (options.model, options.plan_file, options.calibration) if path is not None]
    check_outputs(outputs, read, force=options.force)


def _result(
    options: DecomposeOptions, asked: Asked, program: ExportedProgram, inputs: Any, progress: Progress
) -> DecomposeResult[Any]:
    """Return what is asked for; of a dry run with the model as it is."""
    from surgery.passes.decompose import decompose as run
    from surgery.passes.preview import preview
    from surgery.plans.goal import Goal

    chosen: dict[str, Any] = {"include": options.include, "exclude": options.exclude}
    chosen |= {"factorization": options.factorization or "auto"}
    fits: dict[str, Any] = {"solver": options.solver, "calibration": options.calibration, "groups": options.groups}
    if isinstance(asked, Goal):
        return run(program, inputs, ranks=asked, joint=options.joint_groups, progress=progress, **chosen, **fits)
    chosen |= {"joint": options.joint_groups, "backend": (options.backend or "onnxruntime") if options.timing else None}
    planned = preview(program, inputs, ranks=asked, progress=progress, **chosen)
    if options.dry_run:
        return planned
    return run(program, inputs, ranks=planned.plan, progress=progress, **fits)


def _write(
    options: DecomposeOptions, target: Path | None, result: DecomposeResult[Any], measured: Timing | str | None
) -> None:
    """Write the model with its report, and the plan if that is wanted: both or none."""
    from surgery.files.save import model_writer
    from surgery.report import attach, collect

    files: list[tuple[Path, Writer]] = []
    if target is not None:
        attach(result.model, collect(result, timing=measured, files=(options.model, None)))
        files.append((target, model_writer(result.model, target)))
    if options.save_plan is not None:
        files.append((options.save_plan, text_writer(result.plan.to_json())))
    write_together(files, force=options.force)


def _time(models: list[ExportedProgram], inputs: Any, progress: Progress) -> Timing | str:
    """Return the timing of the models, or why it cannot be had: a model that ONNX cannot express is no failure here."""
    from surgery.runtime.bench import bench

    try:
        return bench(models, inputs, seconds=4.0, progress=lambda share: progress("time", round(100 * share), 100))
    except SurgeryError as error:
        return str(error)
