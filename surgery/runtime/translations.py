"""What torch's exporter to ONNX computes anew at each export, kept: all of it is the same each time."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["kept_translations"]

_registries: dict[tuple[int, int, int], Any] = {}
_operators_found: set[int] = set()


@contextmanager
def kept_translations() -> Iterator[None]:
    """Let torch's exporter see the registry of the first export: how each operator is written in ONNX.

    For that, torch reads the source of six hundred functions, which takes most of a second. Operators that have no
    kernel of their own are looked up once, too, and not twenty times. The numbers of functions and of operators are the
    keys: a user may register more, and libraries do so when they are imported. Where torch and onnxscript are built
    otherwise, nothing is kept.
    """
    try:
        importlib.import_module("onnxscript.function_libs.torch_lib.ops")  # registers them
        functions: Any = importlib.import_module("onnxscript.function_libs.torch_lib.registration").default_registry
        registration: Any = importlib.import_module("torch.onnx._internal.exporter._registration")
        registry, default = registration.ONNXRegistry, registration._constants.TORCHLIB_OPSET
        operators: Any = importlib.import_module("torch._export.utils")
        own, make = vars(registry)["from_torchlib"], registry.from_torchlib
        find = operators._materialize_cpp_cia_ops
        known = torch._C._dispatch_get_registrations_for_dispatch_key
        all_operators = torch._C._dispatch_get_all_op_names
        count = sum(len(entry.overloads) + len(entry.complex) for _, entry in functions.items())
    except (ImportError, AttributeError, KeyError, TypeError, ValueError):
        yield
        return

    def copy_of_kept(opset_version: int = default) -> Any:
        key = opset_version, count, len(all_operators())
        if key not in _registries:
            _registries[key] = make(opset_version)
        found = registry()  # one export may add to it
        found._opset_version = opset_version
        found.functions = {name: list(rows) for name, rows in _registries[key].functions.items()}
        return found

    def find_once() -> None:
        number = len(known("CompositeImplicitAutograd"))
        if number not in _operators_found:
            find()
            _operators_found.add(number)

    registry.from_torchlib, operators._materialize_cpp_cia_ops = staticmethod(copy_of_kept), find_once
    try:
        yield
    finally:
        registry.from_torchlib, operators._materialize_cpp_cia_ops = own, find
