"""The two small languages inside a .pt2 archive, held to a grammar before torch evaluates them.

*Shape expressions* such as ``Mul(Integer(4), Symbol('s47', integer=True))`` go through ``sympy.sympify``, which is
``eval``. *Guards* such as ``L['x'].size()[0] == 2 * L['y'].size()[0]`` become the source of a function. Both are parsed
by ``ast``, and refused unless each node is on a list. Nothing is evaluated here.

A shape expression is also bounded, since sympy computes with it at once: a power of a power of a number can fill the
memory, and a product of sums can expand without end. So exponents are literals whose product along a path is at most
64, and the expression has at most 10000 terms when it is multiplied out.
"""

from __future__ import annotations

import ast
import math
import re

from surgery.errors import UnsafeFileError

__all__ = ["check_expression", "check_guard"]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_LONGEST = 4000
_MOST_TERMS = 10_000
_MOST_POWER = 64

_SYMBOL = re.compile(r"[a-z]{1,4}\d{1,6}", re.ASCII)
_NUMBER = re.compile(r"-?[0-9]{1,40}(\.[0-9]{0,40})?(e[+-]?[0-9]{1,3})?", re.ASCII)
_GUARD_TEXT = re.compile(r"[\w\[\]().,'<>=!+\-*/%: ]*", re.ASCII)
_KEY = re.compile(r"[\w.\-: ]*", re.ASCII)

_SUMS = frozenset(["Add", "And", "Or", "Tuple"])
_POWERS = frozenset(["Pow", "PowByNatural", "FloatPow", "LShift", "RShift"])
_FUNCTIONS = _words(
    "Abs CeilDiv CeilToInt CleanDiv Eq Equality FloatTrueDiv FloorDiv FloorToInt Ge GreaterThan Gt Identity "
    "IntTrueDiv IsNonOverlappingAndDenseIndicator Le LessThan Lt Max Min Mod ModularIndexing Ne Not Piecewise "
    "PythonMod RoundDecimal RoundToInt StrictGreaterThan StrictLessThan ToFloat TruncToFloat TruncToInt "
    "Unequality Where ceiling floor sqrt ExprCondPair"
)
_NAMES = frozenset(["true", "false", "oo", "int_oo", "nan"])
_SYMBOL_FACTS = _words("integer positive nonnegative negative real finite zero nonzero commutative")

_GUARD_CALLS = _words("max min abs int float round bool IsNonOverlappingAndDenseIndicator")
_GUARD_MODULES = {
    "math": _words("floor ceil trunc sqrt isnan inf nan"),
    "torch": _words("sym_max sym_min sym_float sym_int sym_not sym_ite sym_sqrt sym_sum"),
}
_GUARD_METHODS = frozenset(["size", "stride", "storage_offset", "dim", "numel"])


def _refuse(what: str, text: str) -> UnsafeFileError:
    return UnsafeFileError(f"its {what} {text[:60]!r} is more than arithmetic on sizes")


def _parse(text: str, what: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise _refuse(what, text) from None


def _is_integer(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 2**63


def _literal(node: ast.expr) -> float | None:
    """The number that a node spells out, or None."""
    match node:
        case ast.Constant(value=int() | float() as value) if type(value) is not bool and abs(value) < 2**63:
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _literal(operand)
            return None if inner is None else -inner
        case ast.Call(func=ast.Name(id="Integer"), args=[value], keywords=[]):
            return _literal(value)
        case ast.Call(func=ast.Name(id="Rational"), args=[top, bottom], keywords=[]):
            numerator, denominator = _literal(top), _literal(bottom)
            return numerator / denominator if numerator is not None and denominator else None
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str() as digits)], keywords=keywords):
            plain = all(each.arg == "precision" and _is_integer(each.value) for each in keywords)
            small = all((_literal(each.value) or 0) <= 128 for each in keywords)
            return float(digits) if plain and small and _NUMBER.fullmatch(digits) else None
    return None


def _is_symbol(node: ast.expr) -> bool:
    match node:
        case ast.Name(id=name):
            return name in _NAMES or _SYMBOL.fullmatch(name) is not None
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str() as name)], keywords=keywords):
            facts = all(
                each.arg in _SYMBOL_FACTS and isinstance(each.value, ast.Constant) and type(each.value.value) is bool
                for each in keywords
            )
            return facts and _SYMBOL.fullmatch(name) is not None
    return isinstance(node, ast.Constant) and type(node.value) is bool


class _Terms:
    """Counts the terms of a shape expression when multiplied out; raises at the first node that is not allowed."""

    def __init__(self, text: str) -> None:
        self.text = text

    def count(self, node: ast.expr, power: float = 1) -> float:
        if _literal(node) is not None or _is_symbol(node):
            return 1
        terms = self._operation(node, power)
        if terms > _MOST_TERMS:
            raise _refuse("expression", self.text)
        return terms

    def _operation(self, node: ast.expr, power: float) -> float:
        match node:
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() | ast.Not(), operand=operand):
                return self.count(operand, power)
            case ast.BinOp(left=left, op=ast.Pow(), right=right):
                return self._power(left, right, power)
            case ast.BinOp(left=left, op=ast.Add() | ast.Sub(), right=right):
                return self.count(left, power) + self.count(right, power)
            case ast.BinOp(left=left, op=ast.Mult() | ast.Div() | ast.FloorDiv() | ast.Mod(), right=right):
                return self.count(left, power) * self.count(right, power)
            case ast.Compare(left=left, comparators=[right]):
                return self.count(left, power) + self.count(right, power)
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]):
                return self._call(name, arguments, power)
        raise _refuse("expression", self.text)

    def _call(self, name: str, arguments: list[ast.expr], power: float) -> float:
        if name in _POWERS and len(arguments) == 2:
            return self._power(arguments[0], arguments[1], power)
        counts = [self.count(each, power) for each in arguments]
        if name == "Mul":
            return math.prod(counts)
        if name in _SUMS or name in _FUNCTIONS:
            return sum(counts)
        raise _refuse("expression", self.text)

    def _power(self, base: ast.expr, exponent: ast.expr, power: float) -> float:
        value = _literal(exponent)
        raised = power * max(1, abs(value)) if value is not None else math.inf
        if raised > _MOST_POWER or value is None:
            raise _refuse("expression", self.text)
        terms: float = self.count(base, raised) ** max(1, math.ceil(abs(value)))
        return terms


def check_expression(text: str) -> None:
    """Refuse a shape expression that is anything but bounded arithmetic on symbols and numbers."""
    if len(text) > _LONGEST or "\n" in text or "#" in text:
        raise _refuse("expression", text)
    _Terms(text).count(_parse(text, "expression"))


def _is_source(node: ast.expr) -> bool:
    """Whether a node is an input, or a part of one: ``L['x']``, ``L['x'][0].feature``."""
    match node:
        case ast.Name(id="L"):
            return True
        case ast.Subscript(value=inner, slice=ast.Constant(value=str() as key)):
            return _KEY.fullmatch(key) is not None and _is_source(inner)
        case ast.Subscript(value=inner, slice=key):
            return _is_integer(key) and _is_source(inner)
        case ast.Attribute(value=inner, attr=name):
            return not name.startswith("_") and _is_source(inner)
    return False


def _guard_parts(node: ast.expr) -> list[ast.expr] | None:
    """The operands of an allowed node, which are to be checked in turn; None where the node is not allowed."""
    match node:
        case ast.Constant(value=value):
            plain = type(value) in (bool, int, float) or (isinstance(value, str) and _KEY.fullmatch(value))
            return [] if plain else None
        case ast.BoolOp(values=values):
            return values
        case ast.UnaryOp(operand=operand):
            return [operand]
        case ast.BinOp(left=left, op=ast.Pow(), right=ast.Constant(value=2 | 3 | 4)):
            return [left]
        case ast.BinOp(left=left, op=op, right=right):
            allowed = isinstance(op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.FloorDiv | ast.Mod)
            return [left, right] if allowed else None
        case ast.Compare(left=left, comparators=comparators):
            return [left, *comparators]
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return [test, body, orelse]
        case ast.Name(id="inf") | ast.Attribute(value=ast.Name(id="math"), attr="inf" | "nan"):
            return []
        case ast.Call(func=called, args=arguments, keywords=[]):
            return _call_parts(called, arguments)
        case ast.Subscript(value=ast.Call() as value, slice=index) if _is_integer(index):
            return [value]
    return [] if _is_source(node) else None


def _call_parts(called: ast.expr, arguments: list[ast.expr]) -> list[ast.expr] | None:
    match called:
        case ast.Name(id=name) if name in _GUARD_CALLS:
            return arguments
        case ast.Attribute(value=ast.Name(id=module), attr=name) if module in _GUARD_MODULES:
            return arguments if name in _GUARD_MODULES[module] else None
        case ast.Attribute(value=source, attr=name) if name in _GUARD_METHODS and _is_source(source):
            return arguments if all(map(_is_integer, arguments)) else None
    return None


def check_guard(text: str) -> None:
    """Refuse a guard that is anything but a comparison of sizes, strides and constants of the inputs."""
    if len(text) > _LONGEST or not _GUARD_TEXT.fullmatch(text):
        raise _refuse("guard", text)
    pending = [_parse(text, "guard")]
    while pending:
        parts = _guard_parts(pending.pop())
        if parts is None:
            raise _refuse("guard", text)
        pending.extend(parts)
