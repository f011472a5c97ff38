"""Files of inputs: arrays by input name (.npz, .npy, .pt), and token ids as JSON lines (.jsonl, see ``tokens``).

The arrays are cast to the dtypes of the model's inputs: whole numbers to whole numbers and floats to floats. An array
that does not fit is one error that names the file and the input. For .npz and .npy files, the headers are checked
before any numbers are read, and only the samples that will be used are read. Nothing is unpickled.
"""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.data.masks import is_mask_name
from surgery.data.tokens import is_label, partner_of, read_tokens
from surgery.errors import FileError
from surgery.kinds.inputs import Declared, Signature
from surgery.system.arrays import MOST_BYTES, open_arrays, size_of
from surgery.system.opening import open_regular, shown_name, shown_path
from surgery.text import first_line

__all__ = ["FILES", "read_file"]

FILES = ".npz, .npy, .pt or .jsonl"
_TENSORS = ".npz, .npy or .pt files of tensors alone, or .jsonl files of token ids"


def read_file(
    path: Path, signature: Signature, declared: Mapping[str, Declared], *, limit: int | None, most: int = MOST_BYTES
) -> Any:
    """Return the inputs in a file: tensors by name that fit the model, or whatever else a .pt file holds.

    At most ``limit`` samples of arrays and token ids are read, and of arrays at most ``most`` bytes. Without a limit,
    all samples are read, and more than ``most`` bytes are an error.

    Raises:
        FileError: the file cannot be read, or does not fit the model.
    """
    if path.suffix == ".jsonl":
        return _fit(path, read_tokens(path, signature, declared, limit=limit), signature, declared)
    if path.suffix not in (".npz", ".npy"):
        found = _read_tensors(path, most)
        return _fit(path, found, signature, declared) if _by_name(found) else found
    with open_arrays(path, most=most) as arrays:
        forms = _named(arrays.forms, signature)
        _check(path, forms, signature, declared)
        places = dict(zip(forms, arrays.forms, strict=True))
        names = [name for name in (forms if signature.open_ended else signature.names) if name in forms]
        rows = _rows({name: forms[name] for name in names}, declared, limit, most)
        read = {name: arrays.read(places[name], rows=rows[name], dtype=_dtype(declared, name)) for name in names}
    return _fit(path, read, signature, declared)


def _dtype(declared: Mapping[str, Declared], name: str) -> torch.dtype | None:
    return declared[name].dtype if name in declared else None


def _rows(
    forms: Mapping[str, Tensor], declared: Mapping[str, Declared], limit: int | None, most: int
) -> dict[str, int | None]:
    """Return how many rows to read of each input, None for all rows: at most ``limit`` samples, and ``most`` bytes.

    The length of the first input that has an axis is the number of samples, as in ``samples``.
    """
    lengths = {name: len(form) for name, form in forms.items() if form.dim()}
    count = next(iter(lengths.values()), 0)
    rows: dict[str, int | None] = dict.fromkeys(forms)
    if limit is None or not count:
        return rows
    sampled = [name for name, length in lengths.items() if length == count]
    sizes = {name: size_of(form, _dtype(declared, name)) for name, form in forms.items()}
    # Each sample takes ``each`` bytes, and inputs without samples take ``rest`` bytes whatever the number of samples.
    each = sum(sizes[name] for name in sampled) // count
    rest = sum(sizes.values()) - each * count
    wanted = min(limit, count, max((most - rest) // max(each, 1), 1))
    while wanted in set(lengths.values()) - {count}:
        wanted -= 1  # else an input of this length that holds no samples would be taken for samples
    return rows | dict.fromkeys(sampled, wanted)


def _read_tensors(path: Path, most: int) -> Any:
    """Return what a file of ``torch.save`` holds; only tensors in plain containers are unpickled."""
    with open_regular(path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of old formats
        try:
            _check_stored(file)
            found = torch.load(file, map_location="cpu", weights_only=True)
            leaves = [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]
        except pickle.UnpicklingError as error:  # torch's words suggest to load it without a check
            what = f"{shown_path(path)}: is not a file of tensors alone"
            raise FileError(what, allowed=_TENSORS) from error
        except Exception as error:  # torch and zipfile raise errors of many types
            what = f"{shown_path(path)}: cannot be read: {first_line(error)}"
            raise FileError(what, allowed=_TENSORS) from error
    for leaf in leaves:
        if leaf.layout != torch.strided or leaf.device.type != "cpu" or leaf.is_quantized or leaf.is_nested:
            raise FileError(f"{shown_path(path)}: holds a tensor that is not plain", allowed="dense tensors of numbers")
        # A view of stride 0 can make a few stored numbers look like terabytes, which the first copy would ask for.
        if leaf.nbytes > max(most, leaf.untyped_storage().nbytes()):
            what = f"{shown_path(path)}: expands a tensor to {leaf.nbytes} bytes by repeating its numbers"
            raise FileError(what, allowed=f"{most}", next_step="give fewer samples")
    return found


def _check_stored(file: BinaryIO) -> None:
    """Raise if a zip file has compressed entries, which may be far larger than the file; torch writes none."""
    if file.read(2) == b"PK":
        with zipfile.ZipFile(file) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("its entries are compressed, which torch.save does not do")
    file.seek(0)


def _by_name(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())


def _named(found: Mapping[str, Tensor], signature: Signature) -> Mapping[str, Tensor]:
    """Return the arrays by input name: a single array for a single input gets that input's name."""
    other = not set(found) & set(signature.names) and not signature.open_ended
    if len(found) == len(signature.required) == 1 and other:
        return dict(zip(signature.required, found.values(), strict=True))
    return found


def _check(path: Path, found: Mapping[str, Tensor], signature: Signature, declared: Mapping[str, Declared]) -> None:
    """Raise FileError if names, shapes or numbers of samples do not fit."""
    names = signature.names
    for name in found:
        if name not in names and not signature.open_ended and not is_label(name):
            what = f"{shown_path(path)}: the model has no input {shown_name(name)}"
            raise FileError(what, allowed=", ".join(names), next_step="rename it, or leave it out")
    for name, value in found.items():
        _check_shape(path, name, value, declared.get(name))
    _check_lengths(path, {name: value for name, value in found.items() if name in names}, declared)


def _check_shape(path: Path, name: str, value: Tensor, known: Declared | None) -> None:
    if known is None:
        return
    pairs = zip(known.sizes[1:], value.shape[1:], strict=False)
    if value.dim() != len(known.sizes) or any(size not in (None, got) for size, got in pairs):
        shape = f"({', '.join(['samples', *('any' if size is None else str(size) for size in known.sizes[1:])])})"
        what = f"{shown_path(path)}: {shown_name(name)} has the shape {tuple(value.shape)}"
        raise FileError(what, allowed=shape if known.sizes else "one number")


def _fit(
    path: Path, found: Mapping[str, Tensor], signature: Signature, declared: Mapping[str, Declared]
) -> dict[str, Tensor]:
    """Return the tensors by input name, in the dtypes of the model's inputs."""
    named = _named(found, signature)
    _check(path, named, signature, declared)
    return {name: _cast(path, name, value, declared.get(name)) for name, value in named.items()}


def _cast(path: Path, name: str, value: Tensor, known: Declared | None) -> Tensor:
    if known is None:
        return value
    where = f"{shown_path(path)}: {shown_name(name)}"
    if not _castable(value, known.dtype, mask=is_mask_name(name)):
        kind, wanted = (str(dtype).removeprefix("torch.") for dtype in (value.dtype, known.dtype))
        next_step = "convert it" + (", as a tokenizer gives ids" if not known.dtype.is_floating_point else "")
        raise FileError(f"{where} holds {kind}", allowed=f"{wanted}, which the model takes", next_step=next_step)
    if known.ids is not None and value.numel():
        low, high = int(value.min()), int(value.max())
        if low < 0 or high >= known.ids:
            allowed = f"0 to {known.ids - 1}, which the model knows"
            raise FileError(f"{where} holds {low if low < 0 else high}", allowed=allowed, next_step="use its tokenizer")
    return value.to(known.dtype)


def _castable(value: Tensor, dtype: torch.dtype, *, mask: bool) -> bool:
    """Whether a cast keeps the numbers: whole numbers stay whole; the zeros and ones of a mask may have any dtype."""
    if value.dtype == dtype or (value.is_floating_point() and dtype.is_floating_point):
        return True
    whole = not value.is_floating_point() and not value.is_complex()
    if whole and not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool:
        return True
    return (mask or (whole and dtype == torch.bool)) and bool(((value == 0) | (value == 1)).all())


def _check_lengths(path: Path, found: Mapping[str, Tensor], declared: Mapping[str, Declared]) -> None:
    """Raise FileError if inputs differ in their number of samples, or a mask has another shape than its ids."""
    if not found:
        return
    first, *rest = found
    for name in [first, *rest]:
        ours, theirs = found[first], found[name]
        # Both hold samples if they are equally long along axis 0 in the model's example inputs; without examples, if
        # both have more than one axis.
        if first in declared and name in declared:
            same = declared[first].shape[:1] == declared[name].shape[:1]
        else:
            same = ours.dim() > 1 and theirs.dim() > 1
        if same and len(ours) != len(theirs):
            raise FileError(
                f"{path}: {first} has {len(ours)} samples, {name} has {len(theirs)}", allowed="equal numbers"
            )
        if same and not len(theirs):
            raise FileError(f"{path}: {name} has no samples", next_step="give some; a few hundred are enough")
        other = found.get(partner_of(name, first))
        if (
            is_mask_name(name)
            and other is not None
            and theirs.dim() == 2 <= other.dim()
            and (not other.is_floating_point() and other.shape != theirs.shape)
        ):
            shapes = f"{partner_of(name, first)} {tuple(other.shape)}, {name} {tuple(theirs.shape)}"
            raise FileError(f"{path}: shapes differ: {shapes}", allowed="one mark for each token")
