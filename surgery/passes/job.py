"""What decompose is asked for, read and checked: one value that says it all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from surgery.data.samples import Calibration, read_calibration
from surgery.errors import InputError
from surgery.factorizations import FACTORIZATIONS, SOLVERS
from surgery.kinds.inputs import Inputs, normalise_inputs
from surgery.kinds.registry import Model, kind_of
from surgery.passes.clock import backend_of
from surgery.passes.fitting import FitOptions
from surgery.plans.goal import Goal
from surgery.plans.plan import Plan
from surgery.plans.rules import RankSpec, parse_ranks
from surgery.system.progress import Progress, silent

__all__ = ["Asked", "Job", "Joint", "Selection", "read_job", "read_patterns", "read_ranks", "read_selection"]

Joint: TypeAlias = str | Sequence[Sequence[str]]
Asked: TypeAlias = RankSpec | Plan | Goal


@dataclass(frozen=True)
class Selection:
    """Which sites may change, by which factorization, and which of them share factors."""

    factorization: str = "auto"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    joint: Joint = ()


@dataclass(frozen=True, eq=False)
class Job:
    """A model with its inputs, samples to fit to if there are any, and what is to become of it."""

    model: Model
    inputs: Inputs
    samples: Calibration | None
    ranks: Asked
    selection: Selection
    fits: FitOptions
    progress: Progress = silent


def read_selection(*, factorization: str, include: Any, exclude: Any, joint: Joint) -> Selection:
    """Return the selection that arguments say.

    Raises:
        InputError: patterns that are no text, or groups that are none.
    """
    patterns = read_patterns(include, "include"), read_patterns(exclude, "exclude")
    return Selection(factorization, *patterns, _read_joint(joint))


def _read_joint(joint: Any) -> Joint:
    """Return the groups; a name in the place of a group would be read letter by letter."""
    if isinstance(joint, str):
        return joint
    groups = list(joint) if isinstance(joint, Iterable) else [joint]
    for group in groups:
        if isinstance(group, str) or not isinstance(group, Iterable):
            what = f"joint={joint!r}, in which {group!r} is no group"
            allowed = '"inputs", or groups of site names'
            raise InputError(what, allowed=allowed, next_step="say for example joint=[('q', 'k')]")
    return [list(group) for group in groups]


def read_patterns(given: Any, name: str) -> tuple[str, ...]:
    """Return the glob patterns of an argument of this name; a text is one pattern.

    Raises:
        InputError: something else than text.

    >>> read_patterns("10", "include"), read_patterns(["0", "fc*"], "include")
    (('10',), ('0', 'fc*'))
    """
    if isinstance(given, str):
        return (given,)
    patterns = tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        what = f"{name}={given!r}"
        raise InputError(what, allowed="glob patterns of site names", next_step=f"say for example {name}=['fc*']")
    return patterns


def read_job(
    model: Model,
    example_inputs: Any,
    ranks: Asked,
    selection: Selection,
    fits: FitOptions,
    *,
    calibration: Any = None,
    progress: Progress | None = None,
) -> Job:
    """Return the job.

    Raises:
        InputError: what cannot be used, or cannot be said together.
        RankError: ranks that do not say a rule.
    """
    asked = read_ranks(ranks)
    _check_together(asked, selection)
    _check_fits(fits, data=calibration is not None)
    _check_solver(fits.solver, asked, selection)
    if progress is not None and not callable(progress):
        what = f"progress={progress!r}"
        raise InputError(what, allowed="a function of a name, the number done and the number of all, or None")
    samples = None if calibration is None else read_calibration(calibration, model, example_inputs)
    inputs = normalise_inputs(example_inputs)
    if samples is not None and not any(inputs) and not kind_of(model).brings_inputs():
        inputs = next(iter(samples))
    return Job(model, inputs, samples, asked, selection, fits, progress or silent)


def read_ranks(ranks: Asked) -> Asked:
    """Return the ranks, of which "auto" is the promise of an output error.

    Raises:
        RankError: ranks that do not say a rule.
    """
    if isinstance(ranks, str) and ranks == "auto":
        return Goal.error()
    if not isinstance(ranks, Goal | Plan):
        parse_ranks(ranks)
    return ranks


def _check_together(ranks: Asked, selection: Selection) -> None:
    if isinstance(ranks, Plan):
        given = {"factorization": selection.factorization != "auto", "joint": bool(selection.joint)}
        for name in (name for name, said in given.items() if said):
            raise InputError(
                f"{name} with a plan, which says it for each site",
                allowed="include and exclude, which narrow a plan",
                next_step=f"leave {name} out, or make a new plan",
            )
    if isinstance(ranks, Goal):
        if selection.joint:
            raise InputError(
                f"joint with the promise {ranks}",
                allowed="joint with a rule for ranks",
                next_step="give ranks, as 'measured' (--no-promise), or carry out a plan with joint sites",
            )
        if ranks.backend is not None:
            backend_of(ranks.backend)


def _check_fits(fits: FitOptions, *, data: bool) -> None:
    groups = fits.groups
    if groups is None:
        return
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise InputError(f"groups={groups!r}", allowed="whole numbers from 1", next_step="or leave groups out")
    if not data:
        what = f"groups={groups} without calibration data, to which groups are fitted"
        raise InputError(what, next_step="give calibration as well, or leave groups out")


def _check_solver(solver: str, ranks: Asked, selection: Selection) -> None:
    """Refuse a solver that no method has; of "auto" those methods use it that have it."""
    if solver not in SOLVERS:
        what = f"the solver {solver!r} is not known"
        raise InputError(what, allowed=", ".join(SOLVERS), next_step="say one of these")
    names = {d.factorization for d in ranks} if isinstance(ranks, Plan) else {selection.factorization}
    methods = [method for name, method in FACTORIZATIONS.items() if name in names]
    if methods and not any(solver in method.solvers for method in methods):
        allowed = dict.fromkeys(name for method in methods for name in method.solvers)
        what = f"the solver {solver!r} for {', '.join(method.name for method in methods)}"
        raise InputError(what, allowed=", ".join(allowed), next_step="say one of these, or leave solver out")
