"""Chains: operators in order, with reshapes between them where needed, in the place of one operator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.algebra.compose import compose_steps
from surgery.algebra.operators import Operator, Shape
from surgery.algebra.steps import Branches, Shift, Step
from surgery.errors import Refusal

__all__ = ["Chain", "relative_error", "without_numbers"]


@dataclass(frozen=True, eq=False)
class Chain:
    """What replaces one operator: steps applied in order, with the bias on the last operator or in a final shift.

    ``origin`` is the factorization that made the chain, with its ranks; None if none did.
    """

    steps: tuple[Step, ...]
    origin: tuple[str, tuple[int, ...]] | None = None

    @property
    def operators(self) -> tuple[Operator, ...]:
        """All operators, those of branches included: everything that has a weight."""
        rows = (step.operators if isinstance(step, Branches) else (step,) for step in self.steps)
        return tuple(step for row in rows for step in row if isinstance(step, Operator))

    @property
    def places(self) -> list[tuple[str, Operator | Shift]]:
        """All that has parameters, with its path below the site: ``2`` for a step, ``2.row.call`` in branches."""
        found: list[tuple[str, Operator | Shift]] = []
        for i, step in enumerate(self.steps):
            if isinstance(step, Operator | Shift):
                found.append((str(i), step))
            elif isinstance(step, Branches):
                found += [(f"{i}.{j}.{k}", part) for j, row in enumerate(step.rows) for k, part in enumerate(row)]
        return found

    def __call__(self, x: Tensor) -> Tensor:
        """Apply all steps in order."""
        for step in self.steps:
            x = step(x)
        return x

    @property
    def parameters(self) -> int:
        """Number of parameters."""
        return sum(step.parameters for step in self.steps)

    def out_shape(self, shape: Shape) -> Shape:
        """Return the output shape for an input shape."""
        for step in self.steps:
            shape = step.out_shape(shape)
        return shape

    def macs(self, shape: Shape) -> int:
        """Return the multiply-accumulates at an input shape."""
        total = 0
        for step in self.steps:
            total += step.macs(shape)
            shape = step.out_shape(shape)
        return total

    def to(self, **kwargs: Any) -> Chain:
        """Return the same chain with its tensors moved or cast as by ``Tensor.to``."""
        return replace(self, steps=tuple(step.to(**kwargs) for step in self.steps))

    @property
    def bias(self) -> Tensor | None:
        """The bias of the last step."""
        last = self.steps[-1]
        return last.bias if isinstance(last, Operator | Shift | Branches) else None

    def with_bias(self, bias: Tensor | None) -> Chain:
        """Return the same chain with another bias; a chain that ends with a reshape gets a shift for it."""
        *before, last = self.steps
        if isinstance(last, Operator | Branches):
            return replace(self, steps=(*before, last.with_bias(bias)))
        kept = before if isinstance(last, Shift) else [*before, last]
        return replace(self, steps=(*kept, *([] if bias is None else [Shift(bias)])))

    def compose(self) -> Operator | Refusal:
        """Contract the chain into the one operator that it is, or say why it is not one."""
        return compose_steps(self.steps)


def relative_error(approximation: Tensor, reference: Tensor) -> float:
    """Return ``||approximation - reference|| / ||reference||`` in float64; 0 for two zero tensors."""
    reference = reference.detach().double()
    difference = torch.linalg.vector_norm(approximation.detach().double() - reference)
    scale = torch.linalg.vector_norm(reference)
    return float(difference / scale) if scale > 0 else float(difference)


def without_numbers(operator: Operator, like: Tensor) -> Operator:
    """Return the operator without its bias, with a weight of zeros of the dtype and on the device of a tensor.

    >>> from surgery.algebra.operators import Linear
    >>> blank = without_numbers(Linear(torch.ones(3, 4)), like=torch.ones(1))
    >>> tuple(blank.weight.shape), blank.weight.untyped_storage().size()
    ((3, 4), 4)
    """
    weight = torch.zeros((), dtype=like.dtype, device=like.device).expand(operator.weight.shape)
    return replace(operator, weight=weight, bias=None)
