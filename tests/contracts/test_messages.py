"""Every message's golden example is read, written again, and fits the committed schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import pytest

from protos.envelope import Message
from protos.messages.billing import UsageRecorded
from protos.messages.logs import LogLine
from tooling.cli.contracts import ROOT
from tooling.cli.message_schemas import messages, reads_back

SCHEMAS = ROOT / "protos" / "schemas"


@pytest.mark.parametrize("name", messages())
def test_the_golden_example_is_read_and_written_again(name: str) -> None:
    golden = (SCHEMAS / "golden" / f"{name}.json").read_bytes()
    assert reads_back(messages()[name], golden) is None


@pytest.mark.parametrize("name", messages())
def test_the_golden_example_fits_the_committed_schema(name: str) -> None:
    schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    golden = json.loads((SCHEMAS / "golden" / f"{name}.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(golden)


@pytest.mark.parametrize("name", messages())
def test_no_message_holds_a_float(name: str) -> None:
    """Money and tokens are counted in integers: a float would lose some."""

    def types(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            yield node.get("type")
            for value in node.values():
                yield from types(value)
        elif isinstance(node, list):
            for value in node:
                yield from types(value)

    schema = json.loads((SCHEMAS / f"{name}.json").read_text(encoding="utf-8"))
    assert "number" not in set(types(schema))


def test_a_log_line_has_exactly_the_agreed_keys() -> None:
    line = LogLine(
        timestamp="2026-03-01T09:30:00.125Z",
        level="info",
        service="agent",
        trace_id=None,
        span_id=None,
        message="up",
        data={},
    )
    keys = ["timestamp", "level", "service", "traceId", "spanId", "message", "data"]
    assert list(msgspec.json.decode(msgspec.json.encode(line))) == keys


@pytest.mark.parametrize(
    ("message", "field", "value"),
    [
        (UsageRecorded, "quantities", {"input_tokens": -1}),
        (UsageRecorded, "quantities", {"input_tokens": 1.5}),
        (UsageRecorded, "occurred_at", "2026-03-01T09:30:02"),
        (LogLine, "timestamp", "2026-03-01T09:30:02Z"),
        (LogLine, "level", "warning"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_field(message: type[Message], field: str, value: object) -> None:
    golden = json.loads((SCHEMAS / "golden" / f"{message.wire_name()}.json").read_text(encoding="utf-8"))
    with pytest.raises(msgspec.ValidationError, match=field):
        msgspec.convert({**golden, field: value}, message)


def test_a_field_that_the_reader_does_not_know_is_ignored() -> None:
    golden = json.loads((SCHEMAS / "golden" / "memory.v1.IndexDocument.json").read_text(encoding="utf-8"))
    message = messages()["memory.v1.IndexDocument"]
    assert msgspec.convert({**golden, "later": 1}, message) == msgspec.convert(golden, message)
