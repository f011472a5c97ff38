"""What the chain of one site alone does to a model's outputs, measured: expected damages hold to first order only."""

from __future__ import annotations

from torch import Tensor

from surgery.algebra.chain import Chain
from surgery.algebra.operators import Operator
from surgery.data.samples import Calibration
from surgery.kinds.registry import Model, observe
from surgery.passes.held_out import Outputs

__all__ = ["Effects"]


class Effects:
    """The outputs of a model on some samples, and by how much they move when a chain takes the place of an operator.

    Nothing is changed: what the operator puts out is replaced as the model runs.
    """

    def __init__(self, model: Model, samples: Calibration) -> None:
        self._observed = observe(model, next(iter(samples)))
        self._spots = {spot.site.name: spot for spot in self._observed.find().placements}
        self._outputs = Outputs(self._observed.run, samples)

    def of(self, site: str, chain: Chain) -> float:
        """Return the relative error of the outputs with a chain at a site."""
        spot = self._spots[site]
        place = _Place(spot.site.operator, chain)
        self._observed.forget()
        for call in spot.calls:
            self._observed.watch(call, place.see)
            self._observed.tap(call, place.change)
        return self._outputs.error(self._observed.run)[0]


class _Place:
    """What an operator reads and puts out is shown to it, and what its chain would put out comes back.

    The difference is added, since calls that share a weight may have a bias each.
    """

    def __init__(self, operator: Operator, chain: Chain) -> None:
        self._operator, self._chain = operator, chain
        self._input: Tensor | None = None

    def see(self, x: Tensor) -> None:
        self._input = x

    def change(self, y: Tensor) -> Tensor:
        assert self._input is not None  # it is shown just before
        difference = self._chain(self._input) - self._operator(self._input)
        return y + difference.to(y.dtype).view_as(y)
