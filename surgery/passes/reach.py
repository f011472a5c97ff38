"""Which sites of a module run when something takes their place: seen in one run, before anything is fitted to data."""

from __future__ import annotations

from collections.abc import Collection

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.errors import Refusal
from surgery.factorizations import fitting
from surgery.kinds.inputs import Inputs
from surgery.kinds.registry import Model, kind_of, open_model
from surgery.sites.edit import Replace
from surgery.sites.find import find

__all__ = ["unreached"]


def unreached(model: Model, inputs: Inputs, names: Collection[str]) -> dict[str, str]:
    """Return why some sites have to stay dense, by name: a copy with the least chains at all of them is run once.

    Graphs say themselves what runs; of them none is refused here.
    """
    if kind_of(model).says_what_runs():
        return {}
    graph = open_model(model, inputs)
    for spot in find(graph.flow).placements:
        chain = None if spot.chain is not None or spot.site.name not in names else _least(spot.site.operator)
        if chain is not None:
            graph.apply(Replace(spot, chain))
    return graph.verify()


def _least(operator: Operator) -> Chain | None:
    """Return the chain of the lowest ranks, of zeros; None where no factorization fits."""
    methods = fitting(operator, "auto")
    if isinstance(methods, Refusal):
        return None
    ranks = tuple(1 for _ in methods[0].max_ranks(operator))
    shapes = methods[0].shapes(tuple(operator.kernel.shape), ranks)
    return methods[0].assemble(operator, [operator.weight.new_zeros(shape) for shape in shapes], ranks)
