"""Files of calibration inputs: arrays by input name (.npz, .pt), and token ids as JSON lines (.jsonl, see ``tokens``).

What a file holds is fitted to what is known of the model's inputs: whole numbers are cast to whole numbers and floats
to floats. What does not fit is one error that names the file and the input. Nothing is unpickled.
"""

from __future__ import annotations

import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from surgery.calibration.masks import is_mask_name
from surgery.calibration.signature import Declared, Signature
from surgery.calibration.tokens import is_label, partner_of, read_tokens, shown
from surgery.errors import FileError
from surgery.text import first_line

__all__ = ["FILES", "read_file"]

FILES = ".npz, .pt or .jsonl"
_ARRAYS = ".npz or .pt files of tensors alone, or .jsonl files of token ids"
_BROKEN = (
    OSError,
    ValueError,
    EOFError,
    KeyError,
    RuntimeError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
)


def read_file(path: Path, signature: Signature, declared: Mapping[str, Declared], *, limit: int) -> Any:
    """Return the inputs in a file: tensors by name that fit the model, or what else a .pt file holds.

    Of a .jsonl file at most ``limit`` lines are read.

    Raises:
        FileError: a file that cannot be read, or does not fit the model.
    """
    if path.suffix == ".jsonl":
        return _fit(path, read_tokens(path, signature, declared, limit=limit), signature, declared)
    try:
        found = _read_npz(path) if path.suffix == ".npz" else torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        raise FileError(f"{path}: cannot be read: {first_line(error)}", allowed=_ARRAYS) from error
    return _fit(path, found, signature, declared) if _by_name(found) else found


def _read_npz(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:  # which NumPy leaves open where it fails
        arrays = np.load(file, allow_pickle=False)
        if not isinstance(arrays, np.lib.npyio.NpzFile):
            raise ValueError("it is no .npz file")
        return {name: _tensor(name, arrays[name]) for name in arrays.files}


def _tensor(name: str, array: npt.NDArray[Any]) -> Tensor:
    if array.dtype.kind not in "biufc":
        raise ValueError(f"{shown(name)} holds {array.dtype}, no numbers")
    wide = np.dtype(np.int64) if array.dtype.kind == "u" and array.dtype.itemsize > 1 else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.ascontiguousarray(array.astype(wide, copy=False)).reshape(array.shape))


def _by_name(found: Any) -> bool:
    return isinstance(found, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in found.items())


def _fit(
    path: Path, found: Mapping[str, Tensor], signature: Signature, declared: Mapping[str, Declared]
) -> dict[str, Tensor]:
    """Return the tensors in the model's types; those of one array for one input under the input's name."""
    names = signature.names
    if len(found) == len(signature.required) == 1 and not set(found) & set(names) and not signature.open_ended:
        found = dict(zip(signature.required, found.values(), strict=True))
    for name in found:
        if name not in names and not signature.open_ended and not is_label(name):
            what = f"{path}: the model has no input {shown(name)}"
            raise FileError(what, allowed=", ".join(names), next_step="rename it, or leave it out")
    fitted = {name: _cast(path, name, value, declared.get(name)) for name, value in found.items()}
    _check_lengths(path, {name: value for name, value in fitted.items() if name in names}, declared)
    return fitted


def _cast(path: Path, name: str, value: Tensor, known: Declared | None) -> Tensor:
    if known is None:
        return value
    where = f"{path}: {shown(name)}"
    shape = f"({', '.join(['samples', *('any' if size is None else str(size) for size in known.sizes[1:])])})"
    pairs = zip(known.sizes[1:], value.shape[1:], strict=False)
    if value.dim() != len(known.sizes) or any(size not in (None, got) for size, got in pairs):
        what = f"{where} has the shape {tuple(value.shape)}"
        raise FileError(what, allowed=shape if known.sizes else "one number")
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
    """Whether numbers stay what they are: whole ones whole; zeros and ones of a mask may be of any type."""
    if value.dtype == dtype or (value.is_floating_point() and dtype.is_floating_point):
        return True
    whole = not value.is_floating_point() and not value.is_complex()
    if whole and not dtype.is_floating_point and not dtype.is_complex and dtype != torch.bool:
        return True
    return (mask or (whole and dtype == torch.bool)) and bool(((value == 0) | (value == 1)).all())


def _check_lengths(path: Path, found: Mapping[str, Tensor], declared: Mapping[str, Declared]) -> None:
    """Raise FileError where inputs have different numbers of samples, or a mask has another length than its ids."""
    if not found:
        return
    first, *rest = found
    for name in [first, *rest]:
        ours, theirs = found[first], found[name]
        if first in declared and name in declared:
            same = declared[first].shape[:1] == declared[name].shape[:1]
        else:
            same = ours.dim() > 1 and theirs.dim() > 1
        if same and len(ours) != len(theirs):
            raise FileError(
                f"{path}: {first} has {len(ours)} samples, {name} has {len(theirs)}", allowed="as many of each"
            )
        if same and not len(theirs):
            raise FileError(f"{path}: {name} has no samples", next_step="give some, a few hundred do")
        other = found.get(partner_of(name, first))
        if (
            is_mask_name(name)
            and other is not None
            and theirs.dim() == 2 <= other.dim()
            and (not other.is_floating_point() and other.shape != theirs.shape)
        ):
            shapes = f"{partner_of(name, first)} {tuple(other.shape)}, {name} {tuple(theirs.shape)}"
            raise FileError(f"{path}: shapes differ: {shapes}", allowed="one mark for each token")
