"""Calibration inputs in one form: all samples in memory, iterated in batches any number of times.

Users give a tensor (a batch of samples), a sequence of inputs (each a tensor, a tuple of arguments, or a dict by name),
a DataLoader, whose batches may have labels after the inputs, or the path of a file (see ``files``). Samples lie along
axis 0: a tensor holds samples if it is as long there as the input's first tensor. Everything else must be the same in
all inputs, and goes unchanged into each batch. If an ONNX model gives something else for two samples than for each, its
axis 0 may be time: then each input stays whole. A program that was exported for one batch size gets batches of exactly
that size. Masks among the inputs say which positions are padding; samples of nothing but padding are left out.
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

_LEAST = 48  # samples that ``affordable`` always keeps
_WORK = 2.0e11  # multiply-accumulates of one pass: 49 samples of a ResNet-50 at 224x224
_PASSES = 3
_SOME = 8  # samples that are run together and alone
_NEAR = 1e-4  # relative error: what one sample adds to another's outputs by rounding is far below it
_ALLOWED = f"a tensor, a sequence of inputs, a DataLoader, or the path of a file ({FILES})"


@dataclass(frozen=True, eq=False)
class Calibration:
    """Samples of model inputs; iterating yields batches ``(args, kwargs)`` of ``batch_size``, the last maybe smaller.

    ``leaves`` are the flat inputs, and ``structure`` nests them. Leaves that are ``sampled`` hold all samples along
    axis 0; the others are the same for each batch. If ``exact``, the model takes no other batch size, and no batch is
    smaller. ``masks`` are the masks that hide at least one position.
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
        """Return which positions of a batch are visible: (N, T) of bool for each length T with hidden positions."""
        leaves = pytree.tree_leaves(batch) if self.masks else ()
        return tuple(shown for shown in read_masks(self.masks, leaves) if not bool(shown.all()))

    def take(self, index: Tensor | slice) -> Calibration:
        """Return the samples at these indices, in this order."""
        rows = zip(self.leaves, self.sampled, strict=True)
        return replace(self, leaves=tuple(leaf[index] if many else leaf for leaf, many in rows))

    def affordable(self, macs: float, *, least: int = _LEAST) -> Calibration:
        """Return the first samples, as many as one pass affords at ``macs`` multiply-accumulates each.

        A pass affords about 2e11 of them, and always ``least`` samples. Batches stay whole if ``exact``. This bounds
        the time that a large network takes, however many samples there are.
        """
        wanted = int(max(least, _WORK / max(macs, 1.0)))
        if self.exact:
            wanted = max(wanted // self.batch_size, 1) * self.batch_size
        return self if wanted >= self.count else self.take(slice(wanted))

    def passes(self, macs: float) -> int:
        """Return how many passes over all samples, at ``macs`` each, fit into about 6e11 of them; at least 1."""
        return max(1, int(_PASSES * _WORK / max(macs * self.count, 1.0)))

    def split(self, held_out: float = 0.25, *, seed: int = 0) -> tuple[Calibration, Calibration]:
        """Return (fit, held out): a random share of the samples is held out, in whole batches if ``exact``.

        Raises:
            InputError: there are too few samples for two parts.
        """
        unit = self.batch_size if self.exact else 1
        # Example of 100 samples in exact batches of 16: a quarter is 1.56 batches, so that 32 are held out.
        aside = max(1, round(held_out * self.count / unit)) * unit
        if aside >= self.count:
            what = f"{self.count} calibration samples cannot be split into two parts"
            raise InputError(what, allowed=f"at least {2 * unit}", next_step="give more samples")
        # The seed makes the same split in each run, on any device.
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed), device="cpu")
        return self.take(order[aside:]), self.take(order[:aside])


def read_calibration(
    calibration: Any, model: Model, example_inputs: Any = None, *, limit: int = 512, batch_size: int = 32
) -> Calibration:
    """Return calibration inputs for a model: the first ``limit`` samples that were given.

    ``example_inputs`` say how many arguments the model takes where its own signature does not. A model that was
    exported for one batch size gets batches of that size, and the samples that do not fill a batch are left out.

    Raises:
        InputError: the inputs cannot be used, do not fit the model, or are too few for its batch size.
        FileError: a file cannot be read.
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
    if not found:
        raise InputError("there is no calibration input", allowed=_ALLOWED)
    names = leaf_names(signature.names, items[0])
    samples = _masked(_checked(_join(items, batch_size), names), names)
    samples = _on_device_of(model, samples.take(slice(min(limit, samples.count))))
    fixed = kind.fixed_batch(model)
    if fixed is None and (kind.brings_inputs() or kind.is_onnx):
        module = kind.runnable(model)
        fixed = _guarded_batch(module, kind.brought_inputs(model), samples)
        if fixed is None and kind.is_onnx and not _is_by_sample(module, samples):
            fixed = _one_length([_length(item) for item in items])
    return samples if fixed is None else _fill(samples, fixed)


def read_inputs(path: Path, model: Model | None) -> Inputs:
    """Return all inputs in a file as ``(args, kwargs)`` of one call of a model; keywords by name without a model.

    Raises:
        FileError: the file cannot be read, is too large, or does not fit the model.
    """
    if model is None:
        with open_arrays(path) as arrays:
            return (), {name: arrays.read(name) for name in arrays.forms}
    kind = kind_of(model)
    example = kind.brought_inputs(model) or ((), {})
    signature = kind.signature(model, example)
    return signature.arrange(read_file(path, signature, kind.declared_inputs(model, example, signature), limit=None))


def _checked(samples: Calibration, names: Sequence[str]) -> Calibration:
    """Return samples as they are; raise for one with a value that is not a number, which would spoil all sums."""
    for name, leaf, many in zip(names, samples.leaves, samples.sampled, strict=True):
        # a sum that is a number has only numbers in it; one of inf - inf is looked at again
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(leaf.sum().isnan()):
            bad = leaf.isnan().nonzero()
            if len(bad):
                where = f"in sample {int(bad[0, 0])} " if many else ""
                what = f"the calibration input {name} {where}has values that are not numbers (NaN)"
                raise InputError(what, next_step="leave such samples out, or fill in numbers")
    return samples


def _masked(samples: Calibration, names: Sequence[str]) -> Calibration:
    """Return the samples that have visible positions, with their masks."""
    held = zip(samples.leaves, samples.sampled, strict=True)
    masks = find_masks(names, [leaf if many else None for leaf, many in held])
    if not masks:
        return samples
    # A sample is kept if each of the masks shows at least one of its positions.
    shown = torch.stack([mask.any(1) for mask in read_masks(masks, samples.leaves)]).all(0)
    if not bool(shown.any()):
        what = f"{names[masks[0].place]} hides all positions of all {samples.count} calibration samples"
        raise InputError(what, allowed="masks with ones where there are tokens")
    return replace(samples if bool(shown.all()) else samples.take(shown), masks=masks)


def _on_device_of(model: Model, samples: Calibration) -> Calibration:
    """Return the samples on the device of the model."""
    weights = kind_of(model).tensors(model)
    device = next((weight.device for weight in weights.values()), torch.device("cpu"))
    leaves = (leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in samples.leaves)
    return replace(samples, leaves=tuple(leaves))


def _guarded_batch(module: nn.Module, example: Inputs | None, samples: Calibration) -> int | None:
    """Return the batch size of the example that a model brings if it refuses others, although its batch is dynamic.

    torch.export adds a guard where the choice of a kernel depends on the batch size, as for some convolutions. In ONNX
    files a Reshape may say the batch size that the exporter saw.
    """
    # The sizes that will occur: full batches, and a smaller last one.
    sizes = {samples.batch_size, samples.count % samples.batch_size or samples.batch_size}
    if example is None or all(_takes(module, samples, size) for size in sizes):
        return None
    return _length(example)


def _takes(module: nn.Module, samples: Calibration, size: int) -> bool:
    args, kwargs = next(iter(replace(samples, batch_size=size)))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's warnings about its own code
            module(*args, **kwargs)
    except Exception:  # a model may raise anything on inputs that do not fit
        return False
    return True


def _is_by_sample(module: nn.Module, samples: Calibration) -> bool:
    """Whether a model gives for some samples what it gives for each: its first axis counts samples, and not time."""
    few = samples.take(slice(_SOME))
    if few.count < 2 or not all(_takes(module, few, size) for size in (few.count, 1)):
        return True  # how many samples it takes is another question
    together = _floats(module, next(iter(replace(few, batch_size=few.count))))
    apart = [_floats(module, each) for each in replace(few, batch_size=1)]
    for both, rows in zip(together, zip(*apart, strict=True), strict=True):
        if both.dim() and all(row.dim() and len(row) * few.count == len(both) for row in rows):
            wanted = torch.cat(rows)
            # the last place of 1 as well, which some kernels of onnxruntime leave open
            allowed = _NEAR * wanted.norm() + torch.finfo(wanted.dtype).eps * wanted.numel() ** 0.5
            if not (both - wanted).norm() <= allowed:
                return False
    return True


def _floats(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    args, kwargs = inputs
    with torch.no_grad():
        found = pytree.tree_leaves(module(*args, **kwargs))
    return [leaf for leaf in found if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _one_length(lengths: Sequence[int]) -> int:
    """Return the length of all inputs, each of which has to stay whole."""
    if len(set(lengths)) > 1:
        what = f"the first axis of the inputs counts no samples, and has lengths of {min(lengths)} to {max(lengths)}"
        raise InputError(what, next_step="pad or crop the calibration inputs to one length")
    return lengths[0]


def _fill(samples: Calibration, size: int) -> Calibration:
    whole = samples.count // size * size
    if not whole:
        what = f"the program was exported for batches of {size}, but there are {samples.count} calibration samples"
        raise InputError(what, allowed=f"at least {size}", next_step="give more, or export with a dynamic batch size")
    return replace(samples.take(slice(whole)), batch_size=size, exact=True)


def _items(calibration: Any) -> Iterable[Any]:
    """Return what was given as a sequence of inputs, each of one or more samples."""
    if isinstance(calibration, Tensor | np.ndarray | Mapping):
        return [calibration]
    if isinstance(calibration, Iterable):
        return calibration
    raise InputError(f"calibration inputs have the type {type(calibration).__name__}", allowed=_ALLOWED)


def _length(inputs: Inputs) -> int:
    """Return the number of samples in one input: the length of its first tensor."""
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    raise InputError("a calibration input has no tensor with samples along its first axis", allowed=_ALLOWED)


def samples_in(model: Model, inputs: Inputs) -> int:
    """Return the number of samples in a program's own example inputs, else in ``inputs``; 1 where there are none."""
    kind = kind_of(model)
    given = kind.brought_inputs(model) if kind.brings_inputs() else inputs
    return next((len(leaf) for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def _join(items: Sequence[Inputs], batch_size: int) -> Calibration:
    """Return the samples of all inputs, one after another.

    Raises:
        InputError: the inputs differ in more than the number of samples.
    """
    # One column a leaf: an input whose structure differs from the first is missing in it, and `_concatenate` sees that.
    flat = [pytree.tree_flatten(item) for item in items]
    lengths = [_length(item) for item in items]
    (first, structure), leaves, sampled = flat[0], [], []
    for place, leaf in enumerate(first):
        column = [row[place] for row, spec in flat if spec == structure]
        many = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == lengths[0]
        if many:
            leaf = _concatenate(column, lengths)
        elif not all(_is_same(leaf, other) for other in column):
            what = "the calibration inputs differ in more than samples along the first axis"
            raise InputError(what, next_step="give the same value, such as the same first state, with all samples")
        leaves.append(leaf)
        sampled.append(many)
    return Calibration(tuple(leaves), tuple(sampled), structure, batch_size)


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _concatenate(column: Sequence[Any], lengths: Sequence[int]) -> Tensor:
    fits = len(column) == len(lengths) and all(
        isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == length and leaf.shape[1:] == column[0].shape[1:]
        for leaf, length in zip(column, lengths, strict=True)
    )
    if not fits:
        what = "the calibration inputs differ in more than the number of samples"
        raise InputError(what, next_step="pad or crop them to one shape, with the same arguments in each")
    return torch.cat(list(column)).detach() if len(column) > 1 else column[0].detach()
