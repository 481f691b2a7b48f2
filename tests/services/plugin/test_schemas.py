"""Conversion of JSON Schemas of older drafts, and the removal of base64 from results."""

from __future__ import annotations

import base64
import os
from typing import Any

import pytest

from infra.errors import InvalidMessage
from infra.web.json_schema import check, check_schema
from infra.web.json_schema.drafts import MAX_DEPTH, adapted
from services.plugin.domain import without_base64
from services.plugin.files import ResultFiles


def properties(**schemas: Any) -> dict[str, Any]:
    return {"type": "object", "properties": schemas}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (None, {"type": "object"}),
        ({}, {"type": "object"}),
        ({"properties": None, "required": None}, {"type": "object"}),
        ({"type": ["object", "null"]}, {"type": "object"}),
        (properties(a={"default": None}), properties(a={"default": None})),
        (
            properties(pair={"type": "array", "items": [{"type": "string"}, {"type": "integer"}]}),
            properties(pair={"type": "array", "prefixItems": [{"type": "string"}, {"type": "integer"}]}),
        ),
        (
            properties(pair={"items": [{"type": "string"}], "additionalItems": False}),
            properties(pair={"prefixItems": [{"type": "string"}], "items": False}),
        ),
        (properties(a={"minimum": 1, "exclusiveMinimum": True}), properties(a={"exclusiveMinimum": 1})),
        (properties(a={"maximum": 1, "exclusiveMaximum": False}), properties(a={"maximum": 1})),
        (properties(a={"divisibleBy": 2}), properties(a={"multipleOf": 2})),
        (properties(a={"type": "any"}), properties(a={})),
        (properties(a={"type": "string", "nullable": True}), properties(a={"type": ["string", "null"]})),
        (properties(a={"type": "string", "nullable": False}), properties(a={"type": "string"})),
        (
            properties(a={"type": "string", "enum": ["x"], "nullable": True}),
            properties(a={"type": ["string", "null"], "enum": ["x", None]}),
        ),
        ({"type": "OBJECT", "properties": {"a": {"type": "STRING"}}}, properties(a={"type": "string"})),
        (properties(a={"type": "str"}, b={"type": ["int", "null"]}), properties(a={}, b={})),
        (properties(a={"items": [], "additionalItems": {"type": "ANY"}}), properties(a={"items": {}})),
        (properties(a={"type": "object"}) | {"nullable": True}, properties(a={"type": "object"})),
        (properties(a={"type": "string", "required": True}), properties(a={"type": "string"}) | {"required": ["a"]}),
        (
            properties(a={}) | {"dependencies": {"a": ["b"], "b": {"required": ["c"]}}},
            properties(a={}) | {"dependentRequired": {"a": ["b"]}, "dependentSchemas": {"b": {"required": ["c"]}}},
        ),
        (
            {"type": "object", "patternProperties": {"^x-": {"type": "string"}}, "additionalProperties": False},
            {"type": "object"},
        ),
        (
            properties(a={"$ref": "#/definitions/a"})
            | {
                "definitions": {"a": {"exclusiveMinimum": True, "minimum": 0}},
                "$schema": "http://json-schema.org/schema#",
            },
            properties(a={"$ref": "#/definitions/a"}) | {"definitions": {"a": {"exclusiveMinimum": 0}}},
        ),
        # A property may have the name of a keyword.
        (properties(items={"type": "string"}, required={"type": "boolean"}),) * 2,
    ],
)
def test_a_schema_of_an_older_draft_becomes_one_of_2020_12(old: Any, new: dict[str, Any]) -> None:
    assert adapted("schema", old) == new
    check_schema("schema", new)
    assert adapted("schema", new) == new


def test_an_adapted_schema_still_checks_arguments() -> None:
    schema = adapted("schema", properties(pair={"type": "array", "items": [{"type": "string"}, {"type": "integer"}]}))
    check("arguments", schema, {"pair": ["a", 1]})
    with pytest.raises(InvalidMessage) as refused:
        check("arguments", schema, {"pair": ["a", "b"]})
    assert refused.value.field == "arguments.pair[1]"


@pytest.mark.parametrize("schema", [[], "object", 1, True, {"type": "array"}, {"type": ["string"]}])
def test_a_schema_that_is_not_of_an_object_is_refused(schema: Any) -> None:
    with pytest.raises(InvalidMessage):
        adapted("schema", schema)


def test_the_depth_of_a_schema_is_limited() -> None:
    schema: dict[str, Any] = {}
    for _ in range(50_000):
        schema = {"not": schema}
    with pytest.raises(InvalidMessage, match=f"at most {MAX_DEPTH} levels"):
        adapted("schema", schema)
    while schema:  # Python would free it recursively.
        schema = schema.pop("not")


PICTURE = base64.b64encode(os.urandom(30_000)).decode()


@pytest.mark.parametrize(
    "text",
    [
        PICTURE,
        f"![chart](data:image/png;base64,{PICTURE})",
        base64.encodebytes(os.urandom(30_000)).decode(),
        base64.urlsafe_b64encode(os.urandom(30_000)).decode(),
    ],
)
def test_base64_is_replaced_by_a_note(text: str) -> None:
    found = without_base64({"text": f"before {text} after", "list": [text]})
    assert "base64 data left out" in found["text"]
    assert found["text"].startswith("before ")
    assert found["text"].endswith(" after")
    assert len(str(found)) < 400


@pytest.mark.parametrize(
    "text",
    ["word " * 5_000, "x" * 999, "\n".join(f"line {n}" for n in range(1_000)), "报告" * 5_000, "a/b-c_d.e" * 500],
)
def test_text_without_base64_is_kept(text: str) -> None:
    assert without_base64([text, 1, None]) == [text, 1, None]


def test_data_urls_of_a_result_are_files_beside_it() -> None:
    files = ResultFiles()
    small = base64.b64encode(b"GIF89a").decode()
    value = {
        "text": f"see ![sales](data:image/gif;base64,{small}) and data:text/plain;charset=utf-8;base64,aGk=.",
        "list": [f"data:image/png;base64,{small}", "data:image/png;base64,A", f"data:image/png;base64,{small}", 7],
        "more": f"[a](data:x/y;base64,{small}) [[[(data:;base64,{small}",
    }
    assert files.taken_out(value) == {
        "text": "see [file sales-1.gif: image/gif, 6 bytes] and [file file-2.txt: text/plain, 2 bytes].",
        "list": [
            "[file file-3.png: image/png, 6 bytes]",
            "[file left out: image/png, 0 bytes]",
            "[file file-4.png: image/png, 6 bytes]",
            7,
        ],
        "more": f"[file left out: x/y, 6 bytes] [[[(data:;base64,{small}",
    }
    assert [file.content for file in files.taken] == [b"GIF89a", b"hi", b"GIF89a", b"GIF89a"]


def test_the_search_for_data_urls_takes_linear_time() -> None:
    text = "![" * 200_000 + "data:a/a;base64,-" * 20_000
    assert ResultFiles().taken_out(text) == text
