"""Check the guards inside a .pt2 archive against a grammar and bounds, before torch makes a function of them.

A guard such as ``L['x'].size()[0] == 2 * L['y'].size()[0]`` becomes a line of source that runs whenever the program
runs. Here it is parsed by ``ast`` and never evaluated. Each node must be on a list. For each number, the reader tracks
its kind and the most bits it could have, and refuses a guard that could fill the memory or take long.

    2 * L['y'].size()[0]      2 has 2 bits and a size 63, so the product has at most 65 bits

A guard may compare inputs, but compute only with inputs that are numbers: a text times a number is a long text, and the
cost of a tensor times a tensor depends on both.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from surgery.errors import UnsafeFileError
from surgery.text import cut, shown

__all__ = ["check_guard", "check_guards"]

_LONGEST = 40_000  # characters; the longest guard of a Swin transformer with open image sizes has 12,029
_LONGEST_IN_ALL = 3_000_000  # characters of all guards; that Swin transformer has 472,024
_DEEPEST = 100
_MOST_BITS = 4096

# A guard has no line breaks, comments, double quotes or backslashes; a key or a text in it has no quotes at all.
_TEXT = re.compile(r"[\w\[\]().,'<>=!+\-*/%: ]*", re.ASCII)
_KEY = re.compile(r"[\w.\-: ]*", re.ASCII)

_SIZE_BITS = 63
_FLOAT_BITS = 1024  # a double is below 2^1024

_FLOATS = ("math.sqrt", "torch.sym_float", "torch.sym_sqrt")
_WHOLES = ("math.floor", "math.ceil", "math.trunc")
_ONE_NUMBER = frozenset(["abs", "round", "torch.sym_not", "torch.sym_int", *_FLOATS, *_WHOLES])
_ONE_INPUT = frozenset(["float", "int", "bool", "math.isnan"])  # these take any input, too
_NUMBERS = frozenset(["max", "min", "torch.sym_max", "torch.sym_min", "IsNonOverlappingAndDenseIndicator"])
_OF_TENSORS = {"size": "sizes", "stride": "sizes", "storage_offset": "number", "dim": "number", "numel": "number"}
_ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)
_USER_INPUTS = frozenset(["user_input", "constant_input"])
_NUMBER_KINDS = frozenset(["as_int", "as_float", "as_bool", "as_sym_int", "as_sym_float"])


@dataclass(frozen=True)
class _Value:
    """What is known of a part of a guard: its kind (number, text, sizes, or input) and the most bits of a number."""

    kind: str
    bits: int = 1
    whole: bool = True


_TRUTH = _Value("number")
_FLOAT = _Value("number", _FLOAT_BITS, whole=False)


class _Reader:
    """Reads one guard part by part; raises at the first part that is not allowed or too large."""

    def __init__(self, text: str, numbers: frozenset[str]) -> None:
        self.text, self.numbers = text, numbers

    def refuse(self) -> NoReturn:
        raise UnsafeFileError(f"its guard {cut(shown(self.text), 60)} is more than arithmetic on sizes")

    def read(self, node: ast.expr, depth: int = 0) -> _Value:
        if depth > _DEEPEST:
            self.refuse()
        value = self._literal(node) or self._input(node) or self._operation(node, depth + 1)
        if value.bits > _MOST_BITS:
            self.refuse()
        return value

    def number(self, node: ast.expr, depth: int) -> _Value:
        value = self.read(node, depth)
        if value.kind != "number":
            self.refuse()
        return value

    def numbers_of(self, nodes: Iterable[ast.expr], depth: int) -> _Value:
        """Return a bound on the largest of several numbers."""
        values = [self.number(node, depth) for node in nodes]
        return _Value("number", max(each.bits for each in values), all(each.whole for each in values))

    def _literal(self, node: ast.expr) -> _Value | None:
        match node:
            case ast.Constant(value=bool()):
                return _TRUTH
            case ast.Constant(value=int() as value) if value < 2**63:
                return _Value("number", max(1, value.bit_length()))
            case ast.Constant(value=float()) | ast.Name(id="inf"):
                return _FLOAT
            case ast.Attribute(value=ast.Name(id="math"), attr="inf" | "nan"):
                return _FLOAT
            case ast.Constant(value=str() as value) if _KEY.fullmatch(value):
                return _Value("text")
        return None

    def _input(self, node: ast.expr) -> _Value | None:
        if not _is_input(node):
            return None
        if ast.unparse(node) in self.numbers:
            return _Value("number", _FLOAT_BITS)
        return _Value("input")

    def _operation(self, node: ast.expr, depth: int) -> _Value:
        match node:
            case ast.BoolOp(values=values):
                return self.numbers_of(values, depth)
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                self.number(operand, depth)
                return _TRUTH
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                return self.number(operand, depth)
            case ast.BinOp(left=left, op=op, right=right) if isinstance(op, _ARITHMETIC):
                return self._arithmetic(left, op, right, depth)
            case ast.Compare(left=left, ops=ops, comparators=others) if all(isinstance(op, _COMPARISONS) for op in ops):
                return self._comparison([left, *others], depth)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                return self.numbers_of([test, body, orelse], depth)
            case ast.Call(func=called, args=arguments, keywords=[]):
                return self._call(called, arguments, depth)
            case ast.Subscript(value=ast.Call() as value, slice=index) if _is_index(index):
                if self.read(value, depth).kind == "sizes":
                    return _Value("number", _SIZE_BITS)
        self.refuse()

    def _arithmetic(self, left: ast.expr, op: ast.operator, right: ast.expr, depth: int) -> _Value:
        # The most bits of a result: of a product the sum of both, of a power a multiple of the base's, and of anything
        # else one more than the larger. A result that may be no whole number is a float.
        one, other = self.number(left, depth), self.number(right, depth)
        if isinstance(op, ast.Pow):
            power = right.value if isinstance(right, ast.Constant) else None
            if not isinstance(power, int) or power not in (2, 3, 4):
                self.refuse()
            return _Value("number", one.bits * power) if one.whole else _FLOAT
        if isinstance(op, ast.Div) or not (one.whole and other.whole):
            return _FLOAT
        both = one.bits + other.bits if isinstance(op, ast.Mult) else max(one.bits, other.bits) + 1
        return _Value("number", both)

    def _comparison(self, nodes: list[ast.expr], depth: int) -> _Value:
        # Two inputs could be two tensors, whose comparison runs on all their numbers.
        kinds = [self.read(node, depth).kind for node in nodes]
        if "sizes" in kinds or kinds.count("input") > 1 or {"text", "number"} <= set(kinds):
            self.refuse()
        return _TRUTH

    def _call(self, called: ast.expr, arguments: list[ast.expr], depth: int) -> _Value:
        if isinstance(called, ast.Attribute) and _is_input(called.value):
            kind = _OF_TENSORS.get(called.attr)
            if kind is None or len(arguments) > 1 or not all(map(_is_index, arguments)):
                self.refuse()
            return _Value("number" if arguments else kind, _SIZE_BITS)
        name = ast.unparse(called) if isinstance(called, ast.Name | ast.Attribute) else ""
        if name in _ONE_INPUT and len(arguments) == 1 and self.read(arguments[0], depth).kind in ("number", "input"):
            return _FLOAT if name == "float" else _Value("number", _FLOAT_BITS)
        if name in _ONE_NUMBER and len(arguments) == 1:
            value = self.number(arguments[0], depth)
            return _FLOAT if name in _FLOATS else _Value("number", value.bits)
        if name in _NUMBERS and len(arguments) > 1:
            return self.numbers_of(arguments, depth)
        if name == "torch.sym_ite" and len(arguments) == 3:
            return self.numbers_of(arguments, depth)
        self.refuse()


def _is_index(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and node.value < 2**63


def _is_input(node: ast.expr) -> bool:
    """Whether a node is an input or a part of an input: ``L['x']``, ``L['x'][0].feature``."""
    match node:
        case ast.Name(id="L"):
            return True
        case ast.Subscript(value=inner, slice=ast.Constant(value=str() as key)):
            return _KEY.fullmatch(key) is not None and _is_input(inner)
        case ast.Subscript(value=inner, slice=key):
            return _is_index(key) and _is_input(inner)
        case ast.Attribute(value=inner, attr=name):
            return not name.startswith("_") and _is_input(inner)
    return False


def check_guard(text: str, numbers: frozenset[str] = frozenset()) -> None:
    """Raise UnsafeFileError unless a guard only compares sizes, strides and constants of the inputs.

    ``numbers`` lists the inputs that are numbers, in the form ``L['n']``: a guard may compute only with these and with
    sizes.
    """
    reader = _Reader(text, numbers)
    if len(text) > _LONGEST or not _TEXT.fullmatch(text):
        reader.refuse()
    try:
        reader.read(ast.parse(text, mode="eval").body)
    except UnsafeFileError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        reader.refuse()


def _is_number(spec: dict[str, Any]) -> bool:
    given = spec["user_input"]["arg"] if "user_input" in spec else spec["constant_input"]["value"]
    return given.keys() <= _NUMBER_KINDS


def _count_leaves(node: dict[str, Any]) -> int:
    return 1 if node["type"] is None else sum(map(_count_leaves, node["children_spec"]))


def _number_inputs(program: dict[str, Any]) -> frozenset[str]:
    """Return the inputs that are plain numbers, as guards name them: ``L['n']``."""
    module = program["graph_module"]
    signature = next((each["signature"] for each in module["module_call_graph"] if each.get("signature")), None)
    if signature is None or len(parts := json.loads(signature["in_spec"])[1]["children_spec"]) != 2:
        return frozenset()
    args, kwargs = (part["children_spec"] for part in parts)
    keys = json.loads(parts[1]["context"] or "[]")
    names = [*(signature.get("forward_arg_names") or []), *[""] * len(args)][: len(args)]
    given = [_is_number(each) for each in module["signature"]["input_specs"] if each.keys() & _USER_INPUTS]
    # Inputs are flat in the specs and nested in the tree: a plain number is one leaf, and ``start`` is its index among
    # the flat ones.
    found, start = [], 0
    for name, child in zip([*names, *keys], [*args, *kwargs], strict=False):
        if child["type"] is None and given[start : start + 1] == [True]:
            found.append(f"L['{name}']")
        start += _count_leaves(child)
    return frozenset(found)


def check_guards(program: dict[str, Any]) -> None:
    """Check each guard of a program, and their total length; the program must have passed ``check_schema``."""
    texts = program.get("guards_code", [])
    length = sum(map(len, texts))
    if length > _LONGEST_IN_ALL:
        raise UnsafeFileError(f"its guards have {length} characters in all", allowed=str(_LONGEST_IN_ALL))
    numbers = _number_inputs(program)
    for text in texts:
        check_guard(text, numbers)
