"""Check the shape expressions inside a .pt2 archive against a grammar and bounds, before torch evaluates them.

An expression such as ``Mul(Integer(4), Symbol('s47', integer=True))`` goes through ``sympy.sympify``, which is
``eval``, and sympy computes with it at once. A power of a power of a number can fill the memory, a product of sums
expands without end, and the maximum of many products takes minutes. Here an expression is parsed by ``ast`` and never
evaluated. Each node must be on a list. For each node, the reader bounds the terms that it has when multiplied out, and
the bits that its value can have.

    Mul(Add(s0, 1), Add(s1, s2))      2 * 2 = 4 terms; a symbol has 63 bits, a sum of two 65, so the product 130

The bounds are several times what real models need. The largest expression found in a real model, a Swin transformer
with open image sizes, has 11,273 characters and 815 nodes, of which at most 38 differ, nested 17 deep.
"""

from __future__ import annotations

import ast
import functools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from surgery.errors import FileError, UnsafeFileError
from surgery.text import cut, shown

__all__ = ["NUMBER", "TRUTH", "check_expression", "check_expressions_in_all", "check_sizes", "check_symbols"]

_LONGEST = 40_000  # characters
_LONGEST_IN_ALL = 1_000_000  # characters of all expressions of a file; that Swin transformer has 595,271
_LONGEST_DIFFERENT = 250_000  # characters of the different ones; it has 167,745
_MOST_NODES = 4000
_MOST_DIFFERENT = 150  # different nodes
_DEEPEST = 50
_MOST_TERMS = 1000  # of an expression that is multiplied out
_MOST_BITS = 4096  # of any value in it
_MOST_POWER = 64

_SYMBOL = re.compile(r"(?:s|u|zf|zuf)\d{1,6}", re.ASCII)
_SYMBOLS = re.compile(rf"\b{_SYMBOL.pattern}\b", re.ASCII)
_SIZE_BITS = 63
_FACTS = frozenset(["integer", "positive", "nonnegative", "negative", "real", "finite"])
_FLOAT = re.compile(r"-?[0-9]{1,40}(\.[0-9]{0,40})?(e[+-]?[0-9]{1,2})?", re.ASCII)
_FLOAT_BITS = 400  # 10^99 and its inverse

NUMBER, TRUTH = "number", "truth value"


@dataclass(frozen=True)
class _Value:
    """What is known of a part of an expression: its kind, its terms when multiplied out, and its most bits."""

    kind: str
    terms: float = 1
    bits: float = 1
    exponent: float | None = None  # the literal number that it is, if it may be an exponent


ExpressionRule = Callable[[Sequence[_Value]], _Value]


def _sum(parts: Sequence[_Value]) -> _Value:
    return _Value(NUMBER, sum(each.terms for each in parts), max(each.bits for each in parts) + len(parts))


def _product(parts: Sequence[_Value]) -> _Value:
    return _Value(NUMBER, math.prod(each.terms for each in parts), sum(each.bits for each in parts))


def _opaque(parts: Sequence[_Value]) -> _Value:
    """A function that sympy does not multiply out, and whose value is about as large as its arguments at most."""
    return _Value(NUMBER, 1, max(each.bits for each in parts) + 1)


def _quotient(parts: Sequence[_Value]) -> _Value:
    return _Value(NUMBER, 1, sum(each.bits for each in parts))


def _truth(_: Sequence[_Value]) -> _Value:
    return _Value(TRUTH)


def _power(parts: Sequence[_Value]) -> _Value:
    base, exponent = parts[0], parts[1].exponent
    if exponent is None or abs(exponent) > _MOST_POWER:
        return _Value(NUMBER, math.inf)
    times = max(1, math.ceil(abs(exponent)))
    return _Value(NUMBER, base.terms**times, base.bits * times)


def _shift(parts: Sequence[_Value]) -> _Value:
    count = parts[1].exponent
    return _Value(NUMBER, parts[0].terms, parts[0].bits + (math.inf if count is None else abs(count)))


@dataclass(frozen=True)
class _Function:
    """How many arguments of which kinds a function takes (the last kind repeats), and the rule for its value."""

    fewest: int
    most: int
    kinds: tuple[str, ...]
    rule: ExpressionRule


def _functions(names: str, fewest: int, most: int, rule: ExpressionRule, *kinds: str) -> dict[str, _Function]:
    return {name: _Function(fewest, most, kinds or (NUMBER,), rule) for name in names.split()}


_FUNCTIONS = {
    **_functions("Add", 2, 64, _sum),
    **_functions("Mul", 2, 32, _product),
    **_functions("Max Min", 2, 12, _opaque),
    **_functions("FloorDiv CeilDiv CleanDiv IntTrueDiv FloatTrueDiv", 2, 2, _quotient),
    **_functions("Mod PythonMod", 2, 2, _opaque),
    **_functions("Pow PowByNatural FloatPow", 2, 2, _power),
    **_functions("LShift RShift RoundDecimal", 2, 2, _shift),
    **_functions("Abs CeilToInt FloorToInt TruncToInt TruncToFloat RoundToInt ToFloat Identity", 1, 1, _opaque),
    **_functions("ceiling floor", 1, 1, _opaque),
    **_functions("Where", 3, 3, _opaque, TRUTH, NUMBER),
    **_functions("Eq Equality Ne Unequality", 2, 2, _truth),
    **_functions("Ge GreaterThan Gt StrictGreaterThan Le LessThan Lt StrictLessThan", 2, 2, _truth),
    **_functions("And Or", 2, 12, _truth, TRUTH),
    **_functions("Not", 1, 1, _truth, TRUTH),
}
# Python's operators -> the functions that sympy takes them for
_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "Add",
    ast.Sub: "Add",
    ast.Mult: "Mul",
    ast.Div: "FloatTrueDiv",
    ast.FloorDiv: "FloorDiv",
    ast.Mod: "Mod",
    ast.Pow: "Pow",
    ast.UAdd: "Identity",
    ast.USub: "Identity",
    ast.Not: "Not",
    ast.Eq: "Eq",
    ast.NotEq: "Ne",
    ast.Lt: "Lt",
    ast.LtE: "Le",
    ast.Gt: "Gt",
    ast.GtE: "Ge",
}


def _literal(node: ast.expr) -> _Value | None:
    """Return what is known of a literal number, truth value or symbol; None for any other node."""
    match node:
        case ast.Constant(value=bool()) | ast.Name(id="true" | "false"):
            return _Value(TRUTH)
        case ast.Constant(value=int() as value) if value < 2**63:
            return _Value(NUMBER, bits=value.bit_length(), exponent=value)
        case ast.Constant(value=float() as value) if value < 2**63:
            return _Value(NUMBER, bits=_FLOAT_BITS, exponent=value)
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float()) as operand):
            inner = _literal(operand)
            return None if inner is None or inner.exponent is None else _negative(inner)
        case ast.Name(id=name) if _SYMBOL.fullmatch(name):
            return _Value(NUMBER, bits=_SIZE_BITS)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=keywords):
            return _named_literal(name, arguments, keywords)
    return None


def _negative(value: _Value) -> _Value:
    return _Value(NUMBER, bits=value.bits, exponent=-(value.exponent or 0))


def _named_literal(name: str, arguments: list[ast.expr], keywords: list[ast.keyword]) -> _Value | None:
    match name, arguments:
        case "Symbol", [ast.Constant(value=str() as text)] if _SYMBOL.fullmatch(text):
            plain = all(each.arg in _FACTS and _is_true(each.value) for each in keywords)
            return _Value(NUMBER, bits=_SIZE_BITS) if plain else None
        case "Integer", [value] if not keywords:
            inner = _literal(value)
            return inner if inner is not None and isinstance(inner.exponent, int) else None
        case "Rational", [top, bottom] if not keywords:
            return _fraction(_literal(top), _literal(bottom))
        case "Float", [ast.Constant(value=str() as digits)] if _FLOAT.fullmatch(digits):
            plain = all(each.arg == "precision" and _is_double(each.value) for each in keywords)
            return _Value(NUMBER, bits=_FLOAT_BITS, exponent=float(digits)) if plain else None
    return None


def _is_true(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _is_double(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value == 53


def _fraction(top: _Value | None, bottom: _Value | None) -> _Value | None:
    """Return a fraction. It may not be an exponent: sympy keeps roots of numbers, and sums of roots take long."""
    if top is None or bottom is None or not isinstance(top.exponent, int) or not isinstance(bottom.exponent, int):
        return None
    return _Value(NUMBER, bits=top.bits + bottom.bits) if bottom.exponent else None


@dataclass
class _Reader:
    """Reads one expression part by part; raises at the first part that is not allowed or too large."""

    text: str
    nodes: int = 0
    numbers: dict[tuple[object, ...], int] = field(default_factory=dict)  # a different part -> its number

    def refuse(self, what: str = "is more than arithmetic on sizes") -> NoReturn:
        raise UnsafeFileError(f"its expression {cut(shown(self.text), 60)} {what}")

    def read(self, node: ast.expr, depth: int = 0) -> tuple[_Value, int]:
        """Return what is known of a part, and its number, which is the same for equal parts."""
        # A part is identified by its function and the numbers of its operands, so that comparing parts stays cheap:
        # in s0 + s0 * 2, s0 is part 0 both times, 2 is part 1, (Mul, 0, 1) is part 2, and (Add, 0, 2) is part 3.
        self.nodes += 1
        if self.nodes > _MOST_NODES or depth > _DEEPEST:
            self.refuse(f"has more than {_MOST_NODES} parts, or more than {_DEEPEST} nested in each other")
        value, key = self._read(node, depth)
        if value.terms > _MOST_TERMS or value.bits > _MOST_BITS:
            self.refuse(f"could have more than {_MOST_TERMS} terms or {_MOST_BITS} bits")
        number = self.numbers.setdefault(key, len(self.numbers))
        if number > _MOST_DIFFERENT:
            self.refuse(f"has more than {_MOST_DIFFERENT} different parts")
        return value, number

    def _read(self, node: ast.expr, depth: int) -> tuple[_Value, tuple[object, ...]]:
        value = _literal(node)
        if value is not None:
            return value, (ast.dump(node),)
        name, operands = _operands(node)
        function = _FUNCTIONS.get(name)
        if function is None or not function.fewest <= len(operands) <= function.most:
            self.refuse()
        parts = [self.read(each, depth + 1) for each in operands]
        values = [value for value, _ in parts]
        kinds = [*function.kinds, *[function.kinds[-1]] * len(parts)]
        if any(value.kind != kind for value, kind in zip(values, kinds, strict=False)):
            self.refuse()
        return function.rule(values), (type(node), name, *[number for _, number in parts])


def _operands(node: ast.expr) -> tuple[str, list[ast.expr]]:
    """Return the function that a node applies and its operands; an empty name for a node that applies none."""
    match node:
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
            return name, arguments
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS.get(type(op), ""), [left, right]
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS.get(type(op), ""), [operand]
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _OPERATORS.get(type(op), ""), [left, right]
    return "", []


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> _Value:
    reader = _Reader(text)
    if len(text) > _LONGEST:
        reader.refuse(f"has more than {_LONGEST} characters")
    if "\n" in text or "#" in text:
        reader.refuse()
    try:
        return reader.read(ast.parse(text, mode="eval").body)[0]
    except UnsafeFileError:
        raise
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        reader.refuse()


def check_expression(text: str, kind: str = NUMBER) -> None:
    """Raise UnsafeFileError unless a shape expression is bounded arithmetic on symbols and numbers, of this kind."""
    if _read(text).kind != kind:
        raise UnsafeFileError(f"its expression {cut(shown(text), 60)} is not a {kind}, which is needed there")


def check_sizes(texts: Iterable[str]) -> None:
    """Raise UnsafeFileError if the product of a tensor's sizes has too many terms: torch multiplies it out."""
    terms = math.prod(_read(text).terms for text in texts)
    if terms > _MOST_TERMS:
        raise UnsafeFileError(
            "the product of the sizes of one of its tensors has too many terms", allowed=f"{_MOST_TERMS}"
        )


def check_symbols(names: Iterable[str]) -> None:
    """Raise UnsafeFileError for a symbol whose name is not of the form that torch gives."""
    if strange := next((name for name in names if not _SYMBOL.fullmatch(name)), None):
        raise UnsafeFileError(f"it names a size {cut(shown(strange), 60)}", allowed="symbols such as s77 or u0")


def check_expressions_in_all(texts: Iterable[str], symbols: Collection[str]) -> None:
    """Check all expressions of a file together: their total length, and that each symbol has a range.

    Raises UnsafeFileError if there are more than any model has, and FileError for a symbol without a range.
    """
    lengths = Counter(texts)
    used = {name for text in lengths for name in _SYMBOLS.findall(text)}
    if strange := next((name for name in sorted(used) if name not in symbols), None):
        raise FileError(f"its sizes use {strange}, which has no range", next_step="export it again")
    whole, different = sum(len(text) * times for text, times in lengths.items()), sum(map(len, lengths))
    if whole > _LONGEST_IN_ALL or different > _LONGEST_DIFFERENT:
        raise UnsafeFileError(
            f"its expressions have {whole} characters in all, and {different} in the different ones",
            allowed=f"{_LONGEST_IN_ALL} and {_LONGEST_DIFFERENT}",
        )
