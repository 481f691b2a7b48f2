"""The log line that every process writes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from protos.envelope import Message

# A string, for a datetime would be written with microseconds.
Milliseconds = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]


class LogLine(Message, frozen=True, kw_only=True):
    """One line. Its keys: timestamp, level, service, traceId, spanId, message, data; all are always there.

    timestamp: UTC, RFC 3339 with milliseconds and ``Z``.
    traceId, spanId: lower-case hexadecimal, null outside a trace.
    data: whatever belongs to the line; no secret and no personal content.
    """

    timestamp: Milliseconds
    level: Literal["debug", "info", "warn", "error", "fatal"]
    service: str
    trace_id: str | None = msgspec.field(name="traceId")
    span_id: str | None = msgspec.field(name="spanId")
    message: str
    data: dict[str, Any]
