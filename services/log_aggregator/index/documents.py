"""Documents of the search index, made from messages. Pure."""

from __future__ import annotations

from datetime import datetime
from typing import Any, NamedTuple

import msgspec

from infra.bus.dispatch import Decoded
from infra.observe.telemetry import extract
from protos.messages.audit import ActAudited
from protos.messages.billing import UsageRecorded
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


class IndexedDocument(NamedTuple):
    """A document for the index of one day."""

    id: str
    """Derived from the message, so that a repeated message overwrites its document."""
    at: datetime
    """Selects the index by its day (UTC)."""
    body: dict[str, Any]


def line(decoded: Decoded) -> IndexedDocument:
    """Returns the document of a log line. Its field ``text`` is searched, its field ``tenant`` limits access."""
    message = decoded.message
    assert isinstance(message, LogLine)
    body = msgspec.to_builtins(message)
    body |= {
        "id": str(decoded.id),
        "tenant": _text(message.data.get("tenant")),
        **{name: _text(message.data.get(name)) for name in ("run_id", "channel_id")},
        "text": f"{message.message} {msgspec.json.encode(message.data).decode()}",
    }
    return IndexedDocument(str(decoded.id), datetime.fromisoformat(message.timestamp), body)


def usage(decoded: Decoded) -> IndexedDocument:
    """Returns the document of a usage record: an event whose tokens can be added up."""
    record = decoded.message
    assert isinstance(record, UsageRecorded)
    document = event(decoded)
    tokens = {unit: count for unit, count in record.quantities.items() if unit.endswith("_tokens")}
    facts = {"resource": record.resource, "agent_id": record.agent_id, "channel_id": record.channel_id}
    return IndexedDocument(
        document.id,
        record.occurred_at,
        document.body
        | {
            "timestamp": record.occurred_at.isoformat(),
            "tenant": record.tenant_id,
            # An event with a trace lets its tenant read the trace. A payer has no right to that.
            "trace_id": None,
            "data": {name: str(value) for name, value in facts.items() if value is not None} | tokens,
        },
    )


def act(decoded: Decoded) -> IndexedDocument:
    """Returns the document of an audited act, without its details. The chain in PostgreSQL is the record."""
    act = decoded.message
    assert isinstance(act, ActAudited)
    body = {
        "id": str(decoded.id),
        "timestamp": act.at.isoformat(),
        "tenant": act.tenant_id,
        **{name: getattr(act, name) for name in ("actor", "action", "object_kind", "object_id", "outcome")},
    }
    return IndexedDocument(str(decoded.id), act.at, body)


def event(decoded: Decoded) -> IndexedDocument:
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
    return IndexedDocument(str(decoded.id), envelope.time, body)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
