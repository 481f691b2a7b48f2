"""JSON Schemas that tenants bring: checked when they come, and applied without letting them cost the process.

A schema is somebody else's program. So it refers to nothing outside itself (nothing is fetched), how often it may
refer is limited, and its patterns run in time linear in the text; a pattern that such a matcher does not know
(look-around, back reference) is left to the tool itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Annotated, Any

import msgspec
from jsonschema import Draft202012Validator, FormatChecker, SchemaError, ValidationError
from jsonschema.validators import extend
from pydantic import StringConstraints, TypeAdapter
from pydantic_core import SchemaError as PatternError
from pydantic_core import ValidationError as PatternMismatch
from referencing import Registry
from referencing.exceptions import Unresolvable

from infra.errors import InvalidMessage

MAX_BYTES = 32 * 1024
MAX_REFERENCES = 1_000
# `patternProperties` would run Python's matcher, which one bad pattern stops for minutes.
_REFUSED = ("$dynamicRef", "$recursiveRef", "patternProperties")
_EMPTY: Registry[Any] = Registry()

Schema = Mapping[str, Any]


def check_schema(field: str, schema: Schema) -> None:
    """Raises InvalidMessage (`field` is where the schema stands) for what is no JSON Schema (draft 2020-12) of an
    object, or more than this takes."""
    try:
        encoded = msgspec.json.encode(schema)
        if len(encoded) > MAX_BYTES:
            raise InvalidMessage(field, f"larger than {MAX_BYTES} bytes")
        _check_schema(field, encoded)
    except SchemaError as error:
        raise InvalidMessage(_path(field, error.absolute_path), error.message[:300]) from None
    except UnicodeEncodeError:
        raise InvalidMessage(field, "is no Unicode text") from None
    except RecursionError:
        raise InvalidMessage(field, "is nested too deeply, or refers to itself without an end") from None


@lru_cache(maxsize=256)
def _check_schema(field: str, encoded: bytes) -> None:
    """Once for what comes with each request: it takes up to a quarter of a second."""
    schema = msgspec.json.decode(encoded)
    if schema.get("type") != "object":
        raise InvalidMessage(f"{field}.type", "must be object")
    Draft202012Validator.check_schema(schema, format_checker=_FORMATS)
    for path, keyword, value in _keywords(schema, field):
        if keyword in _REFUSED:
            raise InvalidMessage(path, "is not supported")
        if keyword == "$ref" and isinstance(value, str):
            _resolve(path, schema, value)
    # Whether it fits does not matter, only that the question has an answer.
    _mismatch(field, schema, {})


def check(field: str, schema: Schema, value: Any) -> None:
    """Raises InvalidMessage where `value` does not fit, its path beginning with `field`
    (``arguments.items[2].price``), or where the schema cannot be applied."""
    if (error := _mismatch(field, schema, value)) is None:
        return
    path = list(error.absolute_path)
    rule = msgspec.json.encode(error.validator_value).decode()[:300]
    match error.validator:
        case "required":
            path.append(next(name for name in error.validator_value if name not in error.instance))
            reason = "missing"
        case "additionalProperties" | "unevaluatedProperties":
            known = error.schema.get("properties", {})
            path += [name for name in error.instance if name not in known][:1]
            reason = "unknown"
        case "type" | "enum":
            reason = f"must be one of {rule}" if rule.startswith("[") else f"must be {error.validator_value}"
        case keyword:
            # Not the library's sentence: it repeats the value.
            reason = f"does not fit {keyword} {rule}"
    raise InvalidMessage(_path(field, path), reason)


def _mismatch(field: str, schema: Schema, value: Any) -> ValidationError | None:
    token = _references.set([MAX_REFERENCES])
    try:
        return next(_Validator(schema, registry=_EMPTY).iter_errors(value), None)
    except (Unresolvable, RecursionError):
        raise InvalidMessage(field, "the schema refers to what is not there, or to itself without an end") from None
    finally:
        _references.reset(token)


_references: ContextVar[list[int]] = ContextVar("references")


def _ref(validator: Any, ref: str, instance: Any, schema: Schema) -> Iterator[ValidationError]:
    left = _references.get()
    left[0] -= 1
    if left[0] < 0:
        raise RecursionError
    yield from validator._validate_reference(ref=ref, instance=instance)


def _pattern(validator: Any, pattern: str, instance: Any, schema: Schema) -> Iterator[ValidationError]:
    matcher = _matcher(pattern)
    if isinstance(instance, str) and matcher:
        try:
            matcher.validate_python(instance)
        except PatternMismatch:
            yield ValidationError("does not match")


@lru_cache(maxsize=1_000)
def _matcher(pattern: str) -> TypeAdapter[str] | None:
    """pydantic's matcher is Rust's ``regex``, which never backtracks."""
    try:
        return TypeAdapter(Annotated[str, StringConstraints(pattern=pattern)])
    except PatternError:
        return None


_FORMATS = FormatChecker(formats=())


@_FORMATS.checks("regex")  # type: ignore[untyped-decorator]
def _is_pattern(pattern: object) -> bool:
    """Valid is a pattern of Rust's or of Python's matcher: ``\\p{L}`` is one only of Rust's."""
    if not isinstance(pattern, str) or _matcher(pattern):
        return True
    try:
        re.compile(pattern)
    except re.error:
        return False
    return True


_Validator = extend(Draft202012Validator, {"$ref": _ref, "pattern": _pattern})


def _keywords(schema: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Every name and value in the schema. More than its keywords (a property may be called ``$ref``), which is only
    stricter."""
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            yield f"{path}.{name}", name, value
            yield from _keywords(value, f"{path}.{name}")
    elif isinstance(schema, list):
        for n, value in enumerate(schema):
            yield from _keywords(value, f"{path}[{n}]")


def _resolve(path: str, schema: Schema, ref: str) -> None:
    if not ref.startswith("#"):
        raise InvalidMessage(path, "must refer to a part of the same schema: nothing is fetched")
    try:
        _Validator(schema, registry=_EMPTY)._resolver.lookup(ref)
    except Unresolvable:
        raise InvalidMessage(path, "refers to what is not there") from None


def _path(field: str, path: Iterable[str | int]) -> str:
    return field + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
