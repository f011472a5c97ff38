"""Every operator case x every registered factorization, and the chains of these pairs, each solved once a session.

What is returned is shared by all tests of a process: do not change it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch

from surgery.algebra import Chain, Operator, relative_error
from surgery.errors import Refusal
from surgery.factorizations import FACTORIZATIONS, Factorization, Ranks, named
from tests.cases import CASES, Case
from tests.tolerances import reduction, tolerance

PAIRS = [(case, method) for case in CASES for method in FACTORIZATIONS.values()]
FITS = [(case, method) for case, method in PAIRS if method.refuse(case.operator) is None]
UNFIT = [(case, method) for case, method in PAIRS if method.refuse(case.operator) is not None]
EXACT = [(case, method) for case, method in FITS if case.dtype == torch.float64]


def each(pairs: list[tuple[Case, Factorization]], *, all_of_them: bool = False) -> pytest.MarkDecorator:
    """Run a test for each of these pairs; for some of them, as a law is, unless for ``all_of_them``."""
    marks = [] if all_of_them else [pytest.mark.law]
    rows = [pytest.param(case, method, id=f"{case.id}-{method.name}", marks=marks) for case, method in pairs]
    return pytest.mark.parametrize(("case", "method"), rows)


def halved(ranks: Ranks) -> Ranks:
    """Return half of each rank, rounded up."""
    return tuple((rank + 1) // 2 for rank in ranks)


def rank_choices(method: Factorization, operator: Operator) -> list[Ranks]:
    """Return the ends and the middle of the ranks, and each rank full while the others are halved."""
    full = method.max_ranks(operator)
    half = halved(full)
    mixed = [(*half[:i], full[i], *half[i + 1 :]) for i in range(len(full))]
    return list(dict.fromkeys([full, half, (1,) * len(full), *mixed]))


@functools.cache
def solved(case: Case, method: str, ranks: Ranks, solver: str = "auto") -> Chain | Refusal:
    """Return the chain of a case, or why the method finds no good factors."""
    return named(method).factor(case.operator, ranks, solver=solver)


def lowered(ranks: Ranks) -> Ranks:
    """Return each rank less one, where it is not 1 already."""
    return tuple(max(1, rank - 1) for rank in ranks)


def factor(case: Case, method: Factorization, ranks: Ranks, *, solver: str = "auto") -> Chain:
    """Return the chain at these ranks or, where the method finds no good factors, at the next lower ones."""
    chain = solved(case, method.name, ranks, solver)
    if isinstance(chain, Chain):
        return chain
    assert len(chain.reason) > 10
    return factor(case, method, lowered(ranks), solver=solver)


def factor_operator(method: Factorization, operator: Operator, ranks: Ranks, *, solver: str = "auto") -> Chain:
    """Do the same for an operator that is not in the table."""
    chain = method.factor(operator, ranks, solver=solver)
    return chain if isinstance(chain, Chain) else factor_operator(method, operator, lowered(ranks), solver=solver)


def chains(case: Case, method: Factorization, choices: list[Ranks]) -> Iterator[tuple[Ranks, Chain]]:
    """Yield the chains at several ranks, without those at which the method finds no good factors."""
    for ranks in choices:
        chain = solved(case, method.name, ranks)
        if isinstance(chain, Chain):
            yield ranks, chain


@functools.cache
def composed(chain: Chain) -> Operator:
    """Return the one operator that a chain is."""
    operator = chain.compose()
    assert isinstance(operator, Operator), operator
    return operator


def weight_error(chain: Chain, operator: Operator) -> float:
    """Return the relative error of a chain's weight."""
    return relative_error(composed(chain).weight, operator.weight)


def slack(case: Case, chain: Chain) -> float:
    """Return the error allowed: each operator of a chain rounds once; the solver's sums run over outputs too."""
    length = max(case.operator.out_channels, *(reduction(operator) for operator in (case.operator, *chain.operators)))
    return tolerance(case.dtype, length=length, steps=len(chain.operators) + 1)
