"""decompose: find sites, ask the plan, splice chains in; and the two steps before it on their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.algebra.stack import stack_key
from surgery.cost.base import Backend
from surgery.cost.registry import make_backend
from surgery.data.samples import Calibration, read_calibration
from surgery.errors import CheckError, InputError, only_own_errors
from surgery.factorizations import named
from surgery.files.pretrained import note_record
from surgery.kinds.base import OpenModel
from surgery.kinds.inputs import Inputs, normalise_inputs
from surgery.kinds.registry import Model, check_inplace, kind_of, open_model
from surgery.passes.carry_out import Means, carry_out
from surgery.passes.factoring import split_chain
from surgery.passes.goals import Evaluate, Goal
from surgery.passes.promise import Asked, Terms, negotiate, negotiate_blind
from surgery.passes.results import Change, DecomposeResult
from surgery.plans.joining import check_groups, join, joint_groups
from surgery.plans.plan import Decision, Plan
from surgery.plans.planning import complete_plan, make_plan
from surgery.sites.find import find
from surgery.sites.placement import Found
from surgery.sites.site import FactoredSite, Site, Skip, Totals, select

__all__ = ["Change", "DecomposeResult", "Progress", "RankSpec", "decompose", "find_sites", "plan", "preview"]

Progress = Callable[[str, int, int], None]
RankSpec: TypeAlias = str | int | tuple[int, ...] | Mapping[str, int | tuple[int, ...] | None]
Joint: TypeAlias = str | Sequence[Sequence[str]]


@only_own_errors
def find_sites(model: Model, example_inputs: Any = None) -> tuple[tuple[Site, ...], tuple[Skip, ...]]:
    """Return the sites of a model and the places that were considered and left alone, each with its reason.

    Args:
        model: an nn.Module, a torch.fx.GraphModule or a torch.export.ExportedProgram.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. An exported program brings its
            own; others need them for the shapes. No forward pass is run: shapes come from fake tensors.

    Raises:
        InputError: inputs that are missing or do not fit.
        CaptureError: the graph cannot be captured.
    """
    found = find(open_model(model, normalise_inputs(example_inputs), copies=False).flow)
    return tuple(spot.site for spot in found.placements), found.skips


@only_own_errors
def plan(
    model: Model,
    example_inputs: Any = None,
    *,
    ranks: RankSpec = "auto",
    factorization: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    joint: Joint = (),
    latencies: Backend | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Return the plan that ``decompose`` would carry out with the same arguments, and change nothing.

    Of ``ranks="auto"`` it is the plan of the rule, ``promise=False``: what keeps a promise is known by measuring alone.
    """
    rules = _Rules(ranks, factorization, tuple(include), tuple(exclude), latencies, progress or _silent, joint)
    return _prepare(model, example_inputs, None, rules, copies=False)[2]


@only_own_errors
def preview(
    model: Model,
    example_inputs: Any = None,
    *,
    ranks: RankSpec = "auto",
    factorization: str = "auto",
    plan: Plan | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    joint: Joint = (),
    latencies: Backend | None = None,
    progress: Progress | None = None,
) -> DecomposeResult:
    """Return what ``decompose`` would do, with predicted errors, and the model as it is."""
    rules = _Rules(ranks, factorization, tuple(include), tuple(exclude), latencies, progress or _silent, joint)
    _, found, plan = _prepare(model, example_inputs, plan, rules, copies=False)
    changes = [
        _change(spot.site, d, d.error or 0.0) for spot, d in zip(found.placements, plan, strict=True) if not d.dense
    ]
    return _result(model, plan, changes, found)


@only_own_errors
def decompose(
    model: Model,
    example_inputs: Any = None,
    *,
    ranks: RankSpec = "auto",
    factorization: str = "auto",
    plan: Plan | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    solver: str = "auto",
    joint: Joint = (),
    inplace: bool = False,
    calibration: Any = None,
    stages: int | None = None,
    max_error: float | None = None,
    target_speedup: float | None = None,
    eval_fn: Evaluate | None = None,
    max_drop: float | None = None,
    cost: str = "latency",
    promise: bool = True,
    best_effort: bool = False,
    latencies: Backend | None = None,
    progress: Progress | None = None,
) -> DecomposeResult:
    """Replace operators by chains at the ranks of a plan, and return the new model with what was done.

    ``ranks="auto"`` keeps a promise: it returns the fastest model that was seen to keep it, or the original. Without
    calibration data it is seen on made-up inputs (``surgery.data.standin``), and the promise is worth no more.
    Other ranks are carried out as they are, and the output error that they cause is measured.

    Args:
        model: an nn.Module, a torch.fx.GraphModule or a torch.export.ExportedProgram; the result is of the same kind.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments (a program brings its own).
        ranks: "auto", "vbmf", "full", "energy=0.9", "keep_params=0.5", "keep_macs=0.5", a whole number, a tuple, or
            a dict from site names (or globs) to ranks, with None for dense.
        factorization: "auto", or the name of one of ``surgery.FACTORIZATIONS``.
        plan: a plan to carry out instead of making one; ``include`` and ``exclude`` still narrow it.
        include, exclude: glob patterns of site names.
        solver: "auto"; "als", "pp" or "gd" for cp; "tensorly" for TensorLy's own decompositions.
        joint: groups of sites that share all factors but the last, as ``[("attn.q", "attn.k", "attn.v")]``; or "inputs"
            for all alike sites that read the same value.
        inplace: change the given model itself (not possible for an exported program).
        calibration: inputs to fit the factors to: a tensor of samples, a sequence of inputs, a DataLoader, or the path
            of an .npz or .pt file of inputs by name or of a .jsonl file of token ids (a list, or an object of lists by
            input name, on each line). Positions that a mask among the inputs hides count nowhere. A few hundred samples
            do; of a large network no more are read than take 2e11 multiply-accumulates in one pass, 48 at least. A
            quarter of them is held out of the fit where an error is promised, else an eighth (or 16, if that is more),
            to judge it by. Biases and batch-norm statistics are corrected.
        stages: with calibration data: fit the sites in so many runs, in graph order, each to give what the original
            gives from the inputs that it gets when all runs before it are decomposed. By default one for each site, or
            as many as passes over the data take 2e11 multiply-accumulates together. What a run does not make better on
            held-out samples is undone.
        max_error: the promise of an output error of at most this (relative; the default promise, at 0.05);
        target_speedup: that of a whole model at least so many times as fast, with the least error;
        eval_fn, max_drop: that of a metric, ``eval_fn(module)``, higher is better, that falls by no more than this. A
            number is taken as it is; of a tensor with the score of each sample the mean falls so with 95 % confidence.
        cost: what is to be low: "latency", measured on this CPU, or "macs" or "params".
        promise: False for ``ranks="auto"`` without calibration data as a rule like any other, with no promise.
        best_effort: where a promised speed-up is out of reach, return the nearest model, not the original.
        latencies: measures each site's operator and chain, for the plan's latencies. ``ranks="auto"`` needs it, and
            takes ``make_backend()``, onnxruntime with its cache on disk, if none is given.
        progress: called with a step's name, the number of sites done, and the number of all.

    Raises:
        InputError: arguments that cannot be used, with what is allowed.
        RankError: ranks out of bounds, or a budget that cannot be met.
        CaptureError: the graph of an nn.Module can be neither traced nor exported.
    """
    if inplace:
        check_inplace(model)
    report = progress or _silent
    goals = {"max_error": max_error, "target_speedup": target_speedup, "eval_fn": eval_fn, "max_drop": max_drop}
    wanted = [name for name, value in goals.items() if value is not None] + ["cost"] * (cost != "latency")
    automatic = ranks == "auto" and plan is None
    _check_asked(wanted, automatic=automatic, promise=promise, data=calibration is not None, stages=stages)
    if best_effort and target_speedup is None:
        raise InputError("best_effort without target_speedup", next_step="give target_speedup=, or leave it out")
    samples = None if calibration is None else read_calibration(calibration, model, example_inputs)
    rules = _Rules(ranks, factorization, tuple(include), tuple(exclude), latencies, report, joint)
    if automatic and joint and (samples is not None or promise):
        next_step = "give ranks, or promise=False (--no-promise), or carry out a plan with joint sites"
        raise InputError("joint with ranks='auto' and its promise", allowed="one of them", next_step=next_step)
    inputs = normalise_inputs(example_inputs) if samples is None else _inputs(model, example_inputs, samples)
    if automatic and (samples is not None or promise):
        goal = Goal.of(max_error, target_speedup, max_drop, metric=eval_fn is not None)
        asked = Asked(goal, eval_fn, cost, solver, stages, inplace=inplace, best_effort=best_effort)
        return _promise(model, inputs, samples, asked, rules)
    prepared = _prepare(model, example_inputs, plan, rules, copies=not inplace)
    done = carry_out(model, inputs, prepared, Means(samples, solver, stages, report, inplace=inplace))
    note_record(done.model)
    order = [spot.site.name for spot in done.found.placements if spot.site.name in done.made]
    changes = [_change(done.made[name].site, done.plan[name], done.made[name].error) for name in order]
    return replace(_result(done.model, done.plan, changes, done.found), seen=done.seen)


def _check_asked(wanted: Sequence[str], *, automatic: bool, promise: bool, data: bool, stages: int | None) -> None:
    if wanted and not automatic:
        raise InputError(f"{wanted[0]} needs ranks='auto'", next_step="leave it out, or the ranks")
    if not promise and (wanted or data or not automatic):
        what = wanted[0] if wanted else "calibration" if data else "other ranks than 'auto', which promise nothing"
        raise InputError(f"promise=False with {what}", allowed="ranks='auto' alone", next_step="leave one of them out")
    if stages is not None and (stages < 1 or not data):
        raise InputError(f"stages={stages}", allowed="1 or more, with calibration=")


def _promise(model: Model, inputs: Inputs, samples: Calibration | None, asked: Asked, rules: _Rules) -> DecomposeResult:
    """Carry out ``auto`` for a goal: with calibration data, or with made-up ones for the sites of the plan by rule."""
    latencies = rules.latencies or make_backend()
    terms = Terms(
        asked,
        latencies,
        rules.factorization,
        rules.include,
        rules.exclude,
        multiple=latencies.channel_multiple,
    )
    if samples is None:
        ruled = _prepare(model, inputs, None, replace(rules, latencies=latencies), copies=False)[1:]
        done = negotiate_blind(model, inputs, ruled, terms, rules.progress)
    else:
        done = negotiate(model, inputs, samples, terms, rules.progress)
    sites = {spot.site.name: spot.site for spot in done.found.placements}
    changes = [_change(sites[name], done.plan[name], error) for name, error in done.errors.items()]
    note_record(done.model)
    result = _result(done.model, done.plan, changes, done.found)
    return replace(result, promise=done.promise, search=done.search, seen=done.seen)


def _inputs(model: Model, example_inputs: Any, samples: Calibration) -> Inputs:
    """Return the example inputs; where there are none and the model brings none, a batch of samples."""
    inputs = normalise_inputs(example_inputs)
    return inputs if any(inputs) or kind_of(model).brings_inputs() else next(iter(samples))


@dataclass(frozen=True)
class _Rules:
    ranks: RankSpec
    factorization: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    latencies: Backend | None
    progress: Progress
    joint: Joint = ()


def _silent(step: str, done: int, total: int) -> None:
    """Report nothing."""


def _prepare(
    model: Model, example_inputs: Any, plan: Plan | None, rules: _Rules, *, copies: bool
) -> tuple[OpenModel, Found, Plan]:
    """Open the model, find its sites, and make the plan or check the given one."""
    graph = open_model(model, normalise_inputs(example_inputs), copies=copies)
    found = find(graph.flow)
    sites = [spot.site for spot in found.placements]
    latencies = rules.latencies
    if plan is not None:
        left_out = select([site.name for site in sites], rules.include, rules.exclude)
        plan = complete_plan(_without_skips(_narrow(plan, left_out), found), sites, found.totals)
    else:
        if latencies is None and rules.ranks == "auto":
            latencies = make_backend()
        plan = make_plan(
            sites,
            ranks=rules.ranks,
            factorization=rules.factorization,
            include=rules.include,
            exclude=rules.exclude,
            totals=found.totals,
            latencies=latencies,
            multiple=None if latencies is None else latencies.channel_multiple,
            progress=rules.progress,
            joint=_groups(found, rules.joint),
            skipped=[skip.name for skip in found.skips],
        )
    return graph, found, plan if latencies is None else _measure(plan, sites, latencies, rules.progress)


def _groups(found: Found, joint: Joint) -> Sequence[Sequence[str]]:
    """Return the groups of site names that ``joint`` means."""
    if isinstance(joint, str):
        if joint != "inputs":
            raise InputError(f"joint={joint!r}", allowed='"inputs", or groups of site names')
        groups: dict[tuple[object, ...], list[str]] = {}
        for spot in found.placements:
            if isinstance(spot.site, FactoredSite):
                continue
            key = (tuple(call.source for call in spot.calls), stack_key(spot.site.operator))
            groups.setdefault(key, []).append(spot.site.name)
        return [names for names in groups.values() if len(names) > 1]
    check_groups(joint, [spot.site.name for spot in found.placements])
    return joint


def _measure(plan: Plan, sites: Sequence[Site], latencies: Backend, progress: Progress) -> Plan:
    """Fill in the latencies of the factored sites that have none yet.

    What joint sites share runs once: its time is that of the first of them.
    """
    todo = {d.site for d in plan if not d.dense and d.latency is None}
    units = [unit for unit in join(sites, joint_groups(plan)) if unit.name in todo]
    for done, unit in enumerate(units):
        progress("measure", done, len(units))
        for number, (site, chain) in enumerate(zip(unit.members, _skeletons(unit, plan[unit.name]), strict=True)):
            dense_step, chain_step = site.placed(site.operator), site.placed(chain)
            times = [latencies.compare(dense_step, chain_step, shape) for shape in site.input_shapes]
            dense, after = sum(t.dense_s for t in times), sum(t.chain_s for t in times)
            if number:
                last = max(i for i, step in enumerate(chain.steps) if isinstance(step, Operator))
                shared, own = (replace(chain, steps=part) for part in (chain.steps[:last], chain.steps[last:]))
                after = sum(latencies.measure(site.placed(own), shared.out_shape(shape)) for shape in site.input_shapes)
            plan = plan.replaced(replace(plan[site.name], dense_latency=dense, latency=after))
    return plan


def _skeletons(unit: Site, decision: Decision) -> tuple[Chain, ...]:
    """Return the chain of each member of a site, without numbers."""
    if decision.factorization is None or decision.rank is None:
        raise CheckError(f"the plan has no factorization for {unit.name}")
    return split_chain(named(decision.factorization).skeleton(unit.operator, decision.rank), unit)


def _without_skips(plan: Plan, found: Found) -> Plan:
    """Return the plan without the places that were left alone, which the result lists with their reasons."""
    names, left = {spot.site.name for spot in found.placements}, {skip.name for skip in found.skips}
    return replace(plan, decisions=tuple(d for d in plan if d.site in names or d.site not in left))


def _narrow(plan: Plan, left_out: Mapping[str, str | None]) -> Plan:
    for site in [d.site for d in plan]:
        if (reason := left_out.get(site)) is not None:
            plan = plan.edit(site, rank=None, reason=reason)
    return plan


def _change(site: Site, decision: Decision, error: float) -> Change:
    if decision.factorization is None or decision.rank is None or decision.parameters is None or decision.macs is None:
        raise CheckError(f"the plan has no factorization for {site.name}")
    return Change(
        site=site.name,
        operator=site.description,
        factorization=decision.factorization,
        rank=decision.rank,
        error=error,
        dense_parameters=site.parameters,
        parameters=decision.parameters,
        dense_macs=site.macs,
        macs=decision.macs,
        dense_latency=decision.dense_latency,
        latency=decision.latency,
        joint=decision.joint,
        note=decision.reason or "",
    )


def _result(model: Model, plan: Plan, changes: Sequence[Change], found: Found) -> DecomposeResult:
    sites = {spot.site.name: spot.site for spot in found.placements}
    dense = [
        Skip(d.site, sites[d.site].description, d.reason or "", sites[d.site].parameters, sites[d.site].macs)
        for d in plan
        if d.dense
    ]
    after = Totals(
        found.totals.parameters + sum(c.parameters - c.dense_parameters for c in changes),
        found.totals.macs + sum(c.macs - c.dense_macs for c in changes),
    )
    return DecomposeResult(model, plan, tuple(changes), (*dense, *found.skips), found.totals, after)
