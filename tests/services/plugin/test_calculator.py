"""The calculator is exact for every expression, and no expression makes it slow."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.plugin.tools.calculator import CalculatedValue, CannotCalculate, calculate

OPERATORS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "%": operator.mod,
    "//": lambda a, b: Fraction(a // b),
}
Term = tuple[str, Fraction]

numbers: st.SearchStrategy[Term] = st.decimals(-10_000, 10_000, places=3, allow_nan=False).map(
    lambda number: (f"({number})", Fraction(number))
)


@st.composite
def terms(draw: st.DrawFn, inner: st.SearchStrategy[Term]) -> Term:
    sign = draw(st.sampled_from(sorted(OPERATORS)))
    left, right = draw(inner), draw(inner)
    try:
        return f"({left[0]} {sign} {right[0]})", OPERATORS[sign](left[1], right[1])
    except ZeroDivisionError:
        return left


def value(answer: CalculatedValue) -> Fraction:
    return Fraction(answer.fraction or answer.value)


@given(st.recursive(numbers, terms, max_leaves=12))
def test_it_agrees_with_fractions(term: Term) -> None:
    text, expected = term
    answer = calculate(text)
    if answer.exact or answer.fraction:
        assert value(answer) == expected
    # If the value is rounded, the digits that are shown are right.
    assert abs(Fraction(answer.value) - expected) <= abs(expected) / 10**27
    assert answer.exact == (Fraction(answer.value) == expected)


@given(st.fractions(min_value=0, max_denominator=10**6), st.integers(-20, 20))
def test_powers_and_roots_of_squares_are_exact(base: Fraction, exponent: int) -> None:
    if base or exponent >= 0:
        answer = calculate(f"({base.numerator}/{base.denominator}) ** ({exponent})")
        assert abs(Fraction(answer.value) - base**exponent) <= abs(base**exponent) / 10**27
    root = calculate(f"sqrt({base.numerator}**2 / {base.denominator}**2)")
    assert abs(Fraction(root.value) - base) <= base / 10**27


@pytest.mark.parametrize(
    ("expression", "shown"),
    [
        ("0.1 + 0.2", "0.3"),
        ("1 / 3", "0.3333333333333333333333333333"),
        ("2 ^ 10 − 24", "1000"),
        ("12_000 × 1.19", "14280"),
        ("round(2.5)", "3"),
        ("round(-1.005, 2)", "-1.01"),
        ("sqrt(2)", "1.414213562373095048801688724"),
        ("-7 // 2", "-4"),
        ("max(1, sum(2, 3), abs(-4))", "5"),
        ("2 ** 0.5 * 2 ** 0.5 - sqrt(4)", "0"),
    ],
)
def test_common_expressions(expression: str, shown: str) -> None:
    answer = calculate(expression)
    assert answer.value == shown or abs(Fraction(answer.value) - Fraction(shown)) < Fraction(1, 10**27)


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("9**9**9", "exceeds the limits"),
        ("1e999999", "exceeds the limits"),
        ("1e2999 * 1e2999", "exceeds the limits"),
        ("10**3000 * 10**3000", "exceeds the limits"),
        ("1/0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("sqrt(-1)", "no value"),
        ("(-8) ** (1/3)", "no value"),
        ("-" * 500 + "1", "levels deep"),
        ("(" * 300 + "1" + ")" * 300, "not an arithmetic expression"),
        ("__import__('os').system('true')", "only numbers"),
        ("().__class__", "only numbers"),
        ("[x for x in (1,)]", "only numbers"),
        ("'a' * 9", "only numbers"),
        ("True + 1", "only numbers"),
        ("1j", "only numbers"),
        ("1 << 9", "the operators are"),
        ("x + 1", "x is unknown"),
        ("min()", "takes 1 to 100 arguments"),
        ("", "not an arithmetic expression"),
        ("\x00", "not an arithmetic expression"),
        ("1" * 1001, "1000 characters"),
    ],
)
def test_an_invalid_expression_is_refused_with_its_reason(expression: str, reason: str) -> None:
    with pytest.raises(CannotCalculate, match=reason):
        calculate(expression)


@settings(max_examples=300)
@given(st.text("0123456789.+-*/%^()e_ ,sqrtpiaboundmx", max_size=60))
def test_anything_typed_has_a_value_or_a_reason(text: str) -> None:
    with suppress(CannotCalculate):
        assert len(calculate(text).value) <= 1_100
