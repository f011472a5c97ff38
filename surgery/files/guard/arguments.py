"""Check the arguments that a program in a file passes to operators which do not check them. Runs nothing.

================================  ====================================================================================
an argument                       what is allowed
================================  ====================================================================================
names and positions               those of the operator's schema, each once, without a gap: the argument that was
                                  checked under a name then arrives under that name
the name of a size                a number that was made before: a list times a number could fill the memory
Python's arithmetic on sizes      numbers only; no literal zero as a divisor; literal exponents and shifts up to 64;
                                  no value that could have more than 65,536 bits, and none over 1,024 into a region
literal sizes of a new tensor     those that the file declares for it
what a kernel does not check      see ``rules.py``; sizes are followed later (``sizes.py``)
================================  ====================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from surgery.errors import FileError, UnsafeFileError
from surgery.files.guard.operators import PLAIN_OPERATORS
from surgery.files.guard.rules import MOST_BITS_OUTSIDE, UNKNOWN, check_call

__all__ = ["check_module", "check_region"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOST_BITS, _SIZE_BITS = 1 << 16, 64  # of a computed number, and of a size
_POSITIONAL = 1  # the kind of an argument in the file


def _literal(argument: Mapping[str, Any]) -> Any:
    """Return the literal value of an argument of a file, or UNKNOWN."""
    ((kind, value),) = argument.items()
    if kind == "as_none":
        return None
    if kind in ("as_int", "as_float", "as_bool", "as_string"):
        return float(value) if kind == "as_float" else value
    if kind in ("as_ints", "as_floats", "as_bools", "as_strings"):
        return list(value)
    if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
        return UNKNOWN if "as_name" in value else _literal(value)
    if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
        return [UNKNOWN if "as_name" in each else _literal(each) for each in value]
    return UNKNOWN


def _tensor(argument: Mapping[str, Any]) -> str:
    """Return the name of the tensor that an argument is, or an empty text."""
    return argument["as_tensor"]["name"] if "as_tensor" in argument else ""


def _schema(target: str) -> Any:
    """Return the schema of an overload that is allowed already."""
    *_, namespace, name, overload = target.split(".")
    found = torch._C._jit_get_schemas_for_operator(f"{namespace}::{name}")
    return next(each for each in found if (each.overload_name or "default") == overload)


def _check_places(target: str, names: list[str], kinds: list[Any]) -> None:
    """Raise FileError unless names are in the schema, each once, and positional arguments have no gap."""
    # torch binds positional arguments by order: they must be the first of the schema, or a checked value would arrive
    # under another name.
    order = [each.name for each in _schema(target).arguments]
    placed = [name for name, kind in zip(names, kinds, strict=True) if kind == _POSITIONAL]
    if len(set(names)) != len(names) or not set(names) <= set(order) or set(placed) != set(order[: len(placed)]):
        raise FileError(f"its call of {target[:80]!r} has the arguments {', '.join(names)[:80]!r}, which do not fit")


class _Graph:
    """Follows the numbers of a graph: the most bits that each can have. Inputs have ``border`` bits at most."""

    def __init__(self, graph: Mapping[str, Any], border: int) -> None:
        self.graph = graph
        self.bits: dict[str, int] = {}
        self.border = border
        for each in graph["inputs"]:
            self.define(each, border)

    def define(self, argument: Mapping[str, Any], bits: int) -> None:
        ((kind, value),) = argument.items()
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool") and "as_name" in value:
            self.bits[value["as_name"]] = bits

    def used(self, argument: Mapping[str, Any]) -> int:
        """Return the most bits among the numbers of an argument; raises FileError for a size that was not made."""
        ((kind, value),) = argument.items()
        if kind in ("as_sym_int", "as_sym_float", "as_sym_bool"):
            return self._symbol(value)
        if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
            return max(map(self._symbol, value), default=0)
        literal = _literal(argument)
        numbers = literal if isinstance(literal, list) else [literal]
        return max((abs(each).bit_length() for each in numbers if type(each) is int), default=_SIZE_BITS)

    def _symbol(self, value: Mapping[str, Any]) -> int:
        if "as_name" not in value:
            literal = _literal(value)
            return abs(literal).bit_length() if type(literal) is int else _SIZE_BITS
        if value["as_name"] not in self.bits:
            raise FileError(f"it takes {value['as_name'][:60]!r} for a size, which is not a size or is made later")
        return self.bits[value["as_name"]]

    def arithmetic(self, target: str, inputs: list[Mapping[str, Any]]) -> int:
        """Return the most bits that the result of Python's arithmetic can have."""
        # A product has as many bits as its factors together, and a sum of n numbers log2(n) more than the largest. A
        # power multiplies the bits by its exponent, and a shift adds its distance.
        bits = [self.used(each) for each in inputs]
        last = _literal(inputs[-1])
        if target in ("_operator.mul", "torch.sym_sum"):
            listed = len(next(iter(inputs[0].values()))) if target == "torch.sym_sum" else 0
            return bits[0] + listed.bit_length() if listed else sum(bits)
        if target in ("_operator.pow", "_operator.lshift"):
            return bits[0] * math.ceil(max(1, abs(last))) if target == "_operator.pow" else bits[0] + last
        if target.startswith("math.") or target == "torch.sym_int":
            return max(MOST_BITS_OUTSIDE, *bits)  # a float has at most 1024 bits before the point
        return max(bits) + 1


def _check_outputs(target: str, node: Mapping[str, Any]) -> None:
    """Raise FileError if an operator's outputs are not numbers where the file declares sizes."""
    sizes = [next(iter(each)).startswith("as_sym") for each in node["outputs"]]
    if not any(sizes):
        return
    if target in PLAIN_OPERATORS:
        fits = len(sizes) == 1
    elif target.startswith("torch.ops.higher_order."):
        fits = len(sizes) > 1 or node.get("is_hop_single_tensor_return") is False
    else:
        # Tensors, lists and optional values are not numbers, whatever the file calls them.
        returns = _schema(target).returns
        kinds = [each.type.kind() not in ("TensorType", "ListType", "OptionalType") for each in returns]
        fits = len(kinds) == len(sizes) and all(may for may, size in zip(kinds, sizes, strict=True) if size)
    if not fits:
        raise FileError(f"it takes the output of {target[:80]!r} for a size")


_NEW = frozenset(
    f"torch.ops.{name}"
    for name in _words("""
        aten.full.default aten.zeros.default aten.ones.default aten.empty.memory_format aten.rand.default
        aten.randn.default aten.randint.default aten.randint.low aten.new_full.default aten.new_zeros.default
        aten.new_ones.default aten.new_empty.default aten.new_empty_strided.default aten.empty_strided.default
        aten.empty_permuted.default aten.expand.default prims.full.default
    """)
)


def _check_new(target: str, sizes: Any, node: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raise FileError unless the literal sizes of a new tensor are those that the file declares."""
    name = _tensor(node["outputs"][0]) if node["outputs"] else ""
    declared = [each.get("as_int") for each in values[name]["sizes"]] if name in values else None
    if declared is None or None in declared or -1 in sizes or UNKNOWN in sizes:
        return
    if sizes != declared:
        raise FileError(f"its call of {target!r} makes a tensor of {str(sizes)[:60]}, not of {str(declared)[:60]}")


def _check_node(node: Mapping[str, Any], known: _Graph) -> None:
    target, inputs = node["target"], [each["arg"] for each in node["inputs"]]
    arithmetic, region = target in PLAIN_OPERATORS, target.startswith("torch.ops.higher_order.")
    names = [each["name"] for each in node["inputs"]]
    if not arithmetic and not region:
        _check_places(target, names, [each.get("kind") for each in node["inputs"]])
    literals = [_literal(each) for each in inputs]
    call = dict(zip(map(str, range(len(inputs))) if arithmetic else names, literals, strict=True))
    check_call(target, call)
    _check_outputs(target, node)
    if target in _NEW and isinstance(call.get("size"), list):
        _check_new(target, call["size"], node, known.graph["tensor_values"])
    # The outputs of arithmetic are bounded by its inputs, those of a region by what may cross its border, and those of
    # any other operator are sizes of tensors.
    used = max((known.used(each) for each in inputs), default=0)
    bits = known.arithmetic(target, inputs) if arithmetic else known.border if region else _SIZE_BITS
    if bits > _MOST_BITS or (region and used > MOST_BITS_OUTSIDE):
        raise UnsafeFileError(f"its call of {target!r} makes numbers of {max(bits, used)} bits", allowed="sizes")
    for each in node["outputs"]:
        known.define(each, bits)


def check_module(module: Mapping[str, Any]) -> None:
    """Check the arguments of all calls in the module of a file.

    Raises UnsafeFileError if a call could crash or hang, and FileError if a call does not fit its operator.
    """
    _follow(_Graph(module["graph"], _SIZE_BITS))


def check_region(graph: Mapping[str, Any]) -> None:
    """Check the graph of a region, such as a branch, likewise; bounds the numbers that go into it and out of it."""
    known = _Graph(graph, MOST_BITS_OUTSIDE)
    _follow(known)
    crossing = max((known.used(each) for each in graph["outputs"]), default=0)
    if crossing > MOST_BITS_OUTSIDE:
        raise UnsafeFileError(f"one of its regions returns numbers of {crossing} bits", allowed="sizes")


def _follow(known: _Graph) -> None:
    for node in known.graph["nodes"]:
        _check_node(node, known)
