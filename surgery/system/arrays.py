"""Arrays of numbers in .npz and .npy files, as tensors: the headers are read first, and then only what is wanted.

A header says how many bytes an array takes, so that an array that is too large is refused before any of it is read or
unpacked. Nothing is unpickled: NumPy only reads the headers.
"""

from __future__ import annotations

import contextlib
import encodings.cp437  # noqa: F401  # of names in zip files: nothing is imported while a file is read
import io
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.format import read_array_header_1_0, read_array_header_2_0, read_magic
from torch import Tensor

from surgery.errors import FileError
from surgery.system.opening import open_regular, shown_name, shown_path
from surgery.text import cut, first_line, shown

__all__ = ["MOST_BYTES", "ArrayFile", "open_arrays", "size_of"]

MOST_BYTES = 1 << 30  # of all arrays that are read of one file

_ZIP, _NPY = b"PK", b"\x93NUMPY"
_PACKED = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
_ENCRYPTED = 1  # a flag of an entry
_LONGEST_HEADER = 10_012  # what NumPy reads of its own, with what stands in front
_LONGEST = 2**63 - 1
_MOST_AXES = 64  # NumPy's
_CHUNK = 1 << 20
_ALLOWED = ".npz and .npy files of numbers"
_NUMBERS = "booleans, whole numbers, floats and complex numbers of up to 8 bytes a part"
_WRITE = "write it with numpy.savez"
# kind and bytes of a number in a file -> its type as a tensor
_DTYPES: dict[str, torch.dtype] = {
    "b1": torch.bool,
    "u1": torch.uint8,
    "u2": torch.int64,  # PyTorch does next to nothing with wider unsigned numbers
    "u4": torch.int64,
    "u8": torch.int64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
}


@dataclass(frozen=True)
class _Array:
    """One array in a file: what its header says, and how to read what follows its ``start`` bytes."""

    where: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    by_columns: bool
    start: int
    open: Callable[[], contextlib.AbstractContextManager[IO[bytes]]]

    def form(self) -> Tensor:
        """Return a tensor of its shape and type, without numbers."""
        return torch.empty(self.shape, dtype=_DTYPES[_code(self.dtype)], device="meta")


class ArrayFile:
    """The arrays of one file. ``forms`` are tensors without numbers (on ``meta``), by name; ``read`` gives the numbers.

    A .npy file has one array, whose name is that of the file.
    """

    def __init__(self, arrays: dict[str, _Array], most: int) -> None:
        self._arrays, self._most, self._left = arrays, most, most
        self.forms = {name: array.form() for name, array in arrays.items()}

    def read(self, name: str, *, rows: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return an array, or only its first ``rows`` along axis 0. ``dtype`` is what the caller will keep it in.

        Raises:
            FileError: the array is damaged, or all arrays together would take more bytes than allowed.
        """
        array, whole = self._arrays[name], self.forms[name]
        part = whole[:rows] if whole.dim() else whole
        needed = whole if array.by_columns else part  # by columns, the first rows are spread over all of it
        self._take(array, size_of(needed, dtype))
        with _told(array.where):
            numbers = _native(array, _read(array, needed.numel()))
            if array.by_columns:
                # By columns, a 3 x 2 array is a b c | d e f in the file: as 2 x 3 transposed it
                # has the rows ad, be, cf.
                numbers = numbers.reshape(array.shape[::-1]).T[: len(part)]
            return torch.from_numpy(np.ascontiguousarray(numbers)).reshape(part.shape)

    def _take(self, array: _Array, size: int) -> None:
        if size > self._left:
            what = f"{array.where} has the shape {shown_name(str(array.shape))}: {size} bytes would be read"
            raise FileError(what, allowed=f"{self._most} for all arrays", next_step="give fewer samples")
        self._left -= size


def size_of(form: Tensor, dtype: torch.dtype | None = None) -> int:
    """Return the bytes that a tensor takes, in its own or in another dtype, whichever is wider."""
    return form.numel() * max(form.itemsize, dtype.itemsize if dtype else 0)


@contextlib.contextmanager
def open_arrays(path: Path, *, most: int = MOST_BYTES) -> Iterator[ArrayFile]:
    """Open a file of arrays, recognised by its content; no more than ``most`` bytes of numbers will be read from it.

    Raises:
        FileError: the file is not a regular one, is not a file of arrays, or holds something other than numbers.
    """
    with contextlib.ExitStack() as opened:
        file = opened.enter_context(open_regular(path))
        with _told(shown_path(path)):
            start = file.read(len(_NPY))
            if start.startswith(_ZIP):
                arrays = _find(path, opened.enter_context(zipfile.ZipFile(file)))
            elif start == _NPY:
                size = os.fstat(file.fileno()).st_size
                arrays = {path.stem: _read_header(shown_path(path), size, partial(_again, file))}
            else:
                raise ValueError("it is neither of the two" if start else "it is empty")
            found = ArrayFile(arrays, most)
        yield found


@contextlib.contextmanager
def _told(where: str) -> Iterator[None]:
    """Let nothing but FileError out."""
    try:
        yield
    except FileError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy raise whatever they meet
        reason = cut(shown(first_line(error)), 160)
        raise FileError(f"{where}: cannot be read: {reason}", allowed=_ALLOWED, next_step=_WRITE) from error


@contextlib.contextmanager
def _again(file: BinaryIO) -> Iterator[BinaryIO]:
    """Give an open file from its start, and leave it open."""
    file.seek(0)
    yield file


def _find(path: Path, archive: zipfile.ZipFile) -> dict[str, _Array]:
    found: dict[str, _Array] = {}
    for entry in archive.infolist():
        name = entry.filename.removesuffix(".npy")
        where = f"{shown_path(path)}: {shown_name(name)}"
        if name in found:
            raise FileError(f"{where} is there twice", next_step=_WRITE)
        if entry.compress_type not in _PACKED or entry.flag_bits & _ENCRYPTED:
            raise FileError(f"{where} is packed in a way of its own", allowed=_ALLOWED, next_step=_WRITE)
        with _told(where):
            found[name] = _read_header(where, entry.file_size, partial(archive.open, entry))
    return found


def _read_header(where: str, size: int, opening: Callable[[], contextlib.AbstractContextManager[IO[bytes]]]) -> _Array:
    """Return what a header says; raises ValueError unless header and numbers take ``size`` bytes in all."""
    with opening() as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Python about texts in it, and of NumPy about those that Python 2 wrote
        head = io.BytesIO(file.read(_LONGEST_HEADER))
        version = read_magic(head)[0]
        if version not in (1, 2, 3):
            raise ValueError(f"its format has the version {version}")
        read = read_array_header_1_0 if version == 1 else read_array_header_2_0  # 3 is 2, but for names of fields
        shape, by_columns, dtype = read(head)
    if _code(dtype) not in _DTYPES:
        raise FileError(f"{where} holds {shown_name(str(dtype))}, not numbers", allowed=_NUMBERS, next_step=_WRITE)
    taken = math.prod(shape) * dtype.itemsize
    if any(length < 0 or length > _LONGEST for length in shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"it has the shape {shown_name(str(shape))}")
    # The file must have exactly the bytes that the header promises: a few bytes that claim a huge shape are refused
    # before memory is taken for it.
    if head.tell() + taken != size:
        raise ValueError(f"it should take {taken} bytes, and takes {size - head.tell()}")
    return _Array(where, tuple(map(int, shape)), dtype, by_columns and len(shape) > 1, head.tell(), opening)


def _code(dtype: np.dtype[Any]) -> str:
    return f"{dtype.kind}{dtype.itemsize}"


def _read(array: _Array, count: int) -> npt.NDArray[Any]:
    """Return the first ``count`` numbers as they are in the file."""
    numbers = np.empty(count, array.dtype)
    room, done = numbers.view(np.uint8).data, 0
    with array.open() as file:
        file.read(array.start)
        while done < len(room):
            piece = file.read(min(_CHUNK, len(room) - done))
            if not piece:
                raise ValueError("it is cut off")
            room[done : done + len(piece)] = piece
            done += len(piece)
        if count == math.prod(array.shape):
            file.read(1)  # a checksum is tested where the end is met
    return numbers


def _native(array: _Array, numbers: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return numbers in the byte order of this machine and in a type that PyTorch has."""
    kind, itemsize = numbers.dtype.kind, numbers.dtype.itemsize
    if kind == "b":
        return numbers.view(np.uint8) != 0
    if kind == "u" and itemsize > 1:
        if numbers.size and (largest := int(numbers.max())) > _LONGEST:
            raise FileError(f"{array.where} holds {largest}", allowed=f"whole numbers up to {_LONGEST}")
        return numbers.astype(np.int64)
    return numbers.astype(numbers.dtype.newbyteorder("="), copy=False)
