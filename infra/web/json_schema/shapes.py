"""The shapes of the values of keywords, as in the metaschema."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

from infra.errors import InvalidMessage
from infra.web.json_schema.evaluation import Check
from infra.web.json_schema.keywords import IS, is_integer, is_number
from infra.web.json_schema.patterns import CASELESS, COMPILE_WEIGHTS, compile_steps, matcher_of, pattern_size

_ONE_SCHEMA = (
    *("items", "contains", "additionalProperties", "propertyNames", "if", "then", "else", "not"),
    *("unevaluatedItems", "unevaluatedProperties", "contentSchema"),
)
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMA_MAPS = ("properties", "$defs", "definitions", "dependentSchemas")
_COUNTS = (
    *("maxLength", "minLength", "maxItems", "minItems", "maxContains", "minContains", "maxProperties"),
    "minProperties",
)
_NUMBERS = ("maximum", "minimum", "exclusiveMaximum", "exclusiveMinimum")
_BOOLEANS = ("uniqueItems", "deprecated", "readOnly", "writeOnly")
_STRINGS = (
    *("$id", "$schema", "$ref", "$anchor", "$comment", "title", "description", "format", "pattern"),
    *("contentEncoding", "contentMediaType"),
)


def check_shape(check: Check, schema: Any, path: str) -> None:
    """Raises InvalidMessage naming the first keyword whose value does not have its shape."""
    check.spend(1)
    if isinstance(schema, bool):
        return
    if not isinstance(schema, Mapping):
        raise InvalidMessage(path, "must be a schema: an object, true or false")
    for keyword, value in schema.items():
        # A part to which references point is checked for each of them.
        check.spend(1 + (len(value) // 16 if isinstance(value, Mapping | list) else 0))
        here = f"{path}.{keyword}"
        if keyword in _ONE_SCHEMA:
            check_shape(check, value, here)
        elif keyword in _SCHEMA_LISTS:
            _must(isinstance(value, list) and value, here, "must be a list of schemas that is not empty")
            for n, part in enumerate(value):
                check_shape(check, part, f"{here}[{n}]")
        elif keyword in _SCHEMA_MAPS:
            _must(isinstance(value, Mapping), here, "must be an object of schemas")
            for name, part in value.items():
                check_shape(check, part, f"{here}.{name}")
        elif keyword == "type":
            names = value if isinstance(value, list) and value else [value]
            fits = all(isinstance(name, str) and name in IS for name in names) and len(set(names)) == len(names)
            _must(fits, here, f"must be one or several of {', '.join(IS)}")
        elif keyword == "required":
            _must(_are_names(value), here, "must be a list of different names")
        elif keyword == "dependentRequired":
            fits = isinstance(value, Mapping) and all(map(_are_names, value.values()))
            _must(fits, here, "must be an object of lists of names")
        elif keyword in ("enum", "examples"):
            _must(isinstance(value, list), here, "must be a list")
        elif keyword in _COUNTS:
            _must(is_integer(value) and value >= 0, here, "must be an integer from 0")
        elif keyword in _NUMBERS:
            _must(is_number(value), here, "must be a number")
        elif keyword == "multipleOf":
            _must(is_number(value) and value > 0, here, "must be a number above 0")
        elif keyword in _BOOLEANS:
            _must(isinstance(value, bool), here, "must be true or false")
        elif keyword in _STRINGS:
            _must(isinstance(value, str), here, "must be a text")
            if keyword == "pattern":
                _check_pattern(check, here, value)


def _check_pattern(check: Check, path: str, pattern: str) -> None:
    """Raises InvalidMessage if neither Python nor Rust can read the pattern."""
    check.spend(compile_steps(pattern))
    # Python's compiler takes a second for a large class without case.
    if not CASELESS.search(pattern):
        try:
            # It warns of classes that a later version may read in another way.
            with warnings.catch_warnings(action="ignore"):
                re.compile(pattern)
            return
        except (re.error, OverflowError):
            pass
    size = pattern_size(pattern, COMPILE_WEIGHTS)
    _must(size <= 2_000 and matcher_of(pattern, size), path, "must be a regular expression")


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value) and len(set(value)) == len(value)


def _must(fits: object, path: str, reason: str) -> None:
    if not fits:
        raise InvalidMessage(path, reason)
