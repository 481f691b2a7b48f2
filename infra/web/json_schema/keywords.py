"""The keywords of a schema, each with a function that tells whether a value fits its rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from pydantic import TypeAdapter
from pydantic_core import ValidationError as PatternMismatch

from infra.web.json_schema.evaluation import Check, Evaluate, Path, Result, Schema
from infra.web.json_schema.patterns import COMPILE_WEIGHTS, MAX_PATTERN_SIZE, compile_steps, matcher_of, pattern_size

_matchers: dict[str, tuple[TypeAdapter[str] | None, int]] = {}


def _ref(check: Check, ref: str, value: Any, schema: Schema, path: Path) -> Result:
    return check.first_failure(check.resolve(ref), value, path) or True


def _type(check: Check, rule: Any, value: Any, schema: Schema, path: Path) -> Result:
    return any(IS[name](value) for name in ([rule] if isinstance(rule, str) else rule))


def _enum(check: Check, rule: list[Any], value: Any, schema: Schema, path: Path) -> Result:
    wanted = check.canonical(value)
    return any(check.canonical(one) == wanted for one in rule)


def _const(check: Check, rule: Any, value: Any, schema: Schema, path: Path) -> Result:
    return check.canonical(rule) == check.canonical(value)


def _properties(check: Check, rule: Schema, value: Any, schema: Schema, path: Path) -> Result:
    if not isinstance(value, Mapping):
        return True
    check.spend(len(rule) // 16)
    for name, part in rule.items():
        if name in value and (failure := check.first_failure(part, value[name], (*path, name))):
            return failure
    return True


def _required(check: Check, rule: list[str], value: Any, schema: Schema, path: Path) -> Result:
    check.spend(len(rule) // 16)
    return not isinstance(value, Mapping) or all(name in value for name in rule)


def _additional_properties(check: Check, rule: Any, value: Any, schema: Schema, path: Path) -> Result:
    if not isinstance(value, Mapping):
        return True
    check.spend(len(value) // 16)
    known = schema.get("properties", {})
    return _each(check, rule, {name: item for name, item in value.items() if name not in known}, path)


def _each(check: Check, rule: Any, items: Mapping[str, Any] | Mapping[int, Any], path: Path) -> Result:
    if rule is False:
        return not items
    for name, item in items.items():
        if failure := check.first_failure(rule, item, (*path, name)):
            return failure
    return True


def _unevaluated_properties(check: Check, rule: Any, value: Any, schema: Schema, path: Path) -> Result:
    if not isinstance(value, Mapping):
        return True
    others = {name: part for name, part in schema.items() if name != "unevaluatedProperties"}
    known = check.evaluated_properties(others, value)
    return _each(check, rule, {name: item for name, item in value.items() if name not in known}, path)


def _property_names(check: Check, rule: Any, value: Any, schema: Schema, path: Path) -> Result:
    if isinstance(value, Mapping):
        for name in value:
            if failure := check.first_failure(rule, name, path):
                return failure
    return True


def _dependent_required(check: Check, rule: Schema, value: Any, schema: Schema, path: Path) -> Result:
    if not isinstance(value, Mapping):
        return True
    check.spend(sum(map(len, rule.values())) // 16 + len(rule) // 16)
    return all(name not in value or all(other in value for other in others) for name, others in rule.items())


def _dependent_schemas(check: Check, rule: Schema, value: Any, schema: Schema, path: Path) -> Result:
    if isinstance(value, Mapping):
        check.spend(len(rule) // 16)
        for name, part in rule.items():
            if name in value and (failure := check.first_failure(part, value, path)):
                return failure
    return True


def _items(check: Check, rule: Any, value: Any, schema: Schema, path: Path) -> Result:
    if not isinstance(value, list | tuple):
        return True
    check.spend(len(value) // 16)
    first = len(schema.get("prefixItems", ()))
    return _each(check, rule, dict(enumerate(value[first:], first)), path)


def _prefix_items(check: Check, rule: list[Any], value: Any, schema: Schema, path: Path) -> Result:
    if isinstance(value, list | tuple):
        for n, (part, item) in enumerate(zip(rule, value, strict=False)):
            if failure := check.first_failure(part, item, (*path, n)):
                return failure
    return True


def _unevaluated_items(check: Check, rule: Any, value: Any, schema: Schema, path: Path) -> Result:
    if not isinstance(value, list | tuple):
        return True
    others = {name: part for name, part in schema.items() if name != "unevaluatedItems"}
    known = check.evaluated_items(others, value)
    check.spend(len(value) // 16)
    return _each(check, rule, {n: item for n, item in enumerate(value) if n not in known}, path)


def _contains(check: Check, rule: Any, value: Any, schema: Schema, path: Path) -> Result:
    if not isinstance(value, list | tuple):
        return True
    found = sum(check.fits(rule, item) for item in value)
    return bool(schema.get("minContains", 1) <= found <= schema.get("maxContains", len(value)))


def _unique_items(check: Check, rule: bool, value: Any, schema: Schema, path: Path) -> Result:
    if not rule or not isinstance(value, list | tuple):
        return True
    return len(set(map(check.canonical, value))) == len(value)


def _all_of(check: Check, rule: list[Any], value: Any, schema: Schema, path: Path) -> Result:
    for part in rule:
        if failure := check.first_failure(part, value, path):
            return failure
    return True


def _any_of(check: Check, rule: list[Any], value: Any, schema: Schema, path: Path) -> Result:
    return any(check.fits(part, value) for part in rule)


def _one_of(check: Check, rule: list[Any], value: Any, schema: Schema, path: Path) -> Result:
    return sum(check.fits(part, value) for part in rule) == 1


def _not(check: Check, rule: Any, value: Any, schema: Schema, path: Path) -> Result:
    return not check.fits(rule, value)


def _if(check: Check, rule: Any, value: Any, schema: Schema, path: Path) -> Result:
    then = schema.get("then" if check.fits(rule, value) else "else", True)
    return check.first_failure(then, value, path) or True


def _pattern(check: Check, rule: str, value: Any, schema: Schema, path: Path) -> Result:
    if not isinstance(value, str):
        return True
    if rule not in _matchers:
        # Even if it is not compiled: to find its size reads the pattern.
        size = pattern_size(rule, COMPILE_WEIGHTS)
        check.spend(compile_steps(rule) + min(size, MAX_PATTERN_SIZE))
        if len(_matchers) >= 1_000:
            _matchers.clear()
        _matchers[rule] = matcher_of(rule, size), pattern_size(rule, {})
    matcher, positions = _matchers[rule]
    if matcher is None:
        return True
    check.spend(len(value) * positions // 64)
    try:
        matcher.validate_python(value)
    except PatternMismatch:
        return False
    return True


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: Any) -> bool:
    return is_number(value) and (isinstance(value, int) or value.is_integer())


IS: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": is_integer,
    "number": is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list | tuple),
    "object": lambda value: isinstance(value, Mapping),
}


def _compared(kind: str, size: Callable[[Any], Any], fits: Callable[[Any, Any], bool]) -> Evaluate:
    """A keyword that compares the size of values of one type with its rule."""
    return lambda check, rule, value, schema, path: not IS[kind](value) or fits(size(value), rule)


def _multiple_of(check: Check, rule: Any, value: Any, schema: Schema, path: Path) -> Result:
    if not is_number(value):
        return True
    if isinstance(value, float) and not math.isfinite(value):
        return False
    # Exact, by the decimal text: 0.3 is a multiple of 0.1 for a person, and not as binary fractions.
    number, unit = (Fraction(one) if isinstance(one, int) else Fraction(repr(one)) for one in (value, rule))
    check.spend(_words(number) * _words(unit))
    return number % unit == 0


def _words(number: Fraction) -> int:
    """The size in words of 128 bits; 0 for usual numbers."""
    return (number.numerator.bit_length() + number.denominator.bit_length()) // 128


def _at_most(size: Any, rule: Any) -> bool:
    return bool(size <= rule)


def _at_least(size: Any, rule: Any) -> bool:
    return bool(size >= rule)


KEYWORDS: dict[str, Evaluate] = {
    "$ref": _ref,
    "type": _type,
    "enum": _enum,
    "const": _const,
    "properties": _properties,
    "required": _required,
    "additionalProperties": _additional_properties,
    "unevaluatedProperties": _unevaluated_properties,
    "propertyNames": _property_names,
    "dependentRequired": _dependent_required,
    "dependentSchemas": _dependent_schemas,
    "items": _items,
    "prefixItems": _prefix_items,
    "unevaluatedItems": _unevaluated_items,
    "contains": _contains,
    "uniqueItems": _unique_items,
    "allOf": _all_of,
    "anyOf": _any_of,
    "oneOf": _one_of,
    "not": _not,
    "if": _if,
    "pattern": _pattern,
    "multipleOf": _multiple_of,
    "minimum": _compared("number", lambda value: value, _at_least),
    "maximum": _compared("number", lambda value: value, _at_most),
    "exclusiveMinimum": _compared("number", lambda value: value, lambda size, rule: bool(size > rule)),
    "exclusiveMaximum": _compared("number", lambda value: value, lambda size, rule: bool(size < rule)),
    "minLength": _compared("string", len, _at_least),
    "maxLength": _compared("string", len, _at_most),
    "minItems": _compared("array", len, _at_least),
    "maxItems": _compared("array", len, _at_most),
    "minProperties": _compared("object", len, _at_least),
    "maxProperties": _compared("object", len, _at_most),
}
