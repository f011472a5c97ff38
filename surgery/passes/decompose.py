"""decompose: find sites, ask the plan, splice chains in; and the two steps before it on their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch.export import ExportedProgram

from surgery.chain import Chain, relative_error
from surgery.cost.latency import Latencies, channel_multiple
from surgery.errors import CheckError, InputError, Refusal
from surgery.factorizations import SOLVERS, Factorization, Ranks, named
from surgery.graphs import Found, GraphKind, Model, open_graph
from surgery.inputs import normalise_inputs
from surgery.plans import Decision, Plan
from surgery.ranks import complete_plan, make_plan
from surgery.sites import Site, Skip, Totals, describe, select
from surgery.text import change, count, rank_text, table

__all__ = ["Change", "DecomposeResult", "Progress", "RankSpec", "decompose", "find_sites", "plan", "preview"]

Progress = Callable[[str, int, int], None]
RankSpec: TypeAlias = str | int | tuple[int, ...] | Mapping[str, int | tuple[int, ...] | None]


@dataclass(frozen=True)
class Change:
    """One site that was factored: costs before and after, and the measured relative error of its weight.

    ``note`` says what the user should know of it, as that another method had to take the place of the planned one.
    """

    site: str
    operator: str
    factorization: str
    rank: Ranks
    error: float
    dense_parameters: int
    parameters: int
    dense_macs: int
    macs: int
    dense_latency: float | None = None
    latency: float | None = None
    note: str = ""


@dataclass(frozen=True, repr=False)
class DecomposeResult:
    """The new model, the plan that made it, each change, each place left alone, and the totals before and after."""

    model: Any
    plan: Plan
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    before: Totals
    after: Totals

    def __repr__(self) -> str:
        """Say in a few lines what was changed and what was not."""
        b, a = self.before, self.after
        head = (
            f"DecomposeResult: {len(self.changes)} factored, {len(self.skips)} left alone; "
            f"parameters {count(b.parameters)} -> {count(a.parameters)} ({change(b.parameters, a.parameters)}), "
            f"MACs {count(b.macs)} -> {count(a.macs)} ({change(b.macs, a.macs)})"
        )
        rows = [["site", "method", "rank", "weight error", "parameters", "MACs"]]
        for c in self.changes:
            parameters, macs = change(c.dense_parameters, c.parameters), change(c.dense_macs, c.macs)
            rows.append([c.site, c.factorization, rank_text(c.rank), f"{c.error:.2e}", parameters, macs])
        notes = [f"note: {c.site}: {c.note}" for c in self.changes if c.note]
        skips = [f"left alone: {skip.name}: {skip.reason}" for skip in self.skips]
        return "\n".join([head, *([table(rows)] if self.changes else []), *notes, *skips])


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
    found = open_graph(model, *normalise_inputs(example_inputs), copies=False).find()
    return tuple(spot.site for spot in found.spots), found.skips


def plan(
    model: Model,
    example_inputs: Any = None,
    *,
    ranks: RankSpec = "auto",
    factorization: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    latencies: Latencies | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Return the plan that ``decompose`` would carry out with the same arguments, and change nothing."""
    rules = _Rules(ranks, factorization, tuple(include), tuple(exclude), latencies, progress or _silent)
    return _prepare(model, example_inputs, None, rules, copies=False)[2]


def preview(
    model: Model,
    example_inputs: Any = None,
    *,
    ranks: RankSpec = "auto",
    factorization: str = "auto",
    plan: Plan | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    latencies: Latencies | None = None,
    progress: Progress | None = None,
) -> DecomposeResult:
    """Return what ``decompose`` would do, with predicted errors, and the model as it is."""
    rules = _Rules(ranks, factorization, tuple(include), tuple(exclude), latencies, progress or _silent)
    _, found, plan = _prepare(model, example_inputs, plan, rules, copies=False)
    changes = [_change(spot.site, d, d.error or 0.0) for spot, d in zip(found.spots, plan, strict=True) if not d.dense]
    return _result(model, plan, changes, found)


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
    inplace: bool = False,
    latencies: Latencies | None = None,
    progress: Progress | None = None,
) -> DecomposeResult:
    """Replace operators by chains at the ranks of a plan, and return the new model with what was done.

    Args:
        model: an nn.Module, a torch.fx.GraphModule or a torch.export.ExportedProgram; the result is of the same kind.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments (a program brings its own).
        ranks: "auto", "vbmf", "full", "energy=0.9", "keep_params=0.5", "keep_macs=0.5", a whole number, a tuple, or
            a dict from site names (or globs) to ranks, with None for dense.
        factorization: "auto", or the name of one of ``surgery.FACTORIZATIONS``.
        plan: a plan to carry out instead of making one; ``include`` and ``exclude`` still narrow it.
        include, exclude: glob patterns of site names.
        solver: "auto"; "als", "pp" or "gd" for cp; "tensorly" for TensorLy's own decompositions.
        inplace: change the given model itself (not possible for an exported program).
        latencies: measures each site's operator and chain, for the plan's latencies. ``ranks="auto"`` needs it, and
            takes ``Latencies()``, with its cache on disk, if none is given.
        progress: called with a step's name, the number of sites done, and the number of all.

    Raises:
        InputError: arguments that cannot be used, with what is allowed.
        RankError: ranks out of bounds, or a budget that cannot be met.
        CaptureError: the graph of an nn.Module can be neither traced nor exported.
    """
    if inplace and isinstance(model, ExportedProgram):
        raise InputError("an exported program cannot be changed in place", next_step="use the returned one")
    rules = _Rules(ranks, factorization, tuple(include), tuple(exclude), latencies, progress or _silent)
    graph, found, plan = _prepare(model, example_inputs, plan, rules, copies=not inplace, inplace=inplace)
    work = [(spot, d) for spot, d in zip(found.spots, plan, strict=True) if not d.dense]
    changes, chains = [], []
    for done, (spot, decision) in enumerate(work):
        rules.progress("factor", done, len(work))
        chain, error, decision = _factor(spot.site, decision, solver)
        chains.append(chain)
        plan = plan.replaced(decision)
        changes.append(_change(spot.site, decision, error))
    for (spot, _), chain in zip(work, chains, strict=True):
        graph.splice(spot, chain)
    rules.progress("factor", len(work), len(work))
    return _result(graph.finish(), plan, changes, found)


@dataclass(frozen=True)
class _Rules:
    ranks: RankSpec
    factorization: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    latencies: Latencies | None
    progress: Progress


def _silent(step: str, done: int, total: int) -> None:
    """Report nothing."""


def _prepare(
    model: Model, example_inputs: Any, plan: Plan | None, rules: _Rules, *, copies: bool, inplace: bool = False
) -> tuple[GraphKind, Found, Plan]:
    """Open the model, find its sites, and make the plan or check the given one."""
    graph = open_graph(model, *normalise_inputs(example_inputs), copies=copies, inplace=inplace)
    found = graph.find()
    sites = [spot.site for spot in found.spots]
    latencies = rules.latencies
    if plan is not None:
        plan = _narrow(complete_plan(plan, sites, found.totals), rules.include, rules.exclude)
    else:
        if latencies is None and rules.ranks == "auto":
            latencies = Latencies()
        plan = make_plan(
            sites,
            ranks=rules.ranks,
            factorization=rules.factorization,
            include=rules.include,
            exclude=rules.exclude,
            totals=found.totals,
            latencies=latencies,
            multiple=channel_multiple(),
            progress=rules.progress,
        )
    return graph, found, plan if latencies is None else _measure(plan, sites, latencies, rules.progress)


def _measure(plan: Plan, sites: Sequence[Site], latencies: Latencies, progress: Progress) -> Plan:
    """Fill in the latencies of the factored sites that have none yet."""
    todo = {d.site for d in plan if not d.dense and d.latency is None}
    measured: dict[str, Decision] = {}
    for site, decision in zip(sites, plan, strict=True):
        if decision.site not in todo or decision.factorization is None or decision.rank is None:
            continue
        progress("measure", len(measured), len(todo))
        chain = named(decision.factorization).skeleton(site.operator, decision.rank)
        times = [latencies.compare(site.operator, chain, shape) for shape in site.input_shapes]
        dense, after = sum(t.dense_s for t in times), sum(t.chain_s for t in times)
        measured[site.name] = replace(decision, dense_latency=dense, latency=after)
    return replace(plan, decisions=tuple(measured.get(d.site, d) for d in plan))


def _narrow(plan: Plan, include: Sequence[str], exclude: Sequence[str]) -> Plan:
    for site, reason in select([d.site for d in plan], include, exclude).items():
        if reason is not None:
            plan = plan.edit(site, rank=None, reason=reason)
    return plan


def _factor(site: Site, decision: Decision, solver: str) -> tuple[Chain, float, Decision]:
    """Return the chain of a site, the measured error of its weight, and the decision as it was carried out."""
    if decision.factorization is None or decision.rank is None:
        raise CheckError(f"the plan has no factorization for {site.name}")
    method = named(decision.factorization)
    chain = method.factor(site.operator, decision.rank, solver=_known(solver, method))
    if isinstance(chain, Refusal):
        return _factor(site, _fallback(site, decision, chain), "auto")
    composed = chain.compose()
    if isinstance(composed, Refusal):
        raise CheckError(f"{decision.factorization} made a chain of {site.name} that is not one operator")
    return chain, relative_error(composed.weight, site.operator.weight), decision


def _known(solver: str, method: Factorization) -> str:
    """Return the solver, or the method's own where it has none of this name and another method has."""
    return solver if solver in method.solvers or solver not in SOLVERS else "auto"


def _fallback(site: Site, decision: Decision, refusal: Refusal) -> Decision:
    """Return Tucker at the same ranks for a site whose planned method found no good factors."""
    tucker = named("tucker")
    limits = tucker.max_ranks(site.operator)
    ranks = tuple(min(max(decision.rank or (1,)), limit) for limit in limits)
    reason = f"{decision.factorization} {rank_text(decision.rank)}: {refusal.reason}; tucker took its place"
    skeleton = tucker.skeleton(site.operator, ranks)
    return replace(
        decision,
        factorization=tucker.name,
        rank=ranks,
        reason=reason,
        error=None,
        parameters=skeleton.parameters,
        macs=sum(skeleton.macs(shape) for shape in site.input_shapes),
        dense_latency=None,
        latency=None,
    )


def _change(site: Site, decision: Decision, error: float) -> Change:
    if decision.factorization is None or decision.rank is None:
        raise CheckError(f"the plan has no factorization for {site.name}")
    chain = named(decision.factorization).skeleton(site.operator, decision.rank)
    return Change(
        site=site.name,
        operator=describe(site.operator),
        factorization=decision.factorization,
        rank=decision.rank,
        error=error,
        dense_parameters=site.parameters,
        parameters=chain.parameters,
        dense_macs=site.macs,
        macs=sum(chain.macs(shape) for shape in site.input_shapes),
        dense_latency=decision.dense_latency,
        latency=decision.latency,
        note=decision.reason or "",
    )


def _result(model: Model, plan: Plan, changes: Sequence[Change], found: Found) -> DecomposeResult:
    sites = {spot.site.name: spot.site for spot in found.spots}
    dense = [
        Skip(d.site, describe(sites[d.site].operator), d.reason or "", sites[d.site].parameters, sites[d.site].macs)
        for d in plan
        if d.dense
    ]
    after = Totals(
        found.totals.parameters + sum(c.parameters - c.dense_parameters for c in changes),
        found.totals.macs + sum(c.macs - c.dense_macs for c in changes),
    )
    return DecomposeResult(model, plan, tuple(changes), (*dense, *found.skips), found.totals, after)
