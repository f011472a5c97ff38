"""The algebra: operators, steps and chains of them, and what they compose to. Tensors alone: no graph, no file."""

from __future__ import annotations

from surgery.algebra.chain import Chain, own_parameters, relative_error, split, stack, stack_key, without_numbers
from surgery.algebra.composition import add, compose, compose_steps
from surgery.algebra.operators import Conv, Embedding, Form, Geometry, Layout, Linear, Operator, PaddingMode, Shape
from surgery.algebra.steps import Branches, Flatten, Link, Shift, Step, Transpose, Unflatten

__all__ = [
    "Branches",
    "Chain",
    "Conv",
    "Embedding",
    "Flatten",
    "Form",
    "Geometry",
    "Layout",
    "Linear",
    "Link",
    "Operator",
    "PaddingMode",
    "Shape",
    "Shift",
    "Step",
    "Transpose",
    "Unflatten",
    "add",
    "compose",
    "compose_steps",
    "own_parameters",
    "relative_error",
    "split",
    "stack",
    "stack_key",
    "without_numbers",
]
