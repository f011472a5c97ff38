"""What the chain of one site alone does to a model's outputs, measured: expected damages hold to first order only."""

from __future__ import annotations

from torch import Tensor

from surgery.calibration.inputs import Calibration
from surgery.calibration.observe import observe
from surgery.chain import Chain
from surgery.graphs import Model
from surgery.passes.goals import Outputs

__all__ = ["Effects"]


class Effects:
    """The outputs of a model on some samples, and by how much they move when a chain takes the place of an operator.

    Nothing is changed: what the operator puts out is replaced as the model runs.
    """

    def __init__(self, model: Model, samples: Calibration) -> None:
        self._observed = observe(model, next(iter(samples)))
        self._spots = {spot.site.name: spot for spot in self._observed.kind.find().spots}
        self._outputs = Outputs(self._observed.run, samples)

    def of(self, site: str, chain: Chain) -> float:
        """Return the relative error of the outputs with a chain at a site."""
        place = _Place(chain)
        self._observed.forget()
        for call in self._spots[site].calls:
            self._observed.watch(call, place.see)
            self._observed.tap(call, place.change)
        return self._outputs.error(self._observed.run)[0]


class _Place:
    """A chain that is given what an operator reads, and whose output stands for the operator's."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._input: Tensor | None = None

    def see(self, x: Tensor) -> None:
        self._input = x

    def change(self, y: Tensor) -> Tensor:
        assert self._input is not None  # it is shown just before
        return self._chain(self._input).to(y.dtype).view_as(y)
