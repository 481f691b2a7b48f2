"""What becomes of a message in the search index. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from infra.bus.dispatch import Decoded
from infra.observe.telemetry import extract
from protos.messages.logs import LogLine

# The fields of events that are searched and shown. A list of what may, not of what must not: the text of people,
# vendors' names for them, and whatever a later version adds, stay out.
_OPEN_FIELDS = frozenset(
    (
        *("run_id", "session_key", "agent_id", "attempt", "attempts", "n", "step", "kind", "name", "status"),
        *("duration_ms", "error", "channel_id", "channel_type", "subject_id", "delivery_id", "received_at"),
        *("outcome", "reason"),
    )
)


class Document(NamedTuple):
    """id: the same for the same message, so that a repeat overwrites. at: decides which day's index it is in."""

    id: str
    at: datetime
    body: dict[str, Any]


def line(decoded: Decoded) -> Document:
    """A log line; `text` is what a search looks through, `tenant` whose line it is."""
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
    """A fact of an agent or a channel, without personal content."""
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
