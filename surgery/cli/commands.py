"""The commands. Each opens the model, calls the Python API, and hands the result to ``show``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.names import FILE
from surgery.cli.options import as_json, default_output, file_inputs, load_function, model_options, open_program
from surgery.errors import InputError, SurgeryError
from surgery.system.writing import Writer, check_outputs, text_writer, write_together

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from surgery.runtime.bench import Timing

__all__ = ["bench", "compare", "decompose", "export", "inspect", "recompose"]


@click.command()
@click.argument("model", type=FILE)
@model_options
@as_json
def inspect(model: Path, json_: bool, **options: Any) -> None:
    """List the sites of MODEL with their costs, and what is left alone and why."""
    from surgery.cli import show
    from surgery.kinds.registry import open_model
    from surgery.sites.find import find

    program, inputs = open_program(model, **options)
    found = find(open_model(program, inputs).flow)
    if json_:
        show.print_json(show.found_json(found))
    else:
        show.found_tables(model, found)


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="The new file.  [default: MODEL.decomposed.pt2 beside MODEL]")
@click.option(
    "--ranks",
    default="auto",
    show_default=True,
    metavar="SPEC",
    help="auto, vbmf, full, energy=0.9, keep_params=0.5, keep_macs=0.5, a whole number, or rank,rank.",
)
@click.option(
    "--factorization",
    default="auto",
    show_default=True,
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
@click.option("--stages", type=int, help="With --calibration: runs to fit the sites in.  [default: what costs little]")
@click.option("--max-error", type=float, help="For auto: largest relative output error.  [default: 0.05]")
@click.option("--target-speedup", type=float, help="For auto: least speed-up of the whole model.")
@click.option("--eval", "metric", metavar="MODULE:FUNCTION", help="A metric of a module; higher is better.")
@click.option("--max-drop", type=float, help="With --eval: by how much the metric may fall.")
@click.option("--cost", type=click.Choice(["latency", "macs", "params"]), default="latency", show_default=True)
@click.option("--no-promise", is_flag=True, help="For auto without --calibration: a rule for ranks, no promise.")
@click.option("--best-effort", is_flag=True, help="Where a speed-up is out of reach: the nearest, not the original.")
@click.option("--timing/--no-timing", default=True, help="Measure latencies (auto always does, for its choice).")
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@model_options
@as_json
def decompose(
    model: Path,
    output: Path | None,
    ranks: str,
    factorization: str,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    joint: tuple[str, ...],
    plan_file: Path | None,
    save_plan: Path | None,
    dry_run: bool,
    solver: str,
    calibration: Path | None,
    stages: int | None,
    max_error: float | None,
    target_speedup: float | None,
    metric: str | None,
    max_drop: float | None,
    cost: str,
    no_promise: bool,
    best_effort: bool,
    timing: bool,
    force: bool,
    json_: bool,
    **options: Any,
) -> None:
    """Factor the sites of MODEL into chains of lower rank, and write the new model."""
    from surgery.cli import show
    from surgery.cost.registry import make_backend
    from surgery.files.save import model_writer
    from surgery.passes import decompose as passes
    from surgery.plans.plan import Plan
    from surgery.report import attach, collect

    target = output or default_output(model, "decomposed.pt2")
    outputs = [None if dry_run else target, save_plan]
    read = [path for path in (model, plan_file, calibration) if path is not None]
    check_outputs([path for path in outputs if path is not None], read, force=force)
    promised = (calibration, max_error, target_speedup, metric, max_drop)
    if dry_run and any(value is not None for value in promised):
        raise InputError(
            "--dry-run with calibration or a promise, which is known by factoring", next_step="leave --dry-run out"
        )
    given = None if plan_file is None else Plan.read(plan_file)
    rules: dict[str, Any] = {"include": include, "exclude": exclude, "latencies": make_backend() if timing else None}
    if given is None:
        rules |= {"ranks": ranks, "factorization": factorization, "joint": _groups(joint)}
    with show.progress(quiet=json_) as progress:
        progress("load", 0, 1)
        program, inputs = open_program(model, **options)
        if dry_run:
            result = passes.preview(program, inputs, plan=given, progress=progress, **rules)
        else:
            promise: dict[str, Any] = {"max_error": max_error, "target_speedup": target_speedup, "max_drop": max_drop}
            promise |= {
                "calibration": calibration,
                "stages": stages,
                "cost": cost,
                "promise": not no_promise,
                "best_effort": best_effort,
                "eval_fn": metric and load_function(metric),
            }
            result = passes.decompose(program, inputs, plan=given, solver=solver, progress=progress, **rules, **promise)
        measured: Timing | str | None = None if result.search is None else result.search.timing
        if measured is None and timing and not dry_run and result.changes:
            measured = _time([program, result.model], inputs, progress)
        if not dry_run:
            attach(result.model, collect(result, timing=measured, files=(model, None)))
        files: list[tuple[Path, Writer]] = []
        if not dry_run:
            files.append((target, model_writer(result.model, target)))
        if save_plan is not None:
            files.append((save_plan, text_writer(result.plan.to_json())))
        write_together(files, force=force)
    named = (model, None if dry_run else target)
    if json_:
        show.print_json(collect(result, timing=measured, files=named))
    else:
        show.decompose_tables(named, result, measured)
    if result.promise is not None and not result.promise.kept:
        raise click.exceptions.Exit(3)


def _groups(joint: tuple[str, ...]) -> str | list[list[str]]:
    return "inputs" if joint == ("inputs",) else [[name.strip() for name in group.split(",")] for group in joint]


def _time(models: list[ExportedProgram], inputs: Any, progress: Any) -> Timing | str:
    """Return the timing of the models, or why it cannot be had: a model that ONNX cannot express is no failure here."""
    from surgery.runtime.bench import bench

    try:
        return bench(models, inputs, seconds=4.0, progress=lambda share: progress("time", round(100 * share), 100))
    except SurgeryError as error:
        return str(error)


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="The new file.  [default: MODEL.recomposed.pt2 beside MODEL]")
@click.option("--state-dict", type=FILE, help="Also write the state dict, as safetensors.")
@click.option("--all", "everything", is_flag=True, help="Also fuse chains that the original of a decomposed model had.")
@click.option("--force", is_flag=True, help="Overwrite files that exist.")
@model_options
@as_json
def recompose(
    model: Path,
    output: Path | None,
    state_dict: Path | None,
    everything: bool,
    force: bool,
    json_: bool,
    **options: Any,
) -> None:
    """Fuse every chain of MODEL that is provably one operator back into that operator."""
    from surgery.cli import show
    from surgery.files.save import model_writer, state_dict_writer
    from surgery.passes.recompose import recompose as run

    target = output or default_output(model, "recomposed.pt2")
    check_outputs([path for path in (target, state_dict) if path is not None], [model], force=force)
    with show.progress(quiet=json_) as progress:
        progress("load", 0, 1)
        program, inputs = open_program(model, **options)
        progress("recompose", 0, 1)
        result = run(program, inputs, everything=everything)
        files: list[tuple[Path, Writer]] = [(target, model_writer(result.model, target))]
        if state_dict is not None:
            files.append((state_dict, state_dict_writer(result.model.state_dict)))
        write_together(files, force=force)
    if json_:
        show.print_json(show.recompose_json((model, target), result))
    else:
        show.recompose_tables((model, target, state_dict), result)


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, help="The ONNX file.")
@click.option("--force", is_flag=True, help="Overwrite a file that exists.")
@model_options
@as_json
def export(model: Path, output: Path, force: bool, json_: bool, **options: Any) -> None:
    """Export MODEL to ONNX, and check onnxruntime's output against PyTorch's."""
    from surgery.cli import show
    from surgery.runtime.export import export_onnx

    check_outputs([output], [model], force=force)
    with show.progress(quiet=json_) as progress:
        progress("export", 0, 1)
        program, inputs = open_program(model, **options)
        report = export_onnx(program, output, inputs, force=force)
    if json_:
        show.print_json(show.export_json(report))
    else:
        show.export_lines(report)


@click.command()
@click.argument("models", type=FILE, nargs=-1, required=True, metavar="A [B ...]")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of onnxruntime.  [default: physical cores]")
@click.option("--seconds", type=click.FloatRange(min=0.01), default=5.0, show_default=True, help="Time to measure.")
@click.option("--apart", is_flag=True, help="Time each model alone, in new processes of its own.")
@click.option("--batch", type=click.IntRange(1, 2**20), help="Samples of each input.  [default: the model's own]")
@model_options
@as_json
def bench(
    models: tuple[Path, ...],
    threads: int | None,
    seconds: float,
    apart: bool,
    batch: int | None,
    json_: bool,
    **options: Any,
) -> None:
    """Time models (.pt2 or .onnx) under onnxruntime on this CPU, interleaved; each later one against the first."""
    from surgery.cli import show
    from surgery.kinds.inputs import with_batch
    from surgery.runtime.bench import bench as together
    from surgery.runtime.fresh import time_apart

    run = time_apart if apart else together

    with show.progress(quiet=json_) as progress:
        progress("load", 0, 1)
        opened, inputs = _open_all(models, options)
        inputs = inputs if batch is None else with_batch(inputs, batch)
        timing = run(
            opened,
            inputs,
            names=[str(path) for path in models],
            threads=threads,
            seconds=seconds,
            seed=options["seed"],
            progress=lambda share: progress("time", round(100 * share), 100),
        )
    if json_:
        show.print_json(timing.to_json())
    else:
        show.timing_tables(timing)


def _open_all(paths: tuple[Path, ...], options: dict[str, Any]) -> tuple[list[Any], Any]:
    """Return .onnx files as paths and others as programs, and the inputs of the first program, or of the first file."""
    opened: list[Any] = []
    inputs: Any = None
    for path in paths:
        if path.suffix == ".onnx":
            opened.append(path)
            continue
        program, own = open_program(path, **options)
        opened.append(program)
        inputs = own if inputs is None else inputs
    return opened, file_inputs(paths[0], options) if inputs is None else inputs


@click.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@click.option("--inputs", "inputs_file", type=FILE, help="Inputs by name, as .npz, .npy or .pt.")
@model_options
@as_json
def compare(a: Path, b: Path, inputs_file: Path | None, json_: bool, **options: Any) -> None:
    """Show how far the outputs of A and B are apart on the same inputs."""
    from surgery.cli import show
    from surgery.runtime.compare import compare as run

    models, inputs = _open_all((a, b), options)
    if inputs_file is not None:
        from surgery.data.samples import read_inputs

        known = next((model for model in models if not isinstance(model, Path)), None)
        inputs = read_inputs(inputs_file, known)
    difference = run(models[0], models[1], inputs, seed=options["seed"])
    if json_:
        show.print_json(difference.to_json())
    else:
        show.difference_tables((a, b), difference)
