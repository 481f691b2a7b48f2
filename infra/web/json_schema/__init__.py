"""JSON Schemas (draft 2020-12) of tenants: checked when they are set up, and applied with a bound on the work.

A schema is a program of a stranger: a few kilobytes can ask for hours of work. So each evaluation of a keyword, each
compared value and each part of a pattern's work counts as a step, and after `MAX_STEPS` steps the check fails. Nothing
is fetched, and patterns run in time linear in the text. A pattern that such a matcher does not support (look-around,
back reference) is ignored, and left to the tool itself. ``format`` is not checked, as the draft has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from infra.errors import InvalidMessage
from infra.web.json_schema.evaluation import MAX_STEPS, Check, Schema
from infra.web.json_schema.keywords import KEYWORDS
from infra.web.json_schema.shapes import check_shape

__all__ = ["MAX_BYTES", "MAX_STEPS", "StepBudget", "check", "check_schema"]

MAX_BYTES = 32 * 1024
"""Of a schema."""
# Python's matcher would run the patterns of `patternProperties`, and one bad pattern stops it for minutes.
_REFUSED = ("$dynamicRef", "$recursiveRef", "patternProperties")
_ENDLESS = "is nested too deeply, or refers to itself without an end"


@dataclass
class StepBudget:
    """The steps that are left for the checks of several schemas, as one request brings them."""

    steps: int = 2 * MAX_STEPS


def check_schema(field: str, schema: Schema, budget: StepBudget | None = None) -> None:
    """Raises InvalidMessage if `schema` is not a JSON Schema of an object, is too large, or needs too much work.

    field: the place of the schema, with which the path in the error begins. budget: of this schema and others.
    """
    if budget and budget.steps <= 0:
        raise InvalidMessage(field, f"the schemas before it take {StepBudget.steps} steps together; make them smaller")
    try:
        encoded = msgspec.json.encode(schema)
        if len(encoded) > MAX_BYTES:
            raise InvalidMessage(field, f"must have at most {MAX_BYTES} bytes")
        steps, fault = _checked(field, encoded)
    except UnicodeEncodeError:
        raise InvalidMessage(field, "must be Unicode text") from None
    except RecursionError:
        raise InvalidMessage(field, _ENDLESS) from None
    if budget:
        budget.steps -= steps
    if fault:
        raise InvalidMessage(*fault)


@lru_cache(maxsize=256)
def _checked(field: str, encoded: bytes) -> tuple[int, tuple[str, str] | None]:
    """The steps of the check, and the field and reason of the fault. Cached, as some schemas come with each request."""
    schema = msgspec.json.decode(encoded)
    work = Check(field, schema, KEYWORDS)
    fault = None
    try:
        _check_schema(field, schema, work)
    except InvalidMessage as error:
        fault = error.field, error.reason
    except RecursionError:
        fault = field, _ENDLESS
    return MAX_STEPS - work.steps, fault


def _check_schema(field: str, schema: Any, work: Check) -> None:
    targets = []
    for path, keyword, value in _names(schema, field):
        if keyword in _REFUSED:
            raise InvalidMessage(path, "is not supported")
        if keyword == "$ref" and isinstance(value, str):
            if not value.startswith("#"):
                raise InvalidMessage(path, "must refer to a part of the same schema: nothing is fetched")
            work.field = path
            targets.append((path, work.resolve(value)))
    work.field = field
    if not _is_object(schema, work):
        raise InvalidMessage(f"{field}.type", "must be object")
    check_shape(work, schema, field)
    # A reference makes a schema of any part, also of one in an example or below an unknown keyword.
    for path, target in {id(target): (path, target) for path, target in targets}.values():
        check_shape(work, target, path)
    # The result does not matter; this finds references without an end.
    work.first_failure(schema, {}, ())


def _is_object(schema: Any, work: Check) -> bool:
    """Libraries put the whole schema of a recursive class below ``$defs``, and a reference to it at the root."""
    while isinstance(schema, Mapping) and "type" not in schema and isinstance(schema.get("$ref"), str):
        work.spend(1)
        schema = work.resolve(schema["$ref"])
    return isinstance(schema, Mapping) and schema.get("type") == "object"


def check(field: str, schema: Schema, value: Any) -> None:
    """Raises InvalidMessage if `value` does not fit the schema, or if the check takes more than `MAX_STEPS` steps.

    field: the name of the value, with which the path in the error begins (``arguments.items[2].price``).
    """
    try:
        failure = Check(field, schema, KEYWORDS).first_failure(schema, value, ())
    except RecursionError:
        raise InvalidMessage(field, "is nested too deeply, or its schema refers to itself without an end") from None
    if failure is None:
        return
    path = list(failure.path)
    rule = msgspec.json.encode(failure.rule).decode()[:300]
    match failure.keyword:
        case "required":
            path.append(next(name for name in failure.rule if name not in failure.value))
            reason = "missing"
        case "additionalProperties" | "unevaluatedProperties":
            known = failure.schema.get("properties", {})
            path += [name for name in failure.value if name not in known][:1]
            reason = "unknown"
        case "false":
            reason = "is not allowed"
        case "type" | "enum":
            reason = f"must be one of {rule}" if rule.startswith("[") else f"must be {failure.rule}"
        case keyword:
            # Not the value itself: it may be a secret.
            reason = f"does not fit {keyword} {rule}"
    raise InvalidMessage(_path(field, path), reason)


def _names(schema: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Every name and value in the schema. These are more than its keywords (a property may be called ``$ref``), so the
    check is only stricter."""
    if isinstance(schema, Mapping):
        for name, value in schema.items():
            yield f"{path}.{name}", name, value
            yield from _names(value, f"{path}.{name}")
    elif isinstance(schema, list):
        for n, value in enumerate(schema):
            yield from _names(value, f"{path}[{n}]")


def _path(field: str, path: Iterable[str | int]) -> str:
    return field + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
