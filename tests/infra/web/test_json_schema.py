"""Somebody else's JSON Schema is applied, and cannot cost us more than a moment."""

from __future__ import annotations

from typing import Any

import pytest

from infra.errors import InvalidMessage
from infra.web.json_schema import check, check_schema

OBJECT: dict[str, Any] = {"type": "object"}


@pytest.mark.parametrize(
    ("schema", "arguments", "field"),
    [
        ({"required": ["to"]}, {}, "arguments.to"),
        ({"properties": {"to": {"type": "string"}}}, {"to": 1}, "arguments.to"),
        ({"properties": {"to": {}}, "additionalProperties": False}, {"to": 1, "cc": 2}, "arguments.cc"),
        (
            {"properties": {"items": {"items": {"properties": {"price": {"minimum": 0}}}}}},
            {"items": [{"price": 1}, {"price": -1}]},
            "arguments.items[1].price",
        ),
        ({"properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"enum": [1]}}}, {"a": 2}, "arguments.a"),
        ({"properties": {"code": {"pattern": "^[A-Z]{3}$"}}}, {"code": "abc"}, "arguments.code"),
        ({"properties": {"name": {"pattern": "^\\p{L}+$"}}}, {"name": "a1"}, "arguments.name"),
    ],
)
def test_what_does_not_fit_is_named(schema: dict[str, Any], arguments: dict[str, Any], field: str) -> None:
    check_schema("schema", OBJECT | schema)
    with pytest.raises(InvalidMessage) as refused:
        check("arguments", OBJECT | schema, arguments)
    assert refused.value.field == field


def test_the_value_itself_is_not_told() -> None:
    with pytest.raises(InvalidMessage) as refused:
        check("arguments", OBJECT | {"properties": {"card": {"maxLength": 3}}}, {"card": "4111-1111"})
    assert "4111" not in str(refused.value)


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels):
        schema = {"not": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ({"type": "string"}, "schema.type"),
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, "schema.properties.a.type"),
        ({"type": "object", "properties": {"a": {"$ref": "http://127.0.0.1/s"}}}, "schema.properties.a.$ref"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/b"}}}, "schema.properties.a.$ref"),
        ({"type": "object", "allOf": [{"$ref": "#"}]}, "schema"),
        ({"type": "object", "patternProperties": {"(a+)+$": {}}}, "schema.patternProperties"),
        ({"type": "object", "$dynamicRef": "#x"}, "schema.$dynamicRef"),
        ({"type": "object", "properties": {"a": {"pattern": "("}}}, "schema.properties.a.pattern"),
        ({"type": "object", "description": "x" * 40_000}, "schema"),
        ({"type": "object", "properties": {"a": nested(3_000)}}, "schema"),
        ({"type": "object", "title": "\ud800"}, "schema"),
    ],
)
def test_a_schema_that_is_none_or_too_much_is_refused(schema: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidMessage) as refused:
        check_schema("schema", schema)
    assert refused.value.field == field


def test_a_pattern_that_would_backtrack_for_ever_does_not() -> None:
    schema = OBJECT | {"properties": {"a": {"pattern": "^(a+)+$"}}}
    check_schema("schema", schema)
    with pytest.raises(InvalidMessage):
        check("arguments", schema, {"a": "a" * 5_000 + "b"})


def test_a_schema_that_doubles_at_each_level_is_given_up() -> None:
    levels = {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(40)}
    schema = OBJECT | {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": {**levels, "d40": {}}}
    check_schema("schema", schema)
    with pytest.raises(InvalidMessage):
        check("arguments", schema, {"a": 1})
