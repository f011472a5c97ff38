"""One small honest archive, and the means to change it."""

from __future__ import annotations

import functools
import io
import json
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

Attack = Callable[[Path], bytes]
Edit = Callable[[bytes], bytes]

MODEL = "models/model.json"
SAMPLES = "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"


class Honest(nn.Module):
    """A linear layer, a buffer, a constant, a dynamic size, a dict input, a string input and a branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("shift", torch.ones(4))
        self.constant = torch.ones(2)

    def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor], mode: str) -> torch.Tensor:
        y = torch.cond(x.sum() > 0, lambda t: t + 1, lambda t: t * 2, (x,))
        wide = torch.cat([self.linear(y), more["key"]])
        return wide * x.shape[0] + self.shift + self.constant.sum()


def program() -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=3, max=64)
    shapes = {"x": {0: batch}, "more": {"key": {0: batch}}, "mode": None}
    return torch.export.export(Honest().eval(), inputs(), dynamic_shapes=shapes)


@functools.cache
def honest() -> bytes:
    torch.manual_seed(0)
    stream = io.BytesIO()
    torch.export.save(program(), stream, extra_files={"surgery.json": '{"passes": ["decompose"]}'})
    return stream.getvalue()


def inputs() -> tuple[torch.Tensor, dict[str, torch.Tensor], str]:
    return torch.ones(4, 4), {"key": torch.ones(4, 4)}, "mode"


def entries(raw: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def pack(contents: dict[str, bytes] | list[tuple[str, bytes]], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in contents.items() if isinstance(contents, dict) else contents:
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data, method)
    return stream.getvalue()


def edited(changes: dict[str, bytes | Edit | None]) -> bytes:
    contents = entries(honest())
    for name, change in changes.items():
        if change is None:
            del contents[name]
        else:
            contents[name] = change(contents[name]) if callable(change) else change
    return pack(contents)


def with_json(name: str, change: Callable[[Any], None], **more: bytes) -> bytes:
    def edit(data: bytes) -> bytes:
        parsed = json.loads(data)
        change(parsed)
        return json.dumps(parsed).encode()

    return edited({name: edit, **more})


def with_text(old: str, new: str) -> bytes:
    """Replace JSON string contents everywhere in the program."""
    assert json.dumps(old)[1:-1].encode() in entries(honest())[MODEL], f"{old!r} is not in the program"
    quoted = json.dumps(old)[1:-1].encode(), json.dumps(new)[1:-1].encode()
    return edited({MODEL: lambda data: data.replace(*quoted)})


class Payload:
    """Unpickling it touches the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def saved(value: Any, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, **options)
    return stream.getvalue()


class View:
    """Unpickling it gives a tensor of these sizes and strides on a storage of so many numbers, fit or not."""

    def __init__(self, sizes: tuple[int, ...], strides: tuple[int, ...], numbers: int) -> None:
        self.sizes, self.strides, self.numbers = sizes, strides, numbers

    def __reduce__(self) -> Any:
        storage = torch.zeros(self.numbers)._typed_storage()
        return torch._utils._rebuild_tensor_v2, (storage, 0, self.sizes, self.strides, False, OrderedDict())


def touch(marker: Path) -> str:
    """Return an expression, with single quotes only, that makes the marker and is true."""
    return f"(__import__('pathlib').Path('{marker}').touch() or True)"


def touch_unquoted(marker: Path) -> str:
    """Return the same without any quotes or dots in strings, built from character codes."""
    spelled = "+".join(f"chr({ord(character)})" for character in str(marker))
    library = "+".join(f"chr({ord(character)})" for character in "pathlib")
    return f"str(__import__({library}).Path({spelled}).touch())"


def graph(parsed: Any) -> Any:
    return parsed["graph_module"]["graph"]


def signature(parsed: Any) -> Any:
    return parsed["graph_module"]["module_call_graph"][0]["signature"]


def with_expression(text: str) -> bytes:
    def change(data: bytes) -> bytes:
        return re.sub(rb'("expr_str": )"[^"]*"', lambda found: found[1] + json.dumps(text).encode(), data)

    return edited({MODEL: change})
