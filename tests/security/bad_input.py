"""Bad input for each parameter and each field of a body, made from the OpenAPI pages."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple
from urllib.parse import quote

from tests.security.pages import Operation, example, filled, resolved

NUL, SURROGATE = "a\0b", "a\ud800b"
TIMES = (
    "0001-01-01T00:00:00+14:00",
    "9999-12-31T23:59:59.999999-12:00",
    "2026-02-30T00:00:00Z",
    "-271821-04-20T00:00:00Z",
    "2026-01-01T00:00:00",
    "99999999999999999999",
)
NO_TIMES_IN_UTC = ("0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00")
TEXTS = ("", " ", NUL, SURROGATE, "é\u202e\U0001f600", "x" * 300_000, "../../x", "%00", *TIMES)
NUMBERS = (-1, 0, 2**31, 2**63, -(2**63) - 1, 10**400, 1.5, 1e308, True)
WRONG: tuple[Any, ...] = (None, [], {}, [[]], "x", -1)
URL = "http://127.0.0.1:9/"
_UUID = "00000000-0000-4000-8000-000000000000"
# Bodies that are not JSON, or do not have the right shape.
BODIES = (
    b"",
    b"{",
    b"null",
    b"[]",
    b'"x"',
    b"\xff\xfe{}",
    b'{"a":NaN}',
    b"[" * 900 + b"]" * 900,
    b'{"a":' * 900 + b"1" + b"}" * 900,
    b'{"a":"\\ud800"}',
    b'{"\\u0000":1}',
    b"1" * 5000,
)
CONTENT_TYPES = (
    "application/json",
    "",
    "text/plain",
    "multipart/form-data",
    "multipart/form-data; boundary=",
    "multipart/form-data; boundary=x",
    "application/x-www-form-urlencoded",
    "\xe9",
)
CURSORS = tuple(
    base64.urlsafe_b64encode(text.encode("utf-8", "surrogatepass")).decode()
    for text in (
        *(f"{time} {_UUID}" for time in TIMES),
        f"2026-01-01T00:00:00Z {NUL}",
        _UUID,
        "-1",
        "9" * 30,
        SURROGATE,
        NUL,
        "",
        "a b c",
        "{}",
    )
)
# In a URL: percent signs that are not UTF-8, and values that each parser may read in its own way.
URL_TEXTS = ("%00", "%ED%A0%80", "%FF", "%", "%C3%A9", "..%2f..%2fx", "x" * 3000, "-1", "9" * 40, "1e400", "NaN", "%20")
HEADERS = ("", "\xe9", "x" * 300, "-1", "9" * 40, "a\tb")


class Bad(NamedTuple):
    """One request."""

    path: str
    query: str = ""
    body: bytes | None = None
    headers: Mapping[str, str] = {}


def requests(op: Operation, things: Mapping[str, str]) -> list[Bad]:
    """All bad requests to one operation. Everything but one part of each is good.

    things: the part of a path before an id → an id that exists.
    """
    path = filled(op.path, things)
    body = None if op.body is None else _encoded(op.example())
    found = []
    for parameter in op.parameters:
        name = parameter["name"]
        match parameter["in"]:
            case "path":
                start, _, rest = op.path.partition(f"{{{name}}}")
                found += [Bad(f"{filled(start, things)}{text}{filled(rest, things)}", body=body) for text in URL_TEXTS]
            case "query":
                values = (*URL_TEXTS, *(CURSORS if name == "cursor" else map(quote, TIMES)))
                found += [Bad(path, f"{name}={text}", body) for text in values]
            case "header":
                found += [Bad(path, body=body, headers={name: text}) for text in HEADERS]
    if op.method not in ("GET", "DELETE"):
        pairs = product(BODIES, CONTENT_TYPES[:1]) if op.body is not None else product(BODIES[:8], CONTENT_TYPES)
        found += [Bad(path, body=raw, headers={"content-type": kind} if kind else {}) for raw, kind in pairs]
    if op.body is not None:
        found += [Bad(path, body=_encoded(value)) for value in _values(op.body, op.schemas)]
    return found


def times(op: Operation, path: str) -> Iterator[tuple[str, Bad]]:
    """(field, request) for each place of a time in a query or a body: the time is none in UTC."""
    for time in NO_TIMES_IN_UTC:
        for parameter in op.parameters:
            if parameter["in"] == "query" and _is_time(resolved(parameter["schema"], op.schemas)):
                yield parameter["name"], Bad(path, f"{parameter['name']}={quote(time)}")
        if op.body is not None:
            for field, value in _with_time(op.body, op.schemas, time):
                yield field, Bad(path, body=_encoded(value))


def _is_time(schema: Mapping[str, Any]) -> bool:
    return schema.get("format") == "date-time"


def _with_time(
    schema: Mapping[str, Any], schemas: Mapping[str, Any], time: str, depth: int = 0
) -> Iterator[tuple[str, Any]]:
    """(field, value) for each time within the schema: a good value, but for the time."""
    schema = resolved(schema, schemas)
    if _is_time(schema):
        yield "", time
    elif depth < 4:
        if schema.get("type") == "array":
            for field, value in _with_time(schema.get("items", {}), schemas, time, depth + 1):
                yield f"[0]{field}", [value]
        good = example(schema, schemas)
        for name, part in schema.get("properties", {}).items():
            for field, value in _with_time(part, schemas, time, depth + 1):
                yield f"{name}{'.' if field[:1].isalpha() else ''}{field}", {**good, name: value}


def _encoded(value: Any) -> bytes:
    # Tests go to no other machine, so every address becomes one of this machine.
    return re.sub(r"https?://[^/\"\\]*/?", URL, json.dumps(value)).encode()


def _values(schema: Mapping[str, Any], schemas: Mapping[str, Any], depth: int = 0) -> Iterator[Any]:
    """Bad values for the schema; in an object or an array, one part of each is bad."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    for option in schema.get("anyOf") or schema.get("oneOf") or ():
        if option.get("type") != "null":
            yield from _values(option, schemas, depth)
    match schema.get("type"):
        case "string":
            yield from (*TEXTS, *WRONG[:4], 1)
        case "integer" | "number":
            yield from (*NUMBERS, *WRONG[:5])
        case "boolean":
            yield from (None, "x", 2)
        case "array":
            yield from (None, {}, "x", [None], [{}], ["x"] * 20_000)
            if depth < 4:
                yield from ([value] for value in _values(schema.get("items", {}), schemas, depth + 1))
        case "object":
            yield from WRONG
            good = example(schema, schemas)
            free = {key: value for value in WRONG for key in ("", "x", NUL, SURROGATE)}
            yield {**good, **free} if isinstance(good, dict) else free
            if depth < 4:
                for name, field in schema.get("properties", {}).items():
                    for value in _values(field, schemas, depth + 1):
                        yield {**good, name: value}
