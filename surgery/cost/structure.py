"""What a latency depends on in operators and chains: kinds, shapes and geometries, as JSON values, and no numbers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator, Shape
from surgery.algebra.steps import Branches, Shift, Step

__all__ = ["described"]


def described(shape: Shape, *operators: Operator | Chain) -> dict[str, Any]:
    """Return an input shape and the structure of what runs on it, as JSON values.

    >>> import torch
    >>> from surgery.algebra.operators import Linear
    >>> described((1, 3), Linear(torch.ones(2, 3)))
    {'operators': [{'kind': 'Linear', 'weight': [2, 3], 'bias': False}], 'shape': [1, 3]}
    """
    return {"operators": [_structure(operator) for operator in operators], "shape": list(shape)}


def _structure(step: Step | Chain) -> Any:
    if isinstance(step, Chain):
        return [_structure(each) for each in step.steps]
    if isinstance(step, Branches):
        return {"branches": [[_structure(each) for each in row] for row in step.rows]}
    kind = type(step).__name__
    if not isinstance(step, Operator):
        return {"kind": kind} | ({} if isinstance(step, Shift) else asdict(step))
    found: dict[str, Any] = {"kind": kind, "weight": list(step.weight.shape), "bias": step.bias is not None}
    form = step.form
    return found if form.geometry is None else found | {"groups": form.kernel[0], "geometry": asdict(form.geometry)}
