"""The command ``decompose``: its options as one value, what they ask for, and what becomes of it.

What the options of ``decompose`` ask for: a rule, a plan or a goal; options that do not go together are refused.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from surgery.cli.options import FILE, as_json, default_output, load_function, model_options, open_calibrated
from surgery.errors import InputError, SurgeryError
from surgery.system.memory import give_back
from surgery.system.writing import Writer, check_outputs, text_writer, write_together

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from surgery.passes.job import Asked
    from surgery.passes.results import DecomposeResult
    from surgery.plans.goal import Goal
    from surgery.runtime.bench import Timing
    from surgery.system.progress import Progress

__all__ = ["DecomposeOptions", "asked_for", "decompose"]

_LEAVE_OUT = "leave one of them out"


@dataclass(frozen=True)
class DecomposeOptions:
    """The options as they were given; ``opening`` has those that say how MODEL is opened."""

    model: Path
    output: Path | None
    ranks: str | None
    factorization: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    joint: tuple[str, ...]
    plan_file: Path | None
    save_plan: Path | None
    dry_run: bool
    solver: str
    calibration: Path | None
    groups: int | None
    max_error: float | None
    target_speedup: float | None
    metric: str | None
    max_drop: float | None
    cost: str
    no_promise: bool
    best_effort: bool
    timing: bool
    backend: str | None
    force: bool
    json_: bool
    opening: dict[str, Any]

    @classmethod
    def read(cls, given: dict[str, Any]) -> DecomposeOptions:
        """Return the options from click's parameters."""
        own = {field.name for field in fields(cls)}
        opening = {name: value for name, value in given.items() if name not in own}
        return cls(**{name: value for name, value in given.items() if name in own}, opening=opening)

    @property
    def joint_groups(self) -> str | list[list[str]]:
        """The groups of sites that are to share factors, or "inputs"."""
        if self.joint == ("inputs",):
            return "inputs"
        return [[name.strip() for name in group.split(",")] for group in self.joint]

    @property
    def limits(self) -> dict[str, float]:
        """The limits of goals that were given, by option."""
        given = {
            "--max-error": self.max_error,
            "--max-drop": self.max_drop,
            "--target-speedup": self.target_speedup,
        }
        return {name: limit for name, limit in given.items() if limit is not None}

    @property
    def of_goals(self) -> list[str]:
        """The options that were given and are for goals only."""
        others = {"--eval": self.metric is not None, "--cost": self.cost != "latency"}
        others |= {"--best-effort": self.best_effort}
        return [*self.limits, *(name for name, given in others.items() if given)]


def asked_for(options: DecomposeOptions) -> Asked:
    """Return the rule, the plan or the goal that the options ask for.

    Raises:
        InputError: options that do not go together, or have values that cannot be used.
    """
    automatic = options.ranks in (None, "auto") and options.plan_file is None
    _check_plan(options)
    _check_backend(options, goal=automatic and not options.no_promise and not options.dry_run)
    if options.of_goals and not automatic:
        raise InputError(
            f"{options.of_goals[0]} needs --ranks auto", next_step="leave it out, or the ranks or the plan"
        )
    if options.no_promise and (options.of_goals or not automatic):
        what = options.of_goals[0] if options.of_goals else "other ranks than auto, which promise nothing"
        raise InputError(f"--no-promise with {what}", allowed="--ranks auto alone", next_step=_LEAVE_OUT)
    if options.groups is not None and options.calibration is None:
        raise InputError("--groups without --calibration", next_step="give inputs to fit to, or leave --groups out")
    if options.dry_run and (options.calibration is not None or options.of_goals):
        raise InputError(
            "--dry-run with calibration or a promise, which is known by factoring", next_step="leave --dry-run out"
        )
    if options.plan_file is not None:
        from surgery.plans.plan import Plan

        return Plan.read(options.plan_file)
    if not automatic:
        return options.ranks or "auto"
    return "measured" if options.no_promise or options.dry_run else _goal(options)


def _check_backend(options: DecomposeOptions, *, goal: bool) -> None:
    if options.backend is None:
        return
    if not options.timing and not goal:
        raise InputError("--backend with --no-timing", allowed="--backend where latencies are", next_step=_LEAVE_OUT)
    from surgery.cost.base import make_backend

    make_backend(options.backend)  # an unknown name is told before any work


def _check_plan(options: DecomposeOptions) -> None:
    given = {
        "--ranks": options.ranks is not None,
        "--factorization": options.factorization is not None,
        "--joint": bool(options.joint),
    }
    for name in (name for name, said in given.items() if said and options.plan_file is not None):
        raise InputError(
            f"{name} with --plan, which says it for each site",
            allowed="--include and --exclude, which narrow a plan",
            next_step=_LEAVE_OUT,
        )


def _goal(options: DecomposeOptions) -> Goal:
    from surgery.plans.goal import DEFAULT_ERROR, Goal

    limits = options.limits
    if len(limits) > 1:
        raise InputError(f"{' and '.join(limits)} at once", allowed="one of them", next_step=_LEAVE_OUT)
    if options.max_drop is not None and options.metric is None:
        raise InputError("--max-drop without a metric", next_step="give --eval module:function")
    if options.best_effort and options.target_speedup is None:
        raise InputError("--best-effort without --target-speedup", next_step="give it, or leave --best-effort out")
    metric, backend = None if options.metric is None else load_function(options.metric), options.backend
    if options.target_speedup is not None:
        if options.cost != "latency":
            raise InputError(
                f"--target-speedup with --cost {options.cost}",
                allowed="--cost latency, since a speed-up is measured",
                next_step=_LEAVE_OUT,
            )
        return Goal.speedup(options.target_speedup, best_effort=options.best_effort, metric=metric, backend=backend)
    cost: Any = options.cost  # click has checked it
    if options.max_drop is not None and metric is not None:
        return Goal.drop(options.max_drop, metric, cost=cost, backend=backend)
    limit = DEFAULT_ERROR if options.max_error is None else options.max_error
    return Goal.error(limit, metric=metric, cost=cost, backend=backend)


@click.command()
@click.argument("model", type=FILE)
@click.option("-o", "--output", type=FILE, help="The new file.  [default: MODEL.decomposed.pt2 or .onnx beside MODEL]")
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
    from surgery.files.save import check_ending
    from surgery.report import collect

    options = DecomposeOptions.read(given)
    target = None if options.dry_run else options.output or default_output(options.model, "decomposed.pt2")
    _check_files(options, target)
    asked = asked_for(options)
    with show.progress(quiet=options.json_) as progress:
        progress("load", 0, 1)
        program, inputs, data = open_calibrated(options.model, options.calibration, **options.opening)
        if target is not None:
            check_ending(program, target)
        result = _result(options, asked, (program, inputs, data), progress)
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
    options: DecomposeOptions, asked: Asked, opened: tuple[Any, Any, Any], progress: Progress
) -> DecomposeResult[Any]:
    """Return what is asked for of the model, inputs and data that were opened; of a dry run with the model as it is."""
    from surgery.passes.decompose import decompose as run
    from surgery.passes.preview import preview
    from surgery.plans.goal import Goal

    program, inputs, data = opened
    chosen: dict[str, Any] = {"include": options.include, "exclude": options.exclude}
    chosen |= {"factorization": options.factorization or "auto"}
    fits: dict[str, Any] = {"solver": options.solver, "calibration": data, "groups": options.groups}
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
    from surgery.files.save import model_files
    from surgery.report import attach, collect

    files: list[tuple[Path, Writer]] = []
    if target is not None:
        attach(result.model, collect(result, timing=measured, files=(options.model, None)))
        files += model_files(result.model, target)
    if options.save_plan is not None:
        files.append((options.save_plan, text_writer(result.plan.to_json())))
    give_back()  # what the search held
    write_together(files, force=options.force)


def _time(models: list[ExportedProgram], inputs: Any, progress: Progress) -> Timing | str:
    """Return the timing of the models, or why it cannot be had: a model that ONNX cannot express is no failure here."""
    from surgery.runtime.bench import make_ready, time_ready

    def show(share: float) -> None:
        progress("time", round(100 * share), 100)

    try:
        return time_ready(make_ready(models, inputs, move=True), seconds=4.0, progress=show)
    except SurgeryError as error:
        return str(error)
    finally:
        give_back()  # the sessions
