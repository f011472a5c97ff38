"""bisect: which sites of a decomposed model cost the most of a metric, by giving groups of them their weights back.

The decomposed model is recomposed: it has the original's architecture again, and the outputs of its factors. The metric
gains g(S) when the sites S get their original weights (and biases) back, everything else as it is. A group that gains
enough is halved, until it is one site: with k sites that matter among n, about 2 k log2(n) evaluations instead of n.
A group of which neither half gains enough is named as a whole: its sites cost what they do only together. Batch-norm
statistics stay those of the decomposed model.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from surgery.errors import InputError, only_own_errors
from surgery.files.load import model_of
from surgery.kinds.layers.unpacking import packed_parameter
from surgery.kinds.registry import kind_of, open_model
from surgery.passes.metrics import metric_of
from surgery.passes.recompose import recompose
from surgery.plans.goal import Metric
from surgery.sites import Call, Skip, site_name
from surgery.system.progress import Progress, silent
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
    original: Model | str | os.PathLike[str],
    decomposed: Model | str | os.PathLike[str],
    example_inputs: Any = None,
    *,
    metric: Metric,
    least: float = _LEAST,
    progress: Progress | None = None,
) -> Bisection:
    """Return which sites of a decomposed model cost the most of a metric, ``metric(module)``, higher is better.

    Args:
        original: the model that was decomposed, or the path of its file.
        decomposed: what ``decompose`` made of it, or the path of its file; an ONNX model if the original is one.
        example_inputs: needed only for an nn.Module that torch.fx cannot trace.
        metric: it gets a module in evaluation mode, with the original's architecture; of an ONNX model, a module that
            onnxruntime runs, as ``Goal.drop`` says.
        least: a group that gains less than this share of the whole loss is not halved further.
        progress: called with "evaluate", the number of evaluations done, and how many there will be at least.

    Raises:
        InputError: the second was not decomposed from the first, or a metric that fails.
    """
    dense, factored = model_of(original), model_of(decomposed)
    if kind_of(dense).is_onnx != kind_of(factored).is_onnx:
        raise InputError(
            "one of the models is an ONNX model, and the other is not",
            allowed="two ONNX models, or none",
            next_step="export the other with surgery.export_onnx, or compare the two with surgery.compare",
        )
    fused = recompose(factored, example_inputs)
    bench = (_OnnxBench if kind_of(dense).is_onnx else _Bench)(dense, fused.model, metric, progress or silent)
    sites = [change.site for change in fused.changes if bench.knows(change.site)]
    if not sites:
        if recompose(dense, example_inputs).changes:
            what = "the first model is factored itself, so that it does not have the weights of the original"
            raise InputError(what, next_step="give the dense model, or recompose the first one")
        raise InputError("the second model has no site that was factored from the first", next_step="give both models")
    best, base = metric_of(bench.original, metric), metric_of(bench.model, metric)
    blames = [] if best <= base else bench.search(sites, base=base, loss=best - base, least=least)
    names = (change.site for change in fused.changes)
    lost = [Skip(site, "", "its weight is not among those of the original") for site in names if site not in sites]
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
            # A packed weight (3 E, E) has the rows of q, k and v one after another: ``part`` of ``parts``.
            a, b = old[name].detach(), new[name].detach()
            place, dense = b.chunk(parts)[part], a.chunk(parts)[part]
            slots.append(_Slot(place, place.clone(), dense))
    return slots


class _Bench:
    """The original and the recomposed model, as modules, and how often the metric was measured."""

    def __init__(self, original: Any, recomposed: Any, metric: Metric, progress: Progress) -> None:
        self.original, self.model = _module(original), _module(recomposed)
        self.metric, self.progress = metric, progress
        self._slots: dict[str, list[_Slot]] = {}
        self.evaluations = 0

    def knows(self, site: str) -> bool:
        """Whether the original has the weight of a site."""
        self._slots[site] = _slots(site, self.original, self.model)
        return bool(self._slots[site])

    def restored(self, sites: Sequence[str]) -> float:
        """Return the metric of the recomposed model with the original's weights at these sites."""
        with _restored([slot for site in sites for slot in self._slots[site]]):
            return metric_of(self.model, self.metric)

    def search(self, sites: Sequence[str], *, base: float, loss: float, least: float) -> list[Blame]:
        """Return groups that were not halved, by what they gain; the group with the most is halved first."""
        # Invariant: ``groups`` and ``done`` share all sites out between them. Example of a loss of 1 and least = 0.1:
        # halves that gain 0.9 and 0.05 are both kept, and the first is halved next; halves of 0.05 and 0.02 say that
        # only the group as a whole matters, which is then done.
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
                halves.append(Blame(half, self.restored(half) - base))
                self.evaluations += 1
            together = all(half.gain < least * loss for half in halves)
            (done if together else groups).extend([group] if together else halves)
        self.progress("evaluate", self.evaluations, self.evaluations)
        return sorted(done, key=lambda blame: -blame.gain)


class _OnnxBench(_Bench):
    """The same of ONNX models, which hold their weights where they cannot be changed: each time there is a new one."""

    def __init__(self, original: Any, recomposed: Any, metric: Metric, progress: Progress) -> None:
        super().__init__(original, recomposed, metric, progress)
        self._recomposed, self._kind = recomposed, kind_of(recomposed)
        self._old, self._new = (kind_of(model).parts(model) for model in (original, recomposed))
        self._names: dict[str, set[str]] = defaultdict(set)  # of the weight and the biases of each site
        for call in open_model(recomposed, copies=False).flow.elements:
            if isinstance(call, Call):
                self._names[site_name(call.weight)] |= {call.weight} | ({call.bias} if call.bias else set())

    def knows(self, site: str) -> bool:
        """Whether the original has the weight of a site."""
        return any(site_name(name) == site for name in self._shared(site))

    def _shared(self, site: str) -> list[str]:
        """Return the names of what both models have of a site."""
        both = [name for name in sorted(self._names[site]) if name in self._old and name in self._new]
        return [name for name in both if self._old[name].shape == self._new[name].shape]

    def restored(self, sites: Sequence[str]) -> float:
        """Return the metric of the recomposed model with the original's weights at these sites."""
        dense = {name: self._old[name] for site in sites for name in self._shared(site)}
        return metric_of(self._kind.exchanged(self._recomposed, dense), self.metric)


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
