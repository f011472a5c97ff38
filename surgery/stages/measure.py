"""Time the stages of a split, each on the values that reach it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from surgery.cost.timing import Budget, interleave
from surgery.kinds.base import Kind, Pieces
from surgery.kinds.inputs import Inputs
from surgery.plans.plan import Progress

__all__ = ["measured_seconds", "stage_inputs"]

_BUDGET = Budget(seconds=1.0, min_rounds=5, warmup_rounds=1)


def stage_inputs(kind: Kind, pieces: Pieces, example: Inputs) -> list[list[Any]]:
    """Return the inputs of each stage when the whole model runs on the example inputs.

    Raises:
        InputError: the model does not take them.
    """
    values = dict(zip(pieces.inputs, kind.leaves(pieces, *example), strict=True))
    given = []
    for piece in pieces.stages:
        given.append([values[name] for name in piece.inputs])
        values |= zip(piece.outputs, kind.run_stage(piece.model, given[-1]), strict=True)
    return given


def measured_seconds(kind: Kind, pieces: Pieces, example: Inputs, progress: Progress) -> list[float]:
    """Return the median seconds of each stage, without gradients."""
    with torch.no_grad():
        given = stage_inputs(kind, pieces, example)
        pairs = zip(pieces.stages, given, strict=True)
        runs = [partial(kind.run_stage, piece.model, values) for piece, values in pairs]
        samples = interleave(runs, _BUDGET, progress=lambda share: progress("stages", round(100 * share), 100))
    return [each.median for each in samples]
