"""Bombs, lies about sizes, and archives of the wrong make."""

from __future__ import annotations

import json
import struct
import warnings
import zipfile
from pathlib import Path
from typing import Any

from tests.hostile import payloads
from tests.hostile.builder import (
    MODEL,
    SAMPLES,
    WEIGHTS,
    Attack,
    edited,
    entries,
    graph,
    honest,
    pack,
    saved,
    with_expression,
    with_json,
)

# -- bombs and lies ----------------------------------------------------------------------------------------------------


def expression_bomb(text: str) -> Attack:
    return lambda _: with_expression(text)


def guard_bomb(text: str, times: int = 1) -> Attack:
    return lambda _: with_json(MODEL, lambda parsed: parsed["guards_code"].extend([text] * times))


def wide_tensor(_: Path) -> bytes:
    """Each size is a short sum; their product has 12^8 terms."""
    size = "Add(" + ",".join(f"Mul(Integer({i}),Symbol('s77',positive=True,integer=True))" for i in range(1, 13)) + ")"

    def change(parsed: Any) -> None:
        meta = next(iter(graph(parsed)["tensor_values"].values()))
        meta["sizes"] = meta["strides"] = [{"as_expr": {"expr_str": size, "hint": {"as_int": 4}}}] * 8

    return with_json(MODEL, change)


def samples(value: Any) -> Attack:
    return lambda _: edited({SAMPLES: saved(value)})


def unbacked_bomb(_: Path) -> bytes:
    """Count up to the number in a symbol's name."""
    huge = {"u99999999999999": {"min_val": 0, "max_val": 9}}
    return with_json(MODEL, lambda parsed: parsed["range_constraints"].update(huge))


def tensor_meta(**values: Any) -> Attack:
    def attack(_: Path) -> bytes:
        return with_json(WEIGHTS, lambda config: config["config"]["linear.weight"]["tensor_meta"].update(values))

    return attack


def _ints(*values: int) -> list[dict[str, int]]:
    return [{"as_int": value} for value in values]


def empty_payload(_: Path) -> bytes:
    """An empty payload makes torch allocate what the sizes say."""
    path = json.loads(entries(honest())[WEIGHTS])["config"]["linear.weight"]["path_name"]

    def change(config: Any) -> None:
        config["config"]["linear.weight"]["tensor_meta"]["sizes"] = _ints(2**20, 2**20)

    return with_json(WEIGHTS, change, **{f"data/weights/{path}": b""})


def two_dtypes(_: Path) -> bytes:
    def change(config: Any) -> None:
        first, second = config["config"]["linear.weight"], config["config"]["linear.bias"]
        second["path_name"] = first["path_name"]
        second["tensor_meta"]["dtype"] = 6  # half

    return with_json(WEIGHTS, change)


def shared_samples(_: Path) -> bytes:
    """A list of lists of lists of the same: small as a pickle, endless as a tree."""
    value: Any = [1]
    for _level in range(60):
        value = [value, value]
    return edited({SAMPLES: saved(((value,), {}))})


def compressed(_: Path) -> bytes:
    return pack(entries(honest()), zipfile.ZIP_DEFLATED)


def compression_bomb(_: Path) -> bytes:
    bomb = entries(honest()) | {"data/weights/weight_9": bytes(1 << 28)}
    return pack(bomb, zipfile.ZIP_DEFLATED)


def directory(at: int, layout: str, *values: int, part: bytes = b"PK\1\2") -> Attack:
    """The archive with other values in the first entry of its directory, or in the directory's end."""

    def attack(_: Path) -> bytes:
        raw = bytearray(honest())
        struct.pack_into(layout, raw, raw.index(part) + at, *values)
        return bytes(raw)

    return attack


def two_names(_: Path) -> bytes:
    """An entry has one name where it stands, and another in the directory."""
    return honest().replace(MODEL.encode(), b"modelz/model.json", 1)


def twice(_: Path) -> bytes:
    contents = list(entries(honest()).items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pack([*contents, (MODEL, dict(contents)[MODEL])])


def extra_entry(name: str, data: bytes = b"x") -> Attack:
    return lambda _: edited({name: data})


def two_archives(marker: Path) -> bytes:
    """A second zip in front: readers differ in which of the two they see."""
    return payloads.pickled_samples(marker) + honest()


def appended(marker: Path) -> bytes:
    return honest() + payloads.pickled_samples(marker)[:-1]


def json_text(name: str, text: bytes) -> Attack:
    return lambda _: edited({name: text})
