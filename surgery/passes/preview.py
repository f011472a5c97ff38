"""The steps before a model is changed, each on its own: the sites, the plan, and what it would come to.

apply: the structure of a plan for a fresh model, so that the state of a factored one fits it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from surgery.errors import InputError, only_own_errors
from surgery.factorizations import named
from surgery.files.load import GivenModel, model_of
from surgery.files.pretrained import note_record
from surgery.files.structure import give_structure
from surgery.kinds.inputs import normalise_inputs
from surgery.kinds.registry import Model
from surgery.passes.clock import backend_of, instruments_of
from surgery.passes.fitting import FitOptions
from surgery.passes.job import Asked, Job, Joint, read_job, read_selection
from surgery.passes.original import Original
from surgery.passes.results import Change, DecomposeResult
from surgery.passes.run import plan_for, propose, result_of
from surgery.plans.goal import Goal
from surgery.plans.plan import Plan
from surgery.plans.rules import joint_groups
from surgery.sites import Site, Skip
from surgery.system.progress import Progress

__all__ = ["apply", "find_sites", "plan", "preview"]


@only_own_errors
def find_sites(
    model: Model | str | os.PathLike[str], example_inputs: Any = None
) -> tuple[tuple[Site, ...], tuple[Skip, ...]]:
    """Return the sites of a model and the places that were considered and left alone, each with its reason.

    Args:
        model: an nn.Module, a GraphModule, an ExportedProgram, an onnx_ir.Model, an onnx.ModelProto, or the path of a
            file that ``surgery.load`` opens.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. An exported program brings its
            own; others need them for the shapes. No forward pass is run: shapes come from fake tensors.

    Raises:
        InputError: inputs that are missing or do not fit.
        CaptureError: the graph cannot be captured.
    """
    original = Original(model_of(model), normalise_inputs(example_inputs))
    return tuple(original.sites.values()), original.skips


@only_own_errors
def plan(
    model: Model | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    ranks: Asked = "measured",
    factorization: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    joint: Joint = (),
    solver: str = "auto",
    calibration: Any = None,
    groups: int | None = None,
    backend: Any = None,
    progress: Progress | None = None,
) -> Plan:
    """Return the plan that ``decompose`` would carry out, and change nothing.

    ``decompose(model, inputs, ranks=plan)`` carries it out. For a ``Goal`` (or "auto") models are built and measured
    on the way, as ``decompose`` does, with the same ``calibration`` data.

    Args:
        model, example_inputs, factorization, include, exclude, joint, progress: as ``decompose`` takes them.
        ranks: a rule, a ``Goal``, or a ``Plan``, which is checked and completed. The rule "measured" keeps a chain
            where it is measured faster than the site.
        solver, calibration, groups: how factors are fitted on the way to a goal. Rules do not look at data.
        backend: measures the latency of each site and of its chain, for the plan: a ``Backend``, or the name of one, as
            "onnxruntime". A goal has its own.

    Raises:
        InputError: arguments that cannot be used, or not together, with what is allowed.
        RankError: ranks out of bounds, or a budget that cannot be met.
        CaptureError: the graph of an nn.Module can be neither traced nor exported.
    """
    selection = read_selection(factorization=factorization, include=include, exclude=exclude, joint=joint)
    model, fits = model_of(model), FitOptions(solver, groups)
    if not isinstance(ranks, Goal) and ranks != "auto":
        _refuse_data(calibration, solver)
    job = read_job(model, example_inputs, ranks, selection, fits, calibration=calibration, progress=progress)
    if isinstance(job.ranks, Goal):
        _refuse_backend(backend)
        proposal, _ = propose(job, job.ranks, instruments_of(job.ranks), Original(job.model, job.inputs))
        return proposal.plan
    return _ruled(job, backend)[1]


@only_own_errors
def preview(
    model: GivenModel | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    ranks: Asked = "measured",
    factorization: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    joint: Joint = (),
    backend: Any = None,
    progress: Progress | None = None,
) -> DecomposeResult[GivenModel]:
    """Return what ``decompose`` would do by a rule or a plan, with predicted errors, and the model as it is.

    Arguments and errors are those of ``plan``. What a goal comes to is known by measuring models alone: see the result
    of ``decompose``.
    """
    selection = read_selection(factorization=factorization, include=include, exclude=exclude, joint=joint)
    model = model_of(model)
    job = read_job(model, example_inputs, ranks, selection, FitOptions(), progress=progress)
    if isinstance(job.ranks, Goal):
        what = f"preview of the promise {job.ranks}, which is known by building models"
        raise InputError(what, allowed="a rule or a plan", next_step="say 'measured', or call plan or decompose")
    original, found = _ruled(job, backend)
    errors = {d.site: d.error or 0.0 for d in found if not d.dense}
    result = result_of(model, found, errors, original)
    return replace(result, changes=tuple(replace(c, bound=_bound(c)) for c in result.changes))


def _bound(change: Change) -> str:
    """Return what the predicted error of a change is to the one that would be measured."""
    return named(change.factorization).bound if change.error else ""


def _ruled(job: Job, backend: Any) -> tuple[Original, Plan]:
    assert not isinstance(job.ranks, Goal)  # the callers have seen to it
    measuring = None if backend is None else backend_of(backend)
    original = Original(job.model, job.inputs)
    return original, plan_for(original, job.ranks, job.selection, backend=measuring, progress=job.progress)


def _refuse_data(calibration: Any, solver: str) -> None:
    given = {"calibration": calibration is not None, "solver": solver != "auto"}
    for name in (name for name, said in given.items() if said):
        raise InputError(
            f"{name} for the plan of a rule, which does not look at it",
            allowed=f"{name} with a Goal",
            next_step=f"give {name} to decompose, with the plan",
        )


def _refuse_backend(backend: Any) -> None:
    if backend is not None:
        raise InputError(
            "a backend with a Goal, which has its own",
            allowed="a backend with a rule or a plan",
            next_step="give it to the goal, as Goal.error(0.05, backend=...)",
        )


@only_own_errors
def apply(plan: Plan, model: nn.Module) -> nn.Module:
    """Give a dense module the structure of a plan, in place, with factors of zeros, and return it.

    A state of the model that the plan was carried out on then fits, by any tool's ``load_state_dict``:

        result = surgery.decompose(net, inputs)
        fresh = surgery.apply(result.plan, Net())
        fresh.load_state_dict(result.model.state_dict())

    Nothing is captured or run. A model that is nothing but one layer with packed weights cannot be changed in place:
    take what is returned.

    Raises:
        InputError: the plan is something else; the model is a graph, has no such layer, or is factored already.
        RankError: a rank that a layer cannot take.
    """
    if not isinstance(plan, Plan):
        what = f"the plan is a {type(plan).__name__}"
        raise InputError(what, allowed="surgery.Plan", next_step="give the plan first, then the model")
    sites = {d.site: (d.factorization, d.rank) for d in plan if d.factorization is not None and d.rank is not None}
    made = give_structure(model, sites, joint_groups(plan))
    note_record(made)
    return made
