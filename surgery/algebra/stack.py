"""Stacks: several operators on the same input as one with all of their outputs, and the chain of a stack taken apart.

    [W_1; W_2; ..] (O_1 + O_2 + .., I, K)  ~  [U_1; U_2; ..] F(rest)        chain of operator i: the rest, then U_i

Two operators stack where their forms agree in all that they read: only outputs and biases may differ. A stack has no
bias; each operator keeps its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.errors import Refusal

__all__ = ["own_parameters", "split", "stack", "stack_key"]


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
