"""Arrays in .npz and .npy files: any that NumPy writes come back as they are, and any other file is one line."""

from __future__ import annotations

import contextlib
import io
import struct
import tempfile
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.errors import FileError
from surgery.system.arrays import open_arrays

DTYPES = ["?", "u1", "<u2", ">u2", "<u4", "<u8", "i1", ">i2", "<i4", ">i8", "<f2", ">f4", "<f8", "<c8", ">c16"]
SHAPES = [(), (0,), (5,), (4, 3), (2, 3, 4), (3, 0, 2)]


def read(path: Path, *, most: int = 1 << 20, **options: Any) -> dict[str, torch.Tensor]:
    with open_arrays(path, most=most) as arrays:
        return {name: arrays.read(name, **options) for name in arrays.forms}


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_numpy_writes_comes_back(dtype: str, order: Any, tmp_path: Path) -> None:
    made = [np.asarray(np.arange(int(np.prod(s))).reshape(s) % 5, order=order).astype(dtype, order="K") for s in SHAPES]
    path = tmp_path / "x.npz"
    for write in (np.savez, np.savez_compressed):
        write(path, *made)
        found = read(path)
        with open_arrays(path) as arrays:
            assert {n: (t.shape, t.dtype) for n, t in arrays.forms.items()} == {
                n: (t.shape, t.dtype) for n, t in found.items()
            }
        for rows in (None, 0, 2, 99):
            for one, array in zip(read(path, rows=rows).values(), made, strict=True):
                assert one.is_contiguous()
                assert np.array_equal(one.numpy(), array[:rows] if array.shape else array)
    for array in made:
        np.save(tmp_path / "y.npy", array)
        assert np.array_equal(read(tmp_path / "y.npy")["y"].numpy(), array)


def npy(header: str | dict[str, Any], data: bytes = bytes(64), *, version: int = 1) -> bytes:
    text = (header if isinstance(header, str) else repr(header)).ljust(117) + "\n"
    length = struct.pack("<H" if version == 1 else "<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + length + text.encode() + data


def npz(data: bytes, name: str = "x.npy", *, method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), data, method)
    return stream.getvalue()


def header(**changed: Any) -> dict[str, Any]:
    return {"descr": "<f4", "fortran_order": False, "shape": (2, 8), **changed}


GOOD = npz(npy(header()))
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "text": (b"hello", "it is neither of the two"),
    "a pickle": (b"\x80\x04N.", "it is neither of the two"),
    "start of a zip": (b"PK\3\4", "cannot be read"),
    "cut off": (GOOD[:-30], "cannot be read"),
    "another checksum": (GOOD.replace(bytes(64), b"\1" * 64), "x: cannot be read: Bad CRC-32"),
    "magic alone": (b"\x93NUMPY", "cannot be read"),
    "version 9": (npz(npy(header(), version=9)), "its format has the version 9"),
    "no Python": (npz(npy("{'descr': ((('<f4'")), "x: cannot be read"),
    "deep": (npz(npy("(" * 5000)), "x: cannot be read"),
    "long header": (npz(npy("'" + "x" * 60_000 + "'")), "x: cannot be read"),
    "strange escape": (npz(npy(r"{'\d': 1}")), "x: cannot be read"),
    "no header": (npz(b"\x93NUMPY\1\0"), "x: cannot be read"),
    "no array": (npz(b"hello", "readme.txt"), "readme.txt: cannot be read"),
    "a call": (npz(npy("{'descr': exec('1/0'), 'fortran_order': False, 'shape': ()}")), "x: cannot be read"),
    "objects": (npz(npy(header(descr="|O"))), "x holds object, not numbers"),
    "dates": (npz(npy(header(descr="<M8[s]"))), r"x holds datetime64\[s\], not numbers"),
    "texts": (npz(npy(header(descr="<U4"))), "x holds <U4, not numbers"),
    "fields": (npz(npy(header(descr=[("a\x1b[2J", "<f4")]))), r"x holds \[\('a\\+x1b"),
    "wide floats": (npz(npy(header(descr="<f16"))), "x holds float128, not numbers"),
    "many numbers": (npz(npy(header(shape=(10**12,)))), "it should take 4000000000000 bytes, and takes 64"),
    "past all sizes": (npz(npy(header(shape=(10**30, 0)))), r"it has the shape \(1000"),
    "negative": (npz(npy(header(shape=(-2, -8)))), r"it has the shape \(-2, -8\)"),
    "axes": (npz(npy(header(shape=(1,) * 65), bytes(4))), r"it has the shape"),
    "too few": (npz(npy(header(), bytes(60))), "it should take 64 bytes, and takes 60"),
    "too many": (npz(npy(header(), bytes(99))), "it should take 64 bytes, and takes 99"),
    "unsigned": (npz(npy(header(descr="<u8", shape=(1,)), b"\xff" * 8)), "x holds 18446744073709551615"),
    "packed otherwise": (npz(npy(header()), method=zipfile.ZIP_BZIP2), "x is packed in a way of its own"),
    "encrypted": (
        GOOD.replace(b"PK\1\2\x14\3\x14\0\0\0", b"PK\1\2\x14\3\x14\0\1\0"),
        "x is packed in a way of its own",
    ),
    "a name to steer by": (npz(npy(header(shape=(9,))), "a\x1b[2J.npy"), r"a\\x1b\[2J: cannot be read"),
    "large": (
        npz(npy(header(shape=(1 << 19,)), bytes(1 << 21)), method=zipfile.ZIP_DEFLATED),
        "2097152 bytes would be",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_one_line(case: str, tmp_path: Path) -> None:
    raw, message = BAD[case]
    path = tmp_path / "data.npz"
    path.write_bytes(raw)
    with pytest.raises(FileError, match=f"data.npz: .*{message}") as caught:
        read(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


def test_two_arrays_of_one_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x.npy", npy(header()))
        archive.writestr("x", npy(header()))
    with pytest.raises(FileError, match="x is there twice"):
        read(tmp_path / "x.npz")


def test_what_is_refused_was_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(npz(npy(header(shape=(1 << 23,)), bytes(1 << 25)), method=zipfile.ZIP_DEFLATED))
    tracemalloc.start()
    with pytest.raises(FileError, match="allowed: 1048576 for all arrays; give fewer samples"):
        read(path)
    part = read(path, rows=100)
    assert part["x"].shape == (100,)
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


def test_all_arrays_together_are_bounded(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", *[np.zeros(100)] * 3)
    assert len(read(tmp_path / "x.npz", most=2400)) == 3
    with pytest.raises(FileError, match="arr_2 has the shape"):
        read(tmp_path / "x.npz", most=2399)
    with pytest.raises(FileError, match="arr_1 has the shape"):
        read(tmp_path / "x.npz", most=2400, dtype=torch.complex128)


@given(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8), st.booleans())
def test_any_damage_is_one_line_or_none(at: int, piece: bytes, cut: bool) -> None:
    with tempfile.NamedTemporaryFile(suffix=".npz") as file:
        file.write(GOOD[:at] if cut else GOOD[:at] + piece + GOOD[at + len(piece) :])
        file.flush()
        with contextlib.suppress(FileError):
            read(Path(file.name))
