"""Calibration inputs in one form: the samples of all inputs, gone through in batches as often as need be.

Users give a tensor (a batch of samples), a sequence of inputs (each a tensor, a tuple of arguments, or a dict by name),
a DataLoader, whose items may have labels after the inputs, or the path of a file (see ``files``). The samples are along
axis 0 of each tensor that is as long there as the first one; whatever else an input holds goes with each batch as it is
in the first. A program that was exported for one batch size gets batches of exactly that size. Masks among the inputs
say which positions are padding; samples that are nothing else are left out.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from surgery.data.files import FILES, read_file
from surgery.data.masks import Mask, find_masks, leaf_names, read_masks
from surgery.errors import InputError
from surgery.kinds.inputs import Inputs, normalise_inputs
from surgery.kinds.registry import Model, kind_of
from surgery.system.arrays import open_arrays

__all__ = ["Calibration", "read_calibration", "read_inputs", "samples_in"]

_LEAST = 48  # samples
_WORK = 2.0e11  # multiply-accumulates of one pass: 49 samples of a ResNet-50 at 224x224
_PASSES = 3
_ALLOWED = f"a tensor, a sequence of inputs, a DataLoader, or the path of a file ({FILES})"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Samples of model inputs: iterate for batches ``(args, kwargs)`` of ``batch_size``; the last may be smaller.

    ``leaves`` are the flat inputs, of which those that are ``sampled`` have all samples along axis 0. If ``exact``,
    the model takes no other batch size, and there is no smaller batch. ``masks`` are those that hide something.
    """

    leaves: tuple[Any, ...]
    sampled: tuple[bool, ...]
    structure: pytree.TreeSpec
    batch_size: int
    exact: bool = False
    masks: tuple[Mask, ...] = ()

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(next(leaf for leaf, many in zip(self.leaves, self.sampled, strict=True) if many).shape[0])

    def __len__(self) -> int:
        """Return the number of batches."""
        return -(-self.count // self.batch_size)

    def __iter__(self) -> Iterator[Inputs]:
        """Iterate over the batches, any number of times."""
        for start in range(0, self.count, self.batch_size):
            yield self._cut(slice(start, start + self.batch_size))

    def _cut(self, part: slice) -> Inputs:
        rows = zip(self.leaves, self.sampled, strict=True)
        args, kwargs = pytree.tree_unflatten([leaf[part] if many else leaf for leaf, many in rows], self.structure)
        return tuple(args), dict(kwargs)

    def visible(self, batch: Inputs) -> tuple[Tensor, ...]:
        """Return which positions of a batch are visible, (N, T) of bool for each length T where some are not."""
        leaves = pytree.tree_leaves(batch) if self.masks else ()
        return tuple(shown for shown in read_masks(self.masks, leaves) if not bool(shown.all()))

    def take(self, index: Tensor | slice) -> Calibration:
        """Return the samples of these numbers, in this order."""
        rows = zip(self.leaves, self.sampled, strict=True)
        return replace(self, leaves=tuple(leaf[index] if many else leaf for leaf, many in rows))

    def affordable(self, macs: float, *, least: int = _LEAST) -> Calibration:
        """Return the first samples: so many that a pass takes ``_WORK`` at ``macs`` each, at least ``least``.

        In whole batches where they must be: however many there are, what is read of a large network is bounded.
        """
        wanted = int(max(least, _WORK / max(macs, 1.0)))
        if self.exact:
            wanted = max(wanted // self.batch_size, 1) * self.batch_size
        return self if wanted >= self.count else self.take(slice(wanted))

    def passes(self, macs: float) -> int:
        """Return how many passes over all samples, at ``macs`` each, do ``_PASSES`` times ``_WORK``; 1 at least."""
        return max(1, int(_PASSES * _WORK / max(macs * self.count, 1.0)))

    def split(self, held_out: float = 0.25, *, seed: int = 0) -> tuple[Calibration, Calibration]:
        """Return (fit, held out): a random share of the samples, or of whole batches where they must be, is set aside.

        Raises:
            InputError: too few samples for two parts.
        """
        unit = self.batch_size if self.exact else 1
        aside = max(1, round(held_out * self.count / unit)) * unit
        if aside >= self.count:
            what = f"{self.count} calibration samples cannot be split into two parts"
            raise InputError(what, allowed=f"at least {2 * unit}", next_step="give more samples")
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed), device="cpu")
        return self.take(order[aside:]), self.take(order[:aside])


def read_calibration(
    calibration: Any, model: Model, example_inputs: Any = None, *, limit: int = 512, batch_size: int = 32
) -> Calibration:
    """Return calibration inputs for a model, at most ``limit`` samples of what was given.

    ``example_inputs`` tell how many arguments the model takes where its own signature does not. ``batch_size`` is that
    of the batches unless the model fixes it; for one that does, samples that fill no batch are left out.

    Raises:
        InputError: inputs that cannot be used, do not fit the model, or are too few for its batch size.
        FileError: a file that cannot be read.
    """
    if isinstance(calibration, Calibration):
        return calibration
    example = normalise_inputs(example_inputs)
    kind = kind_of(model)
    signature = kind.signature(model, example)
    if isinstance(calibration, str | os.PathLike):
        known = kind.declared_inputs(model, example, signature)
        calibration = read_file(Path(calibration), signature, known, limit=limit)
    items: list[Inputs] = []
    found = 0
    for item in _items(calibration):
        items.append(signature.arrange(item))
        found += _length(items[-1])
        if found >= limit:
            break
    if not items:
        raise InputError("there is no calibration input", allowed=_ALLOWED)
    samples = _masked(_join(items, batch_size), leaf_names(signature.names, items[0]))
    samples = _beside(model, samples.take(slice(min(limit, samples.count))))
    fixed = kind.fixed_batch(model)
    if fixed is None and kind.brings_inputs():
        fixed = _guarded_batch(model, samples)
    return samples if fixed is None else _fill(samples, fixed)


def read_inputs(path: Path, model: Model | None) -> Inputs:
    """Return the inputs in a file, all of them, as one call of a model that knows its own; by name if it is not known.

    Raises:
        FileError: a file that cannot be read, is too large, or does not fit the program.
    """
    if model is None:
        with open_arrays(path) as arrays:
            return (), {name: arrays.read(name) for name in arrays.forms}
    kind = kind_of(model)
    example = kind.brought_inputs(model) or ((), {})
    signature = kind.signature(model, example)
    return signature.arrange(read_file(path, signature, kind.declared_inputs(model, example, signature), limit=None))


def _masked(samples: Calibration, names: Sequence[str]) -> Calibration:
    """Return the samples that have visible positions, with their masks."""
    held = zip(samples.leaves, samples.sampled, strict=True)
    masks = find_masks(names, [leaf if many else None for leaf, many in held])
    if not masks:
        return samples
    shown = torch.stack([mask.any(1) for mask in read_masks(masks, samples.leaves)]).all(0)
    if not bool(shown.any()):
        what = f"all positions of all {samples.count} calibration samples are hidden by {names[masks[0].place]}"
        raise InputError(what, allowed="masks with ones where there are tokens")
    return replace(samples if bool(shown.all()) else samples.take(shown), masks=masks)


def _beside(model: Model, samples: Calibration) -> Calibration:
    """Return the samples on the device of the model."""
    weights = kind_of(model).tensors(model)
    device = next((weight.device for weight in weights.values()), torch.device("cpu"))
    leaves = (leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in samples.leaves)
    return replace(samples, leaves=tuple(leaves))


def _guarded_batch(model: Model, samples: Calibration) -> int | None:
    """Return the batch size of the example that a model brings, where it refuses others though its batch is dynamic.

    torch.export guards the choice of a kernel that depends on the batch, as some convolutions' does.
    """
    kind = kind_of(model)
    module, example = kind.runnable(model), kind.brought_inputs(model)
    sizes = {samples.batch_size, samples.count % samples.batch_size or samples.batch_size}
    if example is None or all(_takes(module, samples, size) for size in sizes):
        return None
    return _length(example)


def _takes(module: nn.Module, samples: Calibration, size: int) -> bool:
    args, kwargs = next(iter(replace(samples, batch_size=size)))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch about itself
            module(*args, **kwargs)
    except Exception:  # a model may raise anything on inputs that do not fit
        return False
    return True


def _fill(samples: Calibration, size: int) -> Calibration:
    whole = samples.count // size * size
    if not whole:
        what = f"{samples.count} calibration samples for a program that was exported for batches of {size}"
        raise InputError(what, allowed=f"at least {size}", next_step="give more, or export with a dynamic batch size")
    return replace(samples.take(slice(whole)), batch_size=size, exact=True)


def _items(calibration: Any) -> Iterable[Any]:
    """Return the inputs one by one, each of one or more samples."""
    if isinstance(calibration, Tensor | np.ndarray | Mapping):
        return [calibration]
    if isinstance(calibration, Iterable):
        return calibration
    raise InputError(f"calibration inputs of type {type(calibration).__name__}", allowed=_ALLOWED)


def _length(inputs: Inputs) -> int:
    """Return the number of samples in one input: the length of its first tensor."""
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise InputError("a calibration input has no tensor with samples along its first axis", allowed=_ALLOWED)


def samples_in(model: Model, inputs: Inputs) -> int:
    """Return the number of samples in example inputs, or in those that a program brings; 1 where there are none."""
    kind = kind_of(model)
    given = kind.brought_inputs(model) if kind.brings_inputs() else inputs
    return next((len(leaf) for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def _join(items: Sequence[Inputs], batch_size: int) -> Calibration:
    """Put the samples of all inputs one after another.

    Raises:
        InputError: inputs that differ in more than the number of samples.
    """
    flat = [pytree.tree_flatten(item) for item in items]
    lengths = [_length(item) for item in items]
    (first, structure), leaves, sampled = flat[0], [], []
    for place, leaf in enumerate(first):
        column = [row[place] for row, spec in flat if spec == structure]
        many = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == lengths[0]
        if many:
            leaf = _concatenate(column, lengths)
        leaves.append(leaf)
        sampled.append(many)
    return Calibration(tuple(leaves), tuple(sampled), structure, batch_size)


def _concatenate(column: Sequence[Any], lengths: Sequence[int]) -> Tensor:
    fits = len(column) == len(lengths) and all(
        isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == length and leaf.shape[1:] == column[0].shape[1:]
        for leaf, length in zip(column, lengths, strict=True)
    )
    if not fits:
        what = "the calibration inputs differ in more than the number of samples"
        raise InputError(what, next_step="pad or crop them to one shape, with the same arguments in each")
    return torch.cat(list(column)).detach() if len(column) > 1 else column[0].detach()
