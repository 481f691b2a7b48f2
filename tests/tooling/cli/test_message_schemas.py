"""Tests of the changes of a message that break readers, and of those that do not."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import pytest

from protos.envelope import Message
from tooling.cli.message_schemas import breaking, reads_back, schema

Field = tuple[str, Any] | tuple[str, Any, Any]


def message(*fields: Field) -> type[Message]:
    made = msgspec.defstruct("M", list(fields), bases=(Message,), frozen=True, kw_only=True)
    assert issubclass(made, Message)
    return made


def nested(*fields: Field) -> type[msgspec.Struct]:
    return msgspec.defstruct("Part", list(fields))


OLD: list[Field] = [("id", str), ("kind", Literal["a", "b"]), ("size", int, 0)]


@pytest.mark.parametrize(
    "new",
    [
        OLD,
        list(reversed(OLD)),
        [*OLD, ("note", str, "")],
        [*OLD, ("note", str | None, None)],
    ],
    ids=["the same", "another order", "new with default", "new and nullable"],
)
def test_a_compatible_change_passes(new: list[Field]) -> None:
    assert breaking(schema(message(*OLD)), schema(message(*new))) == []


@pytest.mark.parametrize(
    ("new", "problem"),
    [
        ([OLD[0], OLD[1]], ".size: removed"),
        ([OLD[1], OLD[2]], ".id: removed"),
        ([*OLD, ("note", str)], ".note: new and required"),
        ([("name", str), *OLD[1:]], ".id: removed"),
        ([("id", str, ""), *OLD[1:]], ".id: was required"),
        ([*OLD[:2], ("size", int)], ".size: is required"),
        ([OLD[0], ("kind", Literal["a"]), OLD[2]], '.kind: enum was ["a","b"], is ["a"]'),
        ([OLD[0], ("kind", Literal["a", "b", "c"]), OLD[2]], '.kind: enum was ["a","b"]'),
        ([("id", int), *OLD[1:]], '.id: was "string", is "integer"'),
        ([("id", str | None), *OLD[1:]], ".id: "),
        ([*OLD[:2], ("size", int, 1)], ".size: was 0, is 1"),
        ([*OLD[:2], ("size", float, 0)], '.size: was "integer", is "number"'),
    ],
)
def test_a_change_that_breaks_a_reader_is_named(new: list[Field], problem: str) -> None:
    problems = breaking(schema(message(*OLD)), schema(message(*new)))
    assert any(found.startswith(problem) for found in problems), problems


def test_a_constraint_that_appears_is_a_narrower_type() -> None:
    from typing import Annotated

    positive = Annotated[int, msgspec.Meta(ge=0)]
    assert breaking(schema(message(("n", int))), schema(message(("n", positive)))) == [".n: minimum was null, is 0"]


def test_the_same_holds_inside_lists_and_nested_structs() -> None:
    old = schema(message(("parts", list[nested(("x", int))])))  # type: ignore[misc]
    grown = schema(message(("parts", list[nested(("x", int), ("y", int, 0))])))  # type: ignore[misc]
    shrunk = schema(message(("parts", list[nested(("y", int, 0))])))  # type: ignore[misc]
    assert breaking(old, grown) == []
    assert breaking(old, shrunk) == [".parts.x: removed"]


def test_an_example_without_the_newer_fields_is_still_read() -> None:
    assert reads_back(message(("id", str), ("note", str, "")), b'{"id":"1"}') is None


@pytest.mark.parametrize(
    ("example", "wrong"),
    [
        (b'{"id":"1","gone":2}', ".gone is lost or changed"),
        (b'{"id":1}', "Expected `str`"),
        (b"{}", "missing required field `id`"),
        (b"{", "truncated"),
    ],
)
def test_an_example_that_its_struct_changes_is_named(example: bytes, wrong: str) -> None:
    assert wrong in (reads_back(message(("id", str)), example) or "")
