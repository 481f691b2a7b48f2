"""Documents of the search index, made from messages. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from infra.bus.dispatch import Decoded
from infra.observe.telemetry import extract
from protos.messages.logs import LogLine

# The fields of events that are searched and shown. This is a list of allowed fields, so that people's text, vendors'
# ids of people, and fields of later versions stay out of the index.
_OPEN_FIELDS = frozenset(
    (
        *("run_id", "session_key", "agent_id", "attempt", "attempts", "n", "step", "kind", "name", "status"),
        *("duration_ms", "error", "channel_id", "channel_type", "subject_id", "delivery_id", "received_at"),
        *("outcome", "reason"),
    )
)


class Document(NamedTuple):
    """A document for the index of one day."""

    id: str
    """Derived from the message, so that a repeated message overwrites its document."""
    at: datetime
    """Selects the index by its day (UTC)."""
    body: dict[str, Any]


def line(decoded: Decoded) -> Document:
    """Returns the document of a log line. Its field ``text`` is searched, its field ``tenant`` limits access."""
    message = decoded.message
    assert isinstance(message, LogLine)
    body = msgspec.to_builtins(message)
    tenant = message.data.get("tenant")
    body |= {
        "id": str(decoded.id),
        "tenant": tenant if isinstance(tenant, str) else None,
        "text": f"{message.message} {msgspec.json.encode(message.data).decode()}",
    }
    return Document(str(decoded.id), datetime.fromisoformat(message.timestamp), body)


def event(decoded: Decoded) -> Document:
    """Returns the document of an event of an agent or a channel, without personal content."""
    envelope = decoded.envelope()
    context = extract(decoded.headers)
    fields = msgspec.to_builtins(decoded.message)
    body = {
        "id": str(decoded.id),
        "timestamp": envelope.time.isoformat(),
        "type": envelope.type,
        "service": envelope.source,
        "tenant": envelope.tenant_id,
        "trace_id": f"{context.trace_id:032x}" if context else None,
        "run_id": fields.get("run_id"),
        "session_key": fields.get("session_key"),
        "data": {name: value for name, value in fields.items() if name in _OPEN_FIELDS},
    }
    return Document(str(decoded.id), envelope.time, body)
