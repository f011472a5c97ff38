"""Read and write protobuf messages piece by piece, so that large fields are never held twice.

A field is a tag (its number and how it is written), then a value. A message inside of a message is a field of bytes:

    tag of field 7, 12 bytes: ( tag of field 5, 10 bytes: ( tag of field 9, 8 bytes: .. ) )
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["TAKEN", "Array", "Fields", "Hollow", "header", "in_memory"]

Fields: TypeAlias = Mapping[int, Any]  # the fields of a message that are messages with fields of interest, or TAKEN
TAKEN = "taken"
Array: TypeAlias = npt.NDArray[np.uint8]

_LEAST = 4096  # bytes of a field that is taken out; what is smaller is not looked into
_DEEPEST = 100  # as protobuf's own readers
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def _varint(value: int) -> bytes:
    # Seven bits a byte, the lowest first; the top bit says that more follow. Example: 300 = 2 * 128 + 44 is AC
    # 02, where AC is 44 + 128.
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def header(number: int, size: int) -> bytes:
    """Return what stands before a field of ``size`` bytes."""
    # The low three bits of a tag are the form. Example: field 9 of 8 bytes begins with 4A 08, as 9 * 8 + 2 = 0x4A.
    return _varint(number << 3 | _BYTES) + _varint(size)


def in_memory(size: int) -> Array:
    """Return new memory."""
    return np.empty(size, np.uint8)


class Hollow:
    """The bytes of a message without its large fields, which are ``taken``: each an array with memory of its own.

    ``refer`` returns the fields that stand for a taken one, from its place in ``taken``. Without it, large fields are
    passed over, and nothing is taken. ``room`` returns memory of a size.

    Raises:
        ValueError: the bytes are no message.
    """

    def __init__(
        self,
        file: BinaryIO,
        size: int,
        fields: Fields,
        refer: Callable[[int], bytes] | None = None,
        room: Callable[[int], Array] = in_memory,
    ) -> None:
        self._file, self._at, self._refer, self._room = file, 0, refer, room
        self.taken: list[Array] = []
        self.raw = b"".join(self._pieces(size, fields, 0))

    def _pieces(self, end: int, fields: Fields, depth: int) -> Iterator[bytes]:
        if depth > _DEEPEST:
            raise ValueError("too deep")
        # Invariant: all bytes up to ``_at`` have been read, whether kept, taken or passed over. A field may end at
        # ``end``, not beyond: an inner message never reads into what follows it.
        while self._at < end:
            tag = self._read_varint()
            number, form = tag >> 3, tag & 7
            if form == _VARINT:
                yield _varint(tag) + _varint(self._read_varint())
            elif form in (_FIXED32, _FIXED64):
                yield _varint(tag) + self._read(4 if form == _FIXED32 else 8)
            elif form == _BYTES:
                size = self._read_varint()
                if size > end - self._at:
                    raise ValueError("a field is longer than its message")
                yield self._field(number, size, fields.get(number), depth)
            else:
                raise ValueError("a field of no known form")
        if self._at != end:
            raise ValueError("a field is longer than its message")

    def _field(self, number: int, size: int, inner: Any, depth: int) -> bytes:
        if size < _LEAST or inner is None:
            return header(number, size) + self._read(size)
        if inner is TAKEN:
            if self._refer is None:
                self._at = self._file.seek(size, os.SEEK_CUR)
                return b""
            array = self._room(size)
            if self._file.readinto(array) != size:  # type: ignore[attr-defined]  # every binary file has it
                raise ValueError("cut off")
            self._at += size
            self.taken.append(array)
            return self._refer(len(self.taken) - 1)
        content = b"".join(self._pieces(self._at + size, inner, depth + 1))
        return header(number, len(content)) + content

    def _read(self, size: int) -> bytes:
        found = self._file.read(size)
        if len(found) != size:
            raise ValueError("cut off")
        self._at += size
        return found

    def _read_varint(self) -> int:
        value = 0
        for place in range(10):
            byte = self._read(1)[0]
            value |= (byte & 127) << 7 * place
            if byte < 128:
                return value
        raise ValueError("a number without end")
