"""Stand-in data for users who give none: plausible inputs, made from the model and its example inputs.

    floats     the example inputs, and noise with their mean and deviation, smooth along the last two axes where there
               are two; if the model has batch norms, gradient steps move the noise until the inputs of the batch norms
               have the running statistics that training left there (Yin et al. 2020, arXiv 1912.08795)
    ids        random rows of the table that the input is looked up in, or else the example's ids in another order
    the rest   as in the example: masks, flags, positions, states

Measurements on such data say how a model behaves near the inputs that it was made for, and nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.data.batch_norm import NormDistances
from surgery.data.masks import is_mask_name, leaf_names
from surgery.data.samples import Calibration, read_calibration, samples_in
from surgery.errors import InputError, Refusal
from surgery.kinds.inputs import Inputs, Signature
from surgery.kinds.layers.untouched import untouched
from surgery.kinds.registry import Model, kind_of, observe
from surgery.sites import Found
from surgery.system.progress import Progress

__all__ = ["GLANCE", "Effort", "StandIn", "stand_in"]

_BATCH = 16
_RATE = 0.1  # the first step, in deviations of the inputs
_KEPT = ("position", "type", "segment")  # words in the names of whole-number inputs that cannot be random


@dataclass(frozen=True)
class Effort:
    """How many samples to make, and how many steps to take to match batch norms.

    ``samples`` and ``steps`` are (fewest, most). Between these, ``pass_`` bounds the multiply-accumulates of one pass
    over all samples, and ``work`` those of all steps.
    """

    samples: tuple[int, int] = (16, 48)
    steps: tuple[int, int] = (10, 150)
    pass_: float = 4e9
    work: float = 1e11

    def samples_at(self, macs: float) -> int:
        """Return how many samples to make where one sample takes ``macs`` multiply-accumulates."""
        return int(max(self.samples[0], min(self.samples[1], self.pass_ / max(macs, 1.0))))

    def steps_at(self, macs: float) -> int:
        """Return how many steps to take where one pass takes ``macs`` multiply-accumulates."""
        # A step is a forward and a backward pass, together about three passes.
        return int(max(self.steps[0], min(self.steps[1], self.work / max(3 * macs, 1.0))))


GLANCE = Effort(samples=(8, 8), steps=(8, 16))


@dataclass(frozen=True, eq=False)
class StandIn:
    """Made-up samples; ``what`` describes them in a few words."""

    samples: Calibration
    what: str


def stand_in(
    model: Model,
    inputs: Inputs,
    found: Found,
    *,
    effort: Effort | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> StandIn | Refusal:
    """Return made-up samples for a model, or a refusal that says why none can be made.

    ``inputs`` are the model's example inputs, or empty for a program that brings its own; ``found`` are its sites.
    While batch norms are matched, ``progress`` is called with ("match", steps done, all steps).
    """
    effort = effort or Effort()
    kind = kind_of(model)
    example = inputs if any(inputs) else kind.brought_inputs(model)
    leaves, structure = pytree.tree_flatten(example)
    if example is None or not any(isinstance(leaf, Tensor) and leaf.dim() and leaf.numel() for leaf in leaves):
        return Refusal("its example inputs hold no tensor to make others from")
    signature = kind.signature(model, inputs)
    makers = [_Maker(leaf, ids) for leaf, ids in zip(leaves, _ids(model, example, signature, found), strict=True)]
    size = samples_in(model, inputs)
    generator = torch.Generator().manual_seed(seed)
    macs = found.totals.macs / size
    rounds = range(max(1, -(-effort.samples_at(macs) // size)))
    made = [_as_inputs([maker.make(size, generator) for maker in makers], structure) for _ in rounds]
    try:
        with untouched(model):
            samples = read_calibration(made, model, inputs, batch_size=_BATCH)
            matched = _match_norms(model, samples, effort.steps_at(macs * samples.count), progress)
            what = _what(makers, matched=matched is not None)
            return StandIn(read_calibration([example, *(matched or made)], model, inputs, batch_size=_BATCH), what)
    except InputError as error:
        return Refusal(f"it does not take made-up inputs: {error.what}")


def _as_inputs(leaves: Sequence[Any], structure: pytree.TreeSpec) -> Inputs:
    args, kwargs = pytree.tree_unflatten(list(leaves), structure)
    return tuple(args), dict(kwargs)


def _what(makers: Sequence[_Maker], *, matched: bool) -> str:
    """Describe the samples in a few words."""
    if matched:
        return "inputs made to match its batch norms"
    kinds = [kind for kind in ("noise", "random ids") if any(maker.kind == kind for maker in makers)]
    return f"{' and '.join(kinds) or 'its example inputs'}{' like its example inputs' * bool(kinds)}"


def _ids(model: Model, example: Inputs, signature: Signature, found: Found) -> list[int | None]:
    """Return how many ids the table of each flat input has: None if not known, 0 for an input that must not change."""
    declared = kind_of(model).declared_inputs(model, example, signature)
    tables: dict[tuple[int, ...], int] = {}
    # Whole numbers that an embedding reads directly are bounded by its table; the shape of the input identifies them.
    for placement in found.placements:
        operator = placement.site.operator
        if operator.reads_indices:
            rows = len(operator.weight)
            for shape in placement.site.input_shapes:
                tables[tuple(shape)] = min(rows, tables.get(tuple(shape), rows))
    ids: list[int | None] = []
    for name, leaf in zip(leaf_names(signature.names, example), pytree.tree_leaves(example), strict=True):
        kept = is_mask_name(name) or any(word in name.lower() for word in _KEPT)
        known = declared[name].ids if name in declared else None
        shape = tuple(leaf.shape) if isinstance(leaf, Tensor) else ()
        ids.append(0 if kept else known or tables.get(shape))
    return ids


@dataclass(frozen=True, eq=False)
class _Maker:
    """Makes values like one flat input; ``ids`` is what ``_ids`` returns for it."""

    like: Any
    ids: int | None

    @property
    def kind(self) -> str:
        """How values are made: "noise", "random ids", or "" for an input that stays as it is."""
        if not isinstance(self.like, Tensor) or not self.like.dim() or not self.like.numel():
            return ""
        if self.ids == 0 or self.like.is_complex() or self.like.dtype == torch.bool:
            return ""
        return "noise" if self.like.is_floating_point() else "random ids"

    def make(self, size: int, generator: torch.Generator) -> Any:
        """Return another value of the same shape."""
        if not self.kind or len(self.like) != size:
            return self.like
        if self.kind == "noise":
            return _noise(self.like, generator)
        if self.ids:
            return torch.randint(self.ids, self.like.shape, generator=generator).to(self.like)
        order = torch.randperm(self.like.numel(), generator=generator).to(self.like.device)
        return self.like.flatten()[order].view_as(self.like)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return noise with the mean and the deviation of a tensor; images get noise of a random smoothness."""
    # Images are smooth: most of the noise is drawn on a grid of 0.1 to 0.6 times the size, and interpolated.
    shape = tuple(like.shape)
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 4 and min(shape[2:]) >= 8:
        coarse = [max(4, int(size * float(torch.rand((), generator=generator) * 0.5 + 0.1))) for size in shape[2:]]
        small = torch.randn((*shape[:2], *coarse), generator=generator)
        noise = 0.3 * noise + F.interpolate(small, size=shape[2:], mode="bilinear")
    wide = like.detach().double()
    deviation = float(wide.std()) if wide.numel() > 1 else 0.0
    deviation = deviation if deviation > 0 else 1.0
    centred = (noise - noise.mean()) / noise.std().clamp(min=1e-6) if noise.numel() > 1 else noise
    return (centred * deviation + float(wide.mean())).to(like)


def _match_norms(model: Model, samples: Calibration, steps: int, progress: Progress | None) -> list[Inputs] | None:
    """Return the batches, moved until the inputs of batch norms have their statistics; None if nothing can be moved."""
    observed = observe(model, next(iter(samples)))
    distances = NormDistances(observed)
    found: list[Inputs] = []
    for number, batch in enumerate(samples if distances else ()):
        row, structure = pytree.tree_flatten(batch)
        places = [at for at, leaf in enumerate(row) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        leaves = [row[at].detach().clone().requires_grad_() for at in places]
        if not leaves:
            return None
        # Each batch is optimised by itself: its inputs are the variables, and the model is fixed.
        deviation = torch.stack([leaf.detach().float().std() for leaf in leaves]).mean()
        optimizer = torch.optim.Adam(leaves, lr=_RATE * float(deviation.clamp(min=1e-3)))
        for done in range(steps):
            if progress is not None:
                progress("match", number * steps + done, steps * len(samples))
            for at, leaf in zip(places, leaves, strict=True):
                row[at] = leaf
            observed.run(_as_inputs(row, structure), gradients=True)
            distance = distances.take()
            if distance is None or not distance.requires_grad:
                return None
            optimizer.zero_grad()
            distance.backward()
            optimizer.step()
        for at, leaf in zip(places, leaves, strict=True):
            row[at] = leaf.detach()
        found.append(_as_inputs(row, structure))
    return found or None
