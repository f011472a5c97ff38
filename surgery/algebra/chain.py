"""Chains: the value that replaces one operator, and operators that are stacked into one.

    [W_1; W_2; ..] (O_1 + O_2 + .., I, K)  ~  [U_1; U_2; ..] F(rest)        chain of operator i: the rest, then U_i

Two operators stack where their forms agree in all that they read: only outputs and biases may differ. A stack has no
bias; each operator keeps its own.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from surgery.algebra.composition import BLOCK, compose_steps
from surgery.algebra.operators import Operator, Shape
from surgery.algebra.steps import Branches, Shift, Step
from surgery.errors import Refusal

__all__ = ["Chain", "own_parameters", "relative_error", "split", "stack", "stack_key", "without_numbers"]


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
    found, wanted = torch.atleast_1d(approximation.detach(), reference.detach())
    rows = max(1, BLOCK * len(wanted) // max(1, wanted.numel()))
    differences, scales = [], []
    for own, exact in zip(found.split(rows), wanted.split(rows), strict=True):  # large ones are never cast as a whole
        exact = exact.double()
        scales.append(float(torch.linalg.vector_norm(exact)))
        differences.append(float(torch.linalg.vector_norm(own.double() - exact)))
    difference, scale = math.hypot(*differences), math.hypot(*scales)
    return difference / scale if scale > 0 else difference


def without_numbers(operator: Operator, like: Tensor) -> Operator:
    """Return the operator without its bias, with a weight of zeros of the dtype and on the device of a tensor.

    >>> from surgery.algebra.operators import Linear
    >>> blank = without_numbers(Linear(torch.ones(3, 4)), like=torch.ones(1))
    >>> tuple(blank.weight.shape), blank.weight.untyped_storage().size()
    ((3, 4), 4)
    """
    weight = torch.zeros((), dtype=like.dtype, device=like.device).expand(operator.weight.shape)
    return replace(operator, weight=weight, bias=None)


def stack_key(operator: Operator) -> Hashable:
    """Return what is equal for operators that can be stacked: they differ in their outputs, biases and numbers only."""
    return operator.form.reading, operator.weight.dtype, operator.weight.device


def stack(operators: Sequence[Operator]) -> Operator:
    """Return the operator with the outputs of all, in order and without a bias; all have one ``stack_key``."""
    kernel = torch.cat([operator.kernel.detach() for operator in operators], 1)
    return operators[0].with_bias(None).with_kernel(kernel)


def split(chain: Chain, operators: Sequence[Operator]) -> tuple[Chain, ...] | Refusal:
    """Return the chain of each operator, with its bias, from the chain of their stack.

    All steps but the last are the same objects in every chain. A chain whose last step does not belong to the outputs
    alone is refused.

    >>> from surgery.algebra.operators import Linear
    >>> shared, last = Linear(torch.ones(2, 5)), Linear(torch.ones(7, 2))
    >>> parts = split(Chain((shared, last)), [Linear(torch.ones(3, 5)), Linear(torch.ones(4, 5))])
    >>> [part.out_shape((1, 5)) for part in parts]
    [(1, 3), (1, 4)]
    """
    *rest, last = chain.steps
    # The last factor must be [U_1; U_2; ..] and nothing else: its rows are all that belongs to one operator alone.
    rows = [operator.kernel.shape[1] for operator in operators]
    if not (rest and isinstance(last, Operator) and not last.reads_indices and last.kernel.shape[1] == sum(rows)):
        return Refusal("its last factor is not that of the outputs alone, so that there is nothing to share")
    chains = []
    for operator, kernel in zip(operators, last.kernel.split(rows, 1), strict=True):
        own = last.with_bias(None).with_kernel(kernel)
        own = own.to(memory_format=torch.contiguous_format, copy=True)
        chains.append(Chain((*rest, own), chain.origin).with_bias(operator.bias))
    return tuple(chains)


def own_parameters(chains: Sequence[Chain]) -> list[int]:
    """Return the number of parameters of each chain, where what several share counts for the first of them."""
    seen: set[int] = set()
    counts = []
    for chain in chains:
        new = [step for step in chain.steps if id(step) not in seen]
        seen |= {id(step) for step in new}
        counts.append(sum(step.parameters for step in new))
    return counts
