"""Crafted files of every kind, each with the command lines that read them.

All attacks on loading are here once more, since a crash would be seen here, and ``report`` reads what loading does not;
with them what loads, and files that are no models.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.hostile import ATTACKS, damage
from tests.hostile.builder import Attack, View, edited, saved

__all__ = ["CRAFTED", "MARKER"]

Case = Callable[[Path], list[str]]  # writes files into the folder, beside honest ones, and returns command lines
MARKER = "marker"  # what a payload would make
READS = ["inspect x.pt2", "report x.pt2 -o o.html"]
RUNS = ["compare x.pt2 x.pt2", "decompose x.pt2 -o o.pt2 --ranks 2 --no-timing"]
LOADS: dict[str, Attack] = {
    "guard of nothing": damage.guard_bomb("L['nothing'].size()[9] == 1"),
    "archive in an archive": damage.extra_entry("extra/a.zip", b"PK\3\4"),
}


def program(attack: Attack, lines: list[str]) -> Case:
    def case(folder: Path) -> list[str]:
        (folder / "x.pt2").write_bytes(attack(folder / MARKER))
        return lines

    return case


def state_dict(**weights: View) -> Case:
    """The weights of the factory's model, but for these."""

    def case(folder: Path) -> list[str]:
        honest = {"0.weight": View((16, 8), (8, 1), 128), "0.bias": View((16,), (1,), 16)}
        honest |= {"2.weight": View((8, 16), (16, 1), 128), "2.bias": View((8,), (1,), 8)}
        (folder / "x.pt").write_bytes(saved(honest | weights))
        return ["inspect x.pt --model factory:make --input-shape 2,8"]

    return case


def long_site(folder: Path) -> list[str]:
    for name in "ab":
        rows = [{"site": name * (1 << 20)}]
        (folder / f"{name}.json").write_text(json.dumps({"surgery_plan": 1, "decisions": rows}))
    return ["plan diff a.json b.json", "decompose mlp.pt2 --plan a.json -o o.pt2 --no-timing"]


def long_name(folder: Path) -> list[str]:
    """A name that has no room for the ending of the default output's."""
    name = "b" * 240 + ".pt2"
    os.link(folder / "mlp.pt2", folder / name)
    return [f"inspect {name}", f"decompose {name} --ranks 2 --no-timing"]


def packed_zeros(folder: Path) -> list[str]:
    """Samples of 4 GB in 4 MB: one packed block, many times."""
    blocks, block = 63, bytes(1 << 26)
    header = io.BytesIO()
    shape = (blocks * len(block) // 32, 8)
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": shape})
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = [packer.compress(part) + packer.flush(zlib.Z_FULL_FLUSH) for part in (header.getvalue(), block, block)]
    data = packed[0] + packed[1] + packed[2] * (blocks - 1) + packer.flush()
    (folder / "x.npz").write_bytes(_deflated("input.npy", data, size=len(header.getvalue()) + blocks * len(block)))
    options = "-o o.pt2 --ranks 2 --no-timing"
    return ["compare mlp.pt2 mlp.pt2 --inputs x.npz", f"decompose mlp.pt2 --calibration x.npz {options}"]


def _deflated(name: str, data: bytes, *, size: int) -> bytes:
    """An archive of one entry, whose packed data are given; its checksum is wrong."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), data)
    raw = bytearray(stream.getvalue())
    central = raw.rindex(b"PK\1\2")
    for start, method, length in ((0, 8, 22), (central, 10, 24)):
        struct.pack_into("<H", raw, start + method, zipfile.ZIP_DEFLATED)
        struct.pack_into("<I", raw, start + length, size)
    return bytes(raw)


def many_entries(folder: Path) -> list[str]:
    (folder / "x.pt2").write_bytes(edited({f"extra/{number}": b"" for number in range(60_000)}))
    return ["inspect x.pt2"]


CRAFTED: dict[str, Case] = {
    **{name: program(attack, READS) for name, attack in ATTACKS.items()},
    **{name: program(attack, [*READS, *RUNS]) for name, attack in LOADS.items()},
    "state dict past its storage": state_dict(**{"0.weight": View((16, 8), (8, 1), 4)}),
    "state dict of negative strides": state_dict(**{"0.weight": View((16, 8), (-8, -1), 128)}),
    "60000 entries": many_entries,
    "site of a megabyte": long_site,
    "file name of 244 letters": long_name,
    "4 GB of zeros": packed_zeros,
}
