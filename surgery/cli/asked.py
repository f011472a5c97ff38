"""What the options of ``decompose`` ask for: a rule, a plan or a goal; options that do not go together are refused."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.cli.options import load_function
from surgery.errors import InputError

if TYPE_CHECKING:
    from surgery.passes.job import Asked
    from surgery.plans.goal import Goal

__all__ = ["DecomposeOptions", "asked_for"]

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
    from surgery.cost.registry import make_backend

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
