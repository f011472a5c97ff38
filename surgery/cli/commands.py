"""The commands. Each opens the model, calls the Python API, and hands the result to ``show``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from surgery.cli.options import FILE, as_json, default_output, model_options, open_models, open_program
from surgery.errors import InputError
from surgery.system.writing import check_outputs, write_together

__all__ = ["bench", "compare", "export", "inspect", "recompose"]


@click.command()
@click.argument("model", type=FILE)
@model_options
@as_json
def inspect(model: Path, json_: bool, **options: Any) -> None:
    """List the sites of MODEL with their costs, and what is left alone and why; of a folder of stages, list these."""
    from surgery.cli import show
    from surgery.passes.original import Original
    from surgery.stages.folder import is_folder, read_report

    if is_folder(model):
        report = read_report(model)
        if json_:
            show.print_json(report.to_json())
        else:
            show.split_tables(model, report)
        return
    program, inputs = open_program(model, **options)
    original = Original(program, inputs)
    if json_:
        show.print_json(show.found_json(original))
    else:
        show.found_tables(model, original)


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="The new file.  [default: MODEL.recomposed.pt2 or .onnx beside MODEL]")
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
    from surgery.files.save import check_ending, model_files, state_dict_writer
    from surgery.kinds.registry import kind_of
    from surgery.passes.recompose import recompose as run

    target = output or default_output(model, "recomposed.pt2")
    check_outputs([path for path in (target, state_dict) if path is not None], [model], force=force)
    with show.progress(quiet=json_) as progress:
        progress("load", 0, 1)
        program, inputs = open_program(model, **options)
        check_ending(program, target)
        progress("recompose", 0, 1)
        result = run(program, inputs, everything=everything)
        files = model_files(result.model, target)
        if state_dict is not None:
            files.append((state_dict, state_dict_writer(kind_of(result.model).tensors(result.model))))
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
@click.option("--backend", metavar="NAME", help="With --apart: what measures.  [default: onnxruntime]")
@click.option("--batch", type=click.IntRange(1, 2**20), help="Samples of each input.  [default: the model's own]")
@model_options
@as_json
def bench(
    models: tuple[Path, ...],
    threads: int | None,
    seconds: float,
    apart: bool,
    backend: str | None,
    batch: int | None,
    json_: bool,
    **options: Any,
) -> None:
    """Time models (.pt2 or .onnx) under onnxruntime on this CPU, interleaved; each later one against the first.

    Of a folder of stages, the stages are timed in a pipeline, one core for each, against the whole model on one core.
    """
    from surgery.cli import show
    from surgery.cli.split import bench_folder
    from surgery.cost.base import make_backend
    from surgery.kinds.inputs import with_batch
    from surgery.runtime.bench import bench as together
    from surgery.runtime.fresh import time_apart
    from surgery.stages.folder import is_folder

    if any(map(is_folder, models)):
        refused = {
            "--threads": threads is not None,
            "--apart": apart,
            "--backend": backend is not None,
            "another model": len(models) > 1,
        }
        bench_folder(models[0], [name for name, given in refused.items() if given], seconds, batch, json_, **options)
        return
    if backend is not None and not apart:
        raise InputError("--backend without --apart", allowed="--backend with --apart", next_step="leave one out")
    run = partial(time_apart, backend=make_backend(backend or "onnxruntime")) if apart else together

    with show.progress(quiet=json_) as progress:
        progress("load", 0, 1)
        opened, inputs = open_models(models, **options)
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

    models, inputs = open_models((a, b), inputs_file, **options)
    difference = run(models[0], models[1], inputs, seed=options["seed"])
    if json_:
        show.print_json(difference.to_json())
    else:
        show.difference_tables((a, b), difference)
