"""The log line that every process writes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from protos.envelope import Message

# A string, because a datetime would be written with microseconds.
Milliseconds = Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")]


class LogLine(Message, frozen=True, kw_only=True):
    """One line. Every line has all the keys: timestamp, level, service, traceId, spanId, message, data."""

    timestamp: Milliseconds
    """UTC, RFC 3339 with milliseconds and ``Z``."""
    level: Literal["debug", "info", "warn", "error", "fatal"]
    service: str
    trace_id: str | None = msgspec.field(name="traceId")
    """Lower-case hexadecimal, null outside a trace."""
    span_id: str | None = msgspec.field(name="spanId")
    """Lower-case hexadecimal, null outside a trace."""
    message: str
    data: dict[str, Any]
    """Further values of the line; no secret and no personal content."""
