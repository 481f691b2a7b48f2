"""Exact arithmetic for models: fractions, and decimals only if a root or a power is irrational.

The grammar is a part of Python's: numbers, ``+ - * / // % **``, brackets and a few functions. ``ast`` parses it, this
module evaluates it. Every step is limited, so that no expression takes much time or memory.
"""

from __future__ import annotations

import ast
import decimal
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS = 1_000
MAX_DEPTH = 64
# Limit of numerator and denominator: numbers of about 3,000 digits.
MAX_BITS = 10_000
DIGITS = 28
# An exact value with more digits is rounded, because the reader pays by the token.
MAX_DIGITS = 1_000

_INEXACT = decimal.Context(
    prec=DIGITS + 10,
    Emax=4_000,
    Emin=-4_000,
    traps=[decimal.InvalidOperation, decimal.DivisionByZero, decimal.Overflow, decimal.Underflow],
)
# Signs that people use instead of Python's operators.
_SIGNS = str.maketrans({"^": "**", "×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"})
_CONSTANTS = {
    "pi": Fraction("3.14159265358979323846264338327950288420"),
    "e": Fraction("2.71828182845904523536028747135266249776"),
}


class CannotCalculate(Exception):
    """The expression is invalid, has no value, or exceeds a limit. The text gives the reason."""


class CalculatedValue(NamedTuple):
    """The value of an expression."""

    value: str
    """Decimal digits: all of them if `exact`, otherwise 28 significant ones, such as ``1.5E+40``."""
    exact: bool
    fraction: str
    """The exact value, such as ``1/3``, if `value` is rounded and the fraction is short. Otherwise empty."""


def calculate(expression: str) -> CalculatedValue:
    """Returns the value of `expression`. Raises CannotCalculate."""
    if len(expression) > MAX_CHARACTERS:
        raise CannotCalculate(f"an expression must have at most {MAX_CHARACTERS} characters")
    source = expression.translate(_SIGNS).strip()
    try:
        tree = ast.parse(source, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        raise CannotCalculate("is not an arithmetic expression") from None
    evaluation = _Evaluation(source)
    try:
        value = evaluation.of(tree.body, 0)
    except ZeroDivisionError:
        raise CannotCalculate("division by zero") from None
    except decimal.DecimalException:
        raise CannotCalculate("has no value, or its value exceeds the limits") from None
    return _answer(value, rational=evaluation.rational)


class _Evaluation:
    """Evaluates the nodes of one expression."""

    def __init__(self, source: str) -> None:
        self._source = source
        self.rational = True
        """All values so far are exact."""

    def of(self, node: ast.expr, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise CannotCalculate(f"must be at most {MAX_DEPTH} levels deep")
        match node:
            case ast.Constant(value=bool() | str() | bytes() | complex() | None):
                raise CannotCalculate("only numbers are supported")
            case ast.Constant():
                return self._number(node)
            case ast.Name(id=name) if name in _CONSTANTS:
                self.rational = False
                return _CONSTANTS[name]
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.of(operand, depth + 1)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -self.of(operand, depth + 1)
            case ast.BinOp(left=left, op=operator, right=right):
                return _limited(self._apply(operator, self.of(left, depth + 1), self.of(right, depth + 1)))
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
                return _limited(self._call(name, [self.of(argument, depth + 1) for argument in arguments]))
            case ast.Call(func=ast.Name(id=name)) | ast.Name(id=name):
                raise CannotCalculate(f"{name} is unknown; use one of {', '.join([*_FUNCTIONS, *_CONSTANTS])}")
            case _:
                raise CannotCalculate("only numbers, + - * / // % **, brackets and functions are supported")

    def _number(self, node: ast.Constant) -> Fraction:
        # From the text, because the tree holds a binary float, which differs from the number in the text.
        text = (ast.get_source_segment(self._source, node) or "").replace("_", "")
        if isinstance(node.value, int):
            return _limited(Fraction(node.value))
        number = decimal.Decimal(text)
        if abs(number.adjusted()) > _INEXACT.Emax:
            raise CannotCalculate("a number exceeds the limits")
        return _limited(Fraction(number))

    def _apply(self, operator: ast.operator, left: Fraction, right: Fraction) -> Fraction:
        match operator:
            case ast.Add():
                return left + right
            case ast.Sub():
                return left - right
            case ast.Mult():
                return left * right
            case ast.Div():
                return left / right
            case ast.FloorDiv():
                return Fraction(left // right)
            case ast.Mod():
                return left % right
            case ast.Pow():
                return self.power(left, right)
            case _:
                raise CannotCalculate("the operators are + - * / // % **")

    def power(self, base: Fraction, exponent: Fraction) -> Fraction:
        if exponent.denominator == 1:
            # The size is checked before the power is computed, because computing it could take all memory.
            if _bits(base) * abs(exponent.numerator) > MAX_BITS and abs(base) != 1:
                raise CannotCalculate("the power exceeds the limits")
            return base**exponent.numerator
        if exponent == Fraction(1, 2):
            return self.root(base)
        self.rational = False
        return Fraction(_INEXACT.power(_decimal(base), _decimal(exponent)))

    def root(self, number: Fraction) -> Fraction:
        if number >= 0:
            exact = Fraction(math.isqrt(number.numerator), math.isqrt(number.denominator))
            if exact**2 == number:
                return exact
        self.rational = False
        return Fraction(_INEXACT.sqrt(_decimal(number)))

    def _call(self, name: str, arguments: Sequence[Fraction]) -> Fraction:
        fewest, most, function = _FUNCTIONS[name]
        if not fewest <= len(arguments) <= most:
            raise CannotCalculate(f"{name} takes {fewest if fewest == most else f'{fewest} to {most}'} arguments")
        return function(self, *arguments)


def _round(_: _Evaluation, number: Fraction, places: Fraction = Fraction(0)) -> Fraction:
    if places.denominator != 1 or abs(places) > DIGITS:
        raise CannotCalculate(f"round takes an integer number of places up to {DIGITS}")
    # Halves are rounded away from zero, as people do. Python's round goes to the even number.
    factor = Fraction(10) ** places.numerator
    rounded = math.floor(abs(number) * factor + Fraction(1, 2)) / factor
    return rounded if number >= 0 else -rounded


# Name → lowest and highest number of arguments, and the function.
_FUNCTIONS: dict[str, tuple[int, int, Callable[..., Fraction]]] = {
    "abs": (1, 1, lambda _, number: abs(number)),
    "sqrt": (1, 1, _Evaluation.root),
    "round": (1, 2, _round),
    "floor": (1, 1, lambda _, number: Fraction(math.floor(number))),
    "ceil": (1, 1, lambda _, number: Fraction(math.ceil(number))),
    "min": (1, 100, lambda _, *numbers: min(numbers)),
    "max": (1, 100, lambda _, *numbers: max(numbers)),
    "sum": (1, 100, lambda _, *numbers: sum(numbers, Fraction(0))),
}


def _bits(number: Fraction) -> int:
    return max(number.numerator.bit_length(), number.denominator.bit_length())


def _limited(number: Fraction) -> Fraction:
    if _bits(number) > MAX_BITS:
        raise CannotCalculate("a number exceeds the limits")
    return number


def _decimal(number: Fraction) -> decimal.Decimal:
    return _INEXACT.divide(decimal.Decimal(number.numerator), decimal.Decimal(number.denominator))


def _answer(value: Fraction, *, rational: bool) -> CalculatedValue:
    if rational and (places := _places(value.denominator)) is not None:
        digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
        if len(digits) <= MAX_DIGITS:
            text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
            return CalculatedValue(f"-{text}" if value < 0 else text, True, "")
    rounded = _decimal(value).normalize(decimal.Context(prec=DIGITS))
    shown = format(rounded, "f" if abs(rounded.adjusted()) <= DIGITS else "E")
    fraction = f"{value.numerator}/{value.denominator}"
    return CalculatedValue(shown, False, fraction if rational and len(fraction) <= DIGITS else "")


def _places(denominator: int) -> int | None:
    """Returns the number of decimal places of a fraction with this denominator. None: infinitely many."""
    twos = fives = 0
    while denominator % 2 == 0:
        denominator, twos = denominator // 2, twos + 1
    while denominator % 5 == 0:
        denominator, fives = denominator // 5, fives + 1
    return max(twos, fives) if denominator == 1 else None
