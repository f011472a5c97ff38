"""The outputs of the original on samples that nothing was fitted to, and how far other models are from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.data.samples import Calibration
from surgery.data.visible import VisibleOutputs
from surgery.errors import InputError
from surgery.kinds.inputs import Inputs
from surgery.kinds.layers.untouched import untouched
from surgery.kinds.registry import Model, kind_of
from surgery.passes.confidence import beyond
from surgery.runtime.compare import run_model

__all__ = ["HeldOut", "Outputs"]

Run = Callable[[Inputs], Any]


class HeldOut:
    """The outputs of a model on held-out samples, to measure others against; what masks hide of them does not count."""

    def __init__(self, model: Model, samples: Calibration) -> None:
        with _running(model) as run:
            self._outputs = Outputs(run, samples)

    @property
    def count(self) -> int:
        """Number of samples."""
        return self._outputs.count

    def error(self, model: Model) -> tuple[float, float]:
        """Return the relative error of the outputs, and its upper confidence limit."""
        with _running(model) as run:
            return self._outputs.error(run)


@contextmanager
def _running(model: Model) -> Iterator[Run]:
    """Yield what runs a model as ``run_model`` does; it keeps nothing of that."""
    module = kind_of(model).runnable(model)
    with untouched(module):
        yield partial(run_model, module)


class Outputs:
    """What a run puts out for samples, to measure other runs against; what masks hide does not count.

    Raises:
        InputError: there is nothing to compare.
    """

    def __init__(self, run: Run, samples: Calibration) -> None:
        self._samples = samples
        self._outputs = [_leaves(run(batch)) for batch in samples]
        if not any(leaves for leaves in self._outputs):
            raise InputError("the model has no floating-point output to compare")
        visible = VisibleOutputs(lambda batch: _leaves(run(batch)), samples)
        pairs = zip(samples, self._outputs, strict=True)
        self._visible = [list(visible.of(batch, leaves)) for batch, leaves in pairs]
        if not any(mask is None or bool(mask.any()) for masks in self._visible for mask in masks):
            what = "the masks of the held-out samples hide all that the model puts out"
            raise InputError(what, next_step="give samples with visible positions")

    @property
    def count(self) -> int:
        """Number of samples."""
        return self._samples.count

    def error(self, run: Run) -> tuple[float, float]:
        """Return the relative error of what another run puts out, and its upper confidence limit."""
        squares: list[Tensor] = []
        energies: list[Tensor] = []
        for batch, expected, visible in zip(self._samples, self._outputs, self._visible, strict=True):
            outputs = list(zip(_leaves(run(batch)), expected, visible, strict=True))
            squares.append(self._per_sample([(found - wanted, mask) for found, wanted, mask in outputs]))
            energies.append(self._per_sample([(wanted, mask) for _, wanted, mask in outputs]))
        e, n = torch.cat(squares), torch.cat(energies)
        ratio = float(e.sum() / n.sum().clamp(min=1e-300))
        above = beyond((e - ratio * n) / n.mean().clamp(min=1e-300))
        return math.sqrt(ratio), math.sqrt(ratio + above)

    def _per_sample(self, outputs: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """Return the sum of squares of each sample of a batch, or of all where no axis 0 holds samples.

        What several outputs say of one sample is not several samples.
        """
        sums: list[Tensor] = []
        for output, visible in outputs:
            squares = output.square() if visible is None else output.square().masked_fill(~visible, 0.0)
            by_sample = output.dim() > 1 and len(output) <= self._samples.batch_size
            sums.append(squares.flatten(1).sum(1) if by_sample else squares.sum().view(1))
        size = max(map(len, sums))
        return torch.stack([s if len(s) == size else (s.sum() / size).expand(size) for s in sums]).sum(0)


def _leaves(output: Any) -> list[Tensor]:
    leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.detach().double() for leaf in leaves]
