"""The user's metric of a model, and how far it falls from one model to another."""

from __future__ import annotations

import torch
from torch import Tensor

from surgery.errors import InputError
from surgery.kinds.registry import Model, kind_of
from surgery.passes.evidence import beyond
from surgery.plans.goal import Metric
from surgery.runtime.compare import evaluating
from surgery.text import first_line

__all__ = ["drop_of", "metric_of", "scores_of"]


def scores_of(model: Model, evaluate: Metric) -> Tensor:
    """Return the user's metric of a model in float64: the score of each sample, or one number (1,).

    Of a program, of its module; in evaluation mode, without gradients.

    Raises:
        InputError: the function fails, or returns neither a finite number nor a tensor (samples,) of them.
    """
    module = kind_of(model).runnable(model)
    try:
        with torch.no_grad(), evaluating(module):
            found = torch.as_tensor(evaluate(module)).detach().double().cpu()
    except Exception as error:  # the user's own code
        raise InputError(f"the metric failed: {type(error).__name__}: {first_line(error)}") from error
    if found.dim() > 1 or not found.numel() or not bool(torch.isfinite(found).all()):
        said = f"{float(found):g}" if found.numel() == 1 else f"a tensor of shape {tuple(found.shape)}"
        allowed = "a finite number, or a tensor (samples,) of the score of each; higher is better"
        raise InputError(f"the metric returned {said}", allowed=allowed)
    return found.view(-1)


def metric_of(model: Model, evaluate: Metric) -> float:
    """Return the user's metric of a model as one number, the mean of its scores.

    Raises:
        InputError: as ``scores_of`` says.
    """
    return float(scores_of(model, evaluate).mean())


def drop_of(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return how much the mean of paired scores (samples,) falls, and its upper confidence limit.

    The limit is the drop itself where there is one score only.

    Raises:
        InputError: the two are not of the same samples.
    """
    if before.shape != after.shape:
        raise InputError(
            f"the metric returned {len(before)} scores, then {len(after)}", allowed="the same samples each time"
        )
    differences = before - after
    drop = float(differences.mean())
    return drop, drop + beyond(differences)
