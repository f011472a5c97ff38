"""bisect: which sites of a decomposed model cost the most of a metric, by giving groups of them their weights back.

The decomposed model is recomposed: it has the original's architecture again, and the outputs of its factors. The metric
gains g(S) when the sites S get their original weights (and biases) back, everything else as it is. A group that gains
enough is halved, until it is one site: with k sites that matter among n, about 2 k log2(n) evaluations instead of n.
A group of which neither half gains enough is named as a whole: its sites cost what they do only together. Batch-norm
statistics stay those of the decomposed model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.errors import InputError, only_own_errors
from surgery.kinds.layers.unpacking import packed_parameter
from surgery.kinds.registry import kind_of
from surgery.passes.metrics import metric_of
from surgery.passes.recompose import recompose
from surgery.plans.goal import Metric
from surgery.plans.plan import Progress, silent
from surgery.sites import Skip
from surgery.system.tables import table
from surgery.text import first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from surgery.kinds.registry import Model

__all__ = ["Bisection", "Blame", "bisect"]

_LEAST = 0.1  # of the whole loss; what gains less is not worth a closer look


@dataclass(frozen=True)
class Blame:
    """Sites, and what the metric gains when they alone are dense again; several are a group that was not told apart."""

    sites: tuple[str, ...]
    gain: float


@dataclass(frozen=True, repr=False)
class Bisection:
    """The metric of both models, who is to blame, the most first, and the sites that could not be restored."""

    original: float
    decomposed: float
    blames: tuple[Blame, ...]
    skips: tuple[Skip, ...]
    evaluations: int

    @property
    def loss(self) -> float:
        """What decomposing has cost of the metric."""
        return self.original - self.decomposed

    def __repr__(self) -> str:
        """Say who is to blame in a few lines."""
        head = f"Bisection: {self.original:.6g} -> {self.decomposed:.6g} in {self.evaluations} evaluations"
        rows = [["sites", "gain when dense"]] + [[", ".join(b.sites), f"{b.gain:+.3g}"] for b in self.blames]
        return "\n".join([head, *([table(rows)] if self.blames else [])])


@only_own_errors
def bisect(
    original: Model,
    decomposed: Model,
    example_inputs: Any = None,
    *,
    metric: Metric,
    least: float = _LEAST,
    progress: Progress | None = None,
) -> Bisection:
    """Return which sites of a decomposed model cost the most of a metric, ``metric(module)``, higher is better.

    Args:
        original: the model that was decomposed.
        decomposed: what ``decompose`` made of it.
        example_inputs: needed only for an nn.Module that torch.fx cannot trace.
        metric: it gets a module in evaluation mode, with the original's architecture.
        least: a group that gains less than this share of the whole loss is not halved further.
        progress: called with "evaluate", the number of evaluations done, and how many there will be at least.

    Raises:
        InputError: the second was not decomposed from the first, or a metric that fails.
    """
    if any(kind_of(model).is_onnx for model in (original, decomposed)):
        what = "an ONNX model holds its weights where they cannot be exchanged while it runs"
        raise InputError(
            what, allowed="modules and exported programs", next_step="compare the two with surgery.compare"
        )
    fused = recompose(decomposed, example_inputs)
    first, second = _module(original), _module(fused.model)
    bench = _Bench(second, metric, progress or silent)
    found = {change.site: _slots(change.site, first, second) for change in fused.changes}
    sites = [site for site, slots in found.items() if slots]
    if not sites:
        if recompose(original, example_inputs).changes:
            what = "the first model is factored itself, so that it does not have the weights of the original"
            raise InputError(what, next_step="give the dense model, or recompose the first one")
        raise InputError("the second model has no site that was factored from the first", next_step="give both models")
    best, base = metric_of(first, metric), metric_of(second, metric)
    blames = [] if best <= base else bench.search(sites, found, base=base, loss=best - base, least=least)
    lost = [Skip(site, "", "its weight is not among those of the original") for site in found if site not in sites]
    return Bisection(best, base, tuple(blames), (*fused.skips, *lost), bench.evaluations + 2)


def _module(model: Model) -> nn.Module:
    try:
        return kind_of(model).runnable(model)
    except InputError:
        raise
    except Exception as error:  # whatever torch makes of odd names
        what = f"the exported program cannot be made a module: {first_line(error)}"
        raise InputError(what, next_step="export it again with torch.export.export(model, inputs)") from error


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(remove_duplicate=False))


@dataclass(frozen=True, eq=False)
class _Slot:
    """A place in the decomposed model's memory, what was there, and what the original has there."""

    place: Tensor
    factored: Tensor
    dense: Tensor


def _slots(site: str, first: nn.Module, second: nn.Module) -> list[_Slot]:
    """Return the weight and bias of a site in both models; rows of what has them packed."""
    old, new = _tensors(first), _tensors(second)
    packed = None if f"{site}.weight" in new else packed_parameter(site)
    weight, part, parts = packed or (f"{site}.weight", 0, 1)
    names = [weight, f"{weight.removesuffix('weight')}bias"] if packed and parts > 1 else [site, weight, f"{site}.bias"]
    slots = []
    for name in names:
        if name in old and name in new and old[name].shape == new[name].shape:
            a, b = old[name].detach(), new[name].detach()
            place, dense = b.chunk(parts)[part], a.chunk(parts)[part]
            slots.append(_Slot(place, place.clone(), dense))
    return slots


@dataclass(eq=False)
class _Bench:
    """The recomposed module, its metric, and how often that was measured."""

    module: nn.Module
    metric: Metric
    progress: Progress
    evaluations: int = 0

    def search(
        self, sites: Sequence[str], slots: dict[str, list[_Slot]], *, base: float, loss: float, least: float
    ) -> list[Blame]:
        """Return groups that were not halved, by what they gain; the group with the most is halved first."""
        groups, done = [Blame(tuple(sites), loss)], []
        while groups:
            group = max(groups, key=lambda blame: blame.gain)
            groups.remove(group)
            if len(group.sites) == 1 or group.gain < least * loss:
                done.append(group)
                continue
            middle = (len(group.sites) + 1) // 2
            halves = []
            for half in (group.sites[:middle], group.sites[middle:]):
                self.progress("evaluate", self.evaluations, self.evaluations + 2 * len(groups) + 2)
                with _restored([slot for site in half for slot in slots[site]]):
                    halves.append(Blame(half, metric_of(self.module, self.metric) - base))
                self.evaluations += 1
            together = all(half.gain < least * loss for half in halves)
            (done if together else groups).extend([group] if together else halves)
        self.progress("evaluate", self.evaluations, self.evaluations)
        return sorted(done, key=lambda blame: -blame.gain)


@contextmanager
def _restored(slots: Sequence[_Slot]) -> Iterator[None]:
    """Put the original weights in place, and afterwards the factored ones again."""
    with torch.no_grad():
        for slot in slots:
            slot.place.copy_(slot.dense)
        try:
            yield
        finally:
            for slot in slots:
                slot.place.copy_(slot.factored)
