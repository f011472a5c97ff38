"""Check .pt2 archives: pure checks of bytes, before torch sees them. Nothing that the file says is run.

``torch.export.load`` trusts its file. These are the ways in which it would run code or break, and how each is closed:

==============================================  ==================================================================
in the file                                     closed by
==============================================  ==================================================================
weights and constants with ``use_pickle``       refused: ``torch.load(weights_only=False)`` is never reached
``custom_obj_*`` (torchbind pickles) and        refused by entry name, by config path name, and in the program
``opaque_obj_*`` (``pickle.loads``)
``data/weights/model.pt``, ``constants``        refused: the pickled format of torch 2.8 and earlier
``data/aotinductor/*`` (``.so`` is loaded)      refused, like every entry that is not on a short list
``data/sample_inputs``: falls back to           loaded here with ``weights_only=True`` first, and must be plain
``weights_only=False`` when that fails          containers and tensors; ``weights_only`` is forced again while
                                                torch loads (``files/load.py``), so that it cannot fall back
``models/model.json``                           checked against its schema and allowlists (``program.py``)
sizes, strides and offsets past the payload     computed and compared with the entry's bytes
compressed entries, bit flips, truncation       stored entries only, sizes and CRC-32 of each checked
a zip that two readers read differently         torch reads a fresh archive, written here from the checked entries
==============================================  ==================================================================

``trust`` lifts the refusals of code; the checks of the container and of the payload sizes stay.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._export.serde import schema

from surgery.errors import FileError, SurgeryError, UnsafeFileError
from surgery.files.guard.program import check_key, check_program, check_schema
from surgery.text import first_line

__all__ = ["RECORD", "Archive", "check_archive", "entry_names", "rewrite"]

RECORD = "surgery.json"

_LONGEST_RECORD = 64 << 20
_MOST_LEAVES = 100_000  # values in the sample inputs
_STORED_FLAGS = 0x808  # torch sets: sizes follow the data; names are UTF-8
_AGAIN = "get the file again from its source"
_RESAVE = "save it again with torch.export.save where it was made"

_SAMPLES = "data/sample_inputs/model.pt"

# names of entries inside the archive's root folder; any other entry is refused
_ENTRIES = re.compile(
    r"archive_format|archive_version|byteorder|\.data/version|\.data/serialization_id|\.format_version|"
    r"\.storage_alignment|version|models/model\.json|data/sample_inputs/model\.pt|"
    r"data/weights/(weight_\d+|model_weights_config\.json)|"
    r"data/constants/(tensor_\d+|model_constants_config\.json)|extra/[\w\-. /+@]+",
    re.ASCII,
)
_NEEDED = (
    "archive_version",
    "models/model.json",
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
    _SAMPLES,
)


@dataclass(frozen=True)
class Archive:
    """A checked archive: a fresh copy for torch to read, and the record of earlier surgery."""

    stream: io.BytesIO
    record: dict[str, Any] | None


def entry_names(raw: bytes) -> list[str]:
    """Return the entry names of a zip file, without its root folder; raises FileError if the zip is damaged."""
    with _open(raw) as archive:
        return [name.partition("/")[2] or name for name in archive.namelist()]


def _open(raw: bytes) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(io.BytesIO(raw))
    except Exception as error:  # zipfile raises BadZipFile, struct.error, ValueError and more
        raise FileError(f"the archive is cut off or damaged ({type(error).__name__})", next_step=_AGAIN) from None


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or ":" in name or "" in parts or {".", ".."} & set(parts):
        raise UnsafeFileError(f"the archive has an entry with the path {name[:80]!r}", next_step=_AGAIN)
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        size = f"{entry.compress_size} to {entry.file_size} bytes"
        raise FileError(f"the entry {name[:80]!r} is compressed ({size})", allowed="stored entries, as torch writes")
    if entry.flag_bits & ~_STORED_FLAGS:
        raise FileError(f"the entry {name[:80]!r} has zip flags {entry.flag_bits:#x}", next_step=_AGAIN)


def _check_layout(raw: bytes, archive: zipfile.ZipFile) -> list[zipfile.ZipInfo]:
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    for entry in entries:
        _check_entry(entry)
    name, copies = Counter(names).most_common(1)[0] if names else ("", 0)
    if copies != 1:
        raise UnsafeFileError(f"the archive has the entry {name[:80]!r} {copies} times", next_step=_AGAIN)
    # The end record is the last 22 bytes: a comment, or data after it, could hold a second directory, which another
    # reader would find. It counts the entries in 16 bits.
    # Of the end record's last 12 bytes: the entries (2), the directory's size and place (8), the comment's length (2).
    counted, comment = struct.unpack("<H8xH", raw[-12:])
    if raw[-22:-18] != b"PK\5\6" or comment or counted != min(len(entries), 0xFFFF):
        raise FileError("the archive's directory is damaged, or data follow it", next_step=_AGAIN)
    if min(entry.header_offset for entry in entries):
        raise FileError("the archive has data in front of it", next_step=_AGAIN)
    # Entries that share bytes make a small file large: each is stored, and all together are more than the file.
    if sum(entry.file_size for entry in entries) > len(raw):
        raise FileError("the archive's entries are larger than the file", next_step=_AGAIN)
    if len({name.split("/")[0] for name in names}) != 1 or "/" not in names[0]:
        raise FileError("the archive does not have one root folder", next_step=_AGAIN)
    return entries


def rewrite(raw: bytes, *, nested: str | None = None) -> tuple[io.BytesIO, dict[str, int]]:
    """Copy a zip file entry by entry into a fresh one, and check names, sizes and CRC-32 on the way.

    Returns the copy, and the size of each entry in bytes, by its name without the root folder. ``nested`` names an
    entry that is a zip file itself, unless it is empty; it is rewritten too. Raises FileError or UnsafeFileError.
    """
    copy, sizes = io.BytesIO(), {}
    try:
        with _open(raw) as archive, zipfile.ZipFile(copy, "w", zipfile.ZIP_STORED) as fresh:
            for entry in _check_layout(raw, archive):
                name = entry.filename.partition("/")[2]
                data = archive.read(entry)
                if len(data) != entry.file_size:
                    raise FileError(f"the entry {name[:80]!r} is cut off", next_step=_AGAIN)
                if name == nested and data:
                    if not data.startswith(b"PK"):
                        raise UnsafeFileError("its sample inputs are a pickle in a format older than torch 1.6")
                    data = rewrite(data)[0].getvalue()
                fresh.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
                sizes[name] = len(data)
    except SurgeryError:
        raise
    except Exception as error:  # as in _open
        raise FileError(f"the archive is damaged ({type(error).__name__})", next_step=_AGAIN) from None
    copy.seek(0)
    return copy, sizes


def _check_names(names: dict[str, int], *, trust: bool) -> None:
    models = [name for name in names if name.startswith("models/")]
    if len(models) > 1:
        raise FileError(f"the archive holds {len(models)} models", allowed="one", next_step=_RESAVE)
    if models and models != ["models/model.json"]:
        raise FileError(f"the archive's model is {models[0][:60]!r}", allowed="models/model.json", next_step=_RESAVE)
    strange = next((name for name in names if not _ENTRIES.fullmatch(name)), None)
    if strange and not trust:
        raise UnsafeFileError(f"the archive holds {strange[:80]!r}, which could be code or a pickle")
    if missing := next((name for name in _NEEDED if name not in names and not trust), None):
        raise FileError(f"the archive lacks {missing!r}", next_step=_RESAVE)


def _parse(data: bytes, name: str) -> Any:
    try:
        return json.loads(data)
    except RecursionError:
        raise FileError(f"the entry {name!r} is nested too deeply") from None
    except ValueError:
        raise FileError(f"the entry {name!r} is not JSON", next_step=_AGAIN) from None


def _integers(values: list[dict[str, Any]]) -> list[int]:
    found = [value.get("as_int") for value in values]
    if not all(type(value) is int and 0 <= value < 2**63 for value in found):
        raise FileError(f"a weight has the sizes or strides {str(found)[:60]}", allowed="whole numbers from 0")
    return [value for value in found if value is not None]


def _check_extent(name: str, meta: dict[str, Any], nbytes: int) -> None:
    """Check that a view ends inside its payload: (offset + sum((size - 1) * stride) + 1) * itemsize <= nbytes."""
    from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE  # with the compiler: half a second

    dtype = _SERIALIZE_TO_TORCH_DTYPE.get(meta["dtype"])
    if dtype is None or meta["layout"] != schema.Layout.Strided:
        raise FileError(f"the weight {name!r} has dtype {meta['dtype']}, layout {meta['layout']}", allowed="strided")
    sizes, strides = _integers(meta["sizes"]), _integers(meta["strides"])
    (offset,) = _integers([meta["storage_offset"]])
    if len(sizes) != len(strides):
        raise FileError(f"the weight {name!r} has {len(sizes)} sizes and {len(strides)} strides")
    # Example: sizes (2, 3) with strides (3, 1) end at 0 + 1 + 1 * 3 + 2 * 1 = 6.
    empty = math.prod(sizes) == 0
    last = offset + (0 if empty else 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)))
    if last * dtype.itemsize > nbytes or nbytes % dtype.itemsize:
        raise FileError(f"the weight {name!r} is declared as {sizes}, more than its {nbytes} bytes", next_step=_AGAIN)


def _check_payloads(config: dict[str, Any], folder: str, sizes: dict[str, int], *, trust: bool) -> None:
    dtypes: dict[str, Any] = {}
    for name, meta in config["config"].items():
        path = meta["path_name"]
        pickled = meta["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", path, re.ASCII)
        if pickled and not trust:
            raise UnsafeFileError(f"the weight {name[:60]!r} is stored as a pickle")
        if f"{folder}/{path}" not in sizes:
            raise FileError(f"the archive lacks the payload {path[:60]!r}", next_step=_AGAIN)
        if pickled:
            continue
        if meta["tensor_meta"] is None:
            raise FileError(f"the weight {name[:60]!r} has no shape", next_step=_AGAIN)
        _check_extent(name[:60], meta["tensor_meta"], sizes[f"{folder}/{path}"])
        dtype = meta["tensor_meta"]["dtype"]
        if dtypes.setdefault(path, dtype) != dtype:  # torch would silently reinterpret the second weight
            raise FileError(f"the payload {path!r} is shared by two dtypes", next_step=_RESAVE)


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the leaves and the dict keys of plain containers; an object of any other type is a leaf."""
    pending = [value]
    while pending:
        each = pending.pop()
        if isinstance(each, dict):
            pending.extend(each.values())
            yield from each
        elif isinstance(each, tuple | list):
            pending.extend(each)
        else:
            yield each


def _check_samples(data: bytes) -> None:
    """Check that sample inputs load with ``weights_only=True`` into at most 100000 plain values."""
    if not data:
        return
    stream = io.BytesIO(data)
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(stream):
        raise UnsafeFileError(f"its sample inputs are a pickle that calls {unsafe[0][:80]}")
    stream.seek(0)
    try:
        samples = torch.load(stream, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        reason = first_line(error)[:80]
        raise UnsafeFileError(f"its sample inputs do not load with weights_only=True ({reason})") from None
    for count, leaf in enumerate(_leaves(samples)):
        if count > _MOST_LEAVES:
            raise FileError(f"its sample inputs hold more than {_MOST_LEAVES} values")
        if isinstance(leaf, str):
            check_key(leaf)
        elif not isinstance(leaf, torch.Tensor | int | float | complex | torch.dtype | torch.device | None):
            raise UnsafeFileError(f"its sample inputs hold a {type(leaf).__name__}", allowed="tensors and numbers")


def _read_record(archive: zipfile.ZipFile, sizes: dict[str, int]) -> dict[str, Any] | None:
    name = f"extra/{RECORD}"
    if name not in sizes:
        return None
    if sizes[name] > _LONGEST_RECORD:
        raise FileError(f"its record {RECORD} has {sizes[name]} bytes", allowed=f"{_LONGEST_RECORD}")
    record = _parse(archive.read(f"archive/{name}"), name)
    if not isinstance(record, dict):
        raise FileError(f"its record {RECORD} is not a JSON object", next_step=_AGAIN)
    return record


def _check_contents(archive: zipfile.ZipFile, sizes: dict[str, int], *, trust: bool) -> None:
    for folder, kind in (("data/weights", "weights"), ("data/constants", "constants")):
        name = f"{folder}/model_{kind}_config.json"
        if name in sizes:
            config = _parse(archive.read(f"archive/{name}"), name)
            if not trust:
                check_schema(schema.PayloadConfig, config)
            _check_payloads(config, folder, sizes, trust=trust)
    if not trust:
        model = "models/model.json"
        check_program(_parse(archive.read(f"archive/{model}"), model))
        _check_samples(archive.read(f"archive/{_SAMPLES}"))


def check_archive(raw: bytes, *, trust: bool = False) -> Archive:
    """Check the bytes of a .pt2 archive, and return a fresh copy that torch can load without running code in it.

    Raises UnsafeFileError if loading would run code, and FileError if the archive is damaged or cannot be loaded.
    """
    stream, sizes = rewrite(raw, nested=None if trust else _SAMPLES)
    _check_names(sizes, trust=trust)
    with zipfile.ZipFile(stream) as archive:
        try:
            _check_contents(archive, sizes, trust=trust)
        except RecursionError:
            raise FileError("the archive's description is nested too deeply") from None
        record = _read_record(archive, sizes)
    stream.seek(0)
    return Archive(stream, record)
