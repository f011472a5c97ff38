"""The operators that a program in a file may call, by name; what the guard of archives and that of records hold to.

Existing overloads of a few namespaces whose arguments are tensors and numbers, and an explicit set: never what touches
files, storages or any object.
"""

from __future__ import annotations

import functools
import re

import torch

from surgery.errors import UnsafeFileError

__all__ = ["PLAIN_OPERATORS", "check_operator"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OVERLOAD = re.compile(r"torch\.ops\.([a-z]\w*)\.(\w+)\.(\w+)", re.ASCII)

# exact targets that export emits outside torch.ops
PLAIN_OPERATORS = frozenset(
    [f"_operator.{name}" for name in _words("eq ne le ge lt gt neg pos mul add sub floordiv mod pow truediv")]
    + [f"_operator.{name}" for name in ("and_", "or_", "lshift", "rshift", "getitem")]
    + [f"math.{name}" for name in ("trunc", "floor", "ceil", "sqrt")]
    + [f"torch.sym_{name}" for name in ("not", "int", "float", "ite", "max", "min", "sqrt", "sum")]
    + ["torch._sym_sqrt"]
)
_HIGHER_ORDER = _words(
    "cond while_loop scan associative_scan map_impl map wrap_with_set_grad_enabled wrap_with_autocast "
    "invoke_subgraph strict_mode out_dtype flex_attention hints_wrapper wrap tag_activation_checkpoint"
)
_NAMESPACES = frozenset(["aten", "prims", "quantized_decomposed", "torchvision"])
_PLAIN_ARGUMENTS = _words(
    "TensorType IntType FloatType BoolType ComplexType NumberType StringType DeviceObjType GeneratorType"
)
_SPEAKING = frozenset(["warn", "_print"])


@functools.cache
def _overload_fault(namespace: str, name: str, overload: str) -> str | None:
    """Why this overload cannot be in a program, or None. Looks the schema up; calls nothing."""
    schemas = torch._C._jit_get_schemas_for_operator(f"{namespace}::{name}")
    found = next((each for each in schemas if (each.overload_name or "default") == overload), None)
    if found is None:
        return "which is not registered here"
    for argument in found.arguments:
        kind = argument.type
        while kind.kind() in ("OptionalType", "ListType"):
            kind = kind.getElementType()
        if argument.name == "filename" or kind.kind() not in _PLAIN_ARGUMENTS:
            return "which can reach files, raw storage or objects"
    return "which prints" if name in _SPEAKING else None


def check_operator(target: str) -> None:
    """Refuse a target that is no operator which a program may call."""
    if target in PLAIN_OPERATORS:
        return
    if target.removeprefix("torch.ops.higher_order.") in _HIGHER_ORDER:
        return
    match = _OVERLOAD.fullmatch(target)
    if match is None or match[1] not in _NAMESPACES:
        raise UnsafeFileError(f"it calls {target[:80]!r}", allowed="operators of ATen and those torch.export emits")
    if fault := _overload_fault(*match.groups()):
        raise UnsafeFileError(f"it calls {target[:80]!r}, {fault}", allowed="operators on tensors and numbers")
