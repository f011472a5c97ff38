"""What torch asks of onnxscript at each export, kept: how all operators are written in ONNX, which never changes."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["kept_translations"]

_kept: dict[int, Any] = {}


@contextmanager
def kept_translations() -> Iterator[None]:
    """Let torch's exporter see the translations of the first export.

    onnxscript reads the source of each function anew for that: six hundred, half a second. The number of functions is
    the key, as a user may register more. Where torch and onnxscript are built otherwise, nothing is kept.
    """
    try:
        importlib.import_module("onnxscript.function_libs.torch_lib.ops")  # registers them
        registry: Any = importlib.import_module("onnxscript.function_libs.torch_lib.registration").default_registry
        asked: Any = importlib.import_module("torch.onnx._internal.exporter._registration").onnxscript_apis
        find = asked.get_torchlib_ops
        key = sum(len(entry.overloads) + len(entry.complex) for _, entry in registry.items())
    except (ImportError, AttributeError, TypeError, ValueError):
        yield
        return

    def once() -> Any:
        if key not in _kept:
            _kept[key] = find()
        return _kept[key]

    asked.get_torchlib_ops = once
    try:
        yield
    finally:
        asked.get_torchlib_ops = find
