"""decompose: find sites, make a plan or take one, fit chains and put them in the places of operators."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from surgery.errors import only_own_errors
from surgery.files.load import GivenModel, model_of
from surgery.kinds.registry import check_inplace
from surgery.passes.clock import instruments_of
from surgery.passes.fitting import FitOptions
from surgery.passes.job import Asked, Joint, read_job, read_selection
from surgery.passes.original import Original
from surgery.passes.results import DecomposeResult
from surgery.passes.run import by_goal, by_plan, plan_for
from surgery.plans.goal import Goal
from surgery.system.progress import Progress

__all__ = ["decompose"]


@only_own_errors
def decompose(
    model: GivenModel | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    ranks: Asked = "auto",
    factorization: str = "auto",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    solver: str = "auto",
    joint: Joint = (),
    inplace: bool = False,
    calibration: Any = None,
    groups: int | None = None,
    progress: Progress | None = None,
) -> DecomposeResult[GivenModel]:
    """Replace operators by chains of lower rank, and return the new model with what was done.

    With a ``Goal`` the result is the fastest model that was seen to keep the promise, or the original. Without
    calibration data it is seen on made-up inputs (``surgery.data.standin``), and the promise is worth no more than
    that. A rule or a plan is carried out as it is, and the output error that it causes is measured.

    Args:
        model: nn.Module, GraphModule, ExportedProgram, onnx_ir.Model or ModelProto; the result is of the same kind. Of
            the path of a file it is of the kind that ``surgery.load`` gives: ExportedProgram or onnx_ir.Model.
        example_inputs: a tensor, a tuple of arguments, or a dict of keyword arguments. A program brings its own.
        ranks: a rule, a ``Plan`` or a ``Goal``. Rules are "measured", "vbmf", "full", "energy=0.9", "keep_params=0.5",
            "keep_macs=0.5", a whole number, a tuple, or a dict from site names (or globs) to ranks, with None for
            dense. "auto" is ``Goal.error(0.05)``.
        factorization: "auto", or the name of one of ``surgery.FACTORIZATIONS``. A plan has its own.
        include, exclude: glob patterns of site names, or one of them. They narrow a plan as well.
        solver: "auto"; "als", "pp" or "gd" for cp; "tensorly" for TensorLy's own decompositions.
        joint: groups of sites that share all factors but the last, as ``[("attn.q", "attn.k", "attn.v")]``; or "inputs"
            for all alike sites that read the same value. For rules only.
        inplace: change the given model itself. This is not possible for an exported program.
        calibration: inputs to fit the factors to: a tensor of samples, a sequence of inputs, a DataLoader, or the path
            of an .npz or .pt file of inputs by name or of a .jsonl file of token ids (a list, or an object of lists by
            input name, on each line). Positions that a mask among the inputs hides do not count. A few hundred samples
            are enough. Of a large network only as many are read as take 2e11 multiply-accumulates in one pass, but at
            least 48. A quarter of them is held out of the fit where an error is promised, else an eighth (or 16, if
            that is more), to judge it by. Biases and batch-norm statistics are corrected.
        groups: fit sites in this many groups, in graph order; each group is fitted to the original's outputs on the
            inputs it receives after the earlier groups are factored. By default each site is a group of its own, or
            there are as many groups as passes over the data take 2e11 multiply-accumulates together. What a group does
            not make better on held-out samples is undone. Needs calibration data.
        progress: called with a step's name, the number of sites done, and the number of all.

    Raises:
        InputError: arguments that cannot be used, or not together, with what is allowed.
        RankError: ranks out of bounds, or a budget that cannot be met.
        CaptureError: the graph of an nn.Module can be neither traced nor exported.
    """
    model, fits = model_of(model), FitOptions(solver, groups)
    if inplace:
        check_inplace(model)
    selection = read_selection(factorization=factorization, include=include, exclude=exclude, joint=joint)
    job = read_job(model, example_inputs, ranks, selection, fits, calibration=calibration, progress=progress)
    if isinstance(job.ranks, Goal):
        return by_goal(job, job.ranks, instruments_of(job.ranks), inplace=inplace)
    original = Original(job.model, job.inputs, copies=not inplace)
    return by_plan(job, original, plan_for(original, job.ranks, selection, progress=job.progress), inplace=inplace)
