"""The envelope of every message: CloudEvents attributes, trace context, tenant.

CloudEvents 1.0, Kafka binary content mode: attributes are headers with the prefix ``ce_``, and the value holds only the
data. RabbitMQ messages have the same keys in their headers table, so one reader serves both buses.
"""

from __future__ import annotations

from datetime import datetime
from functools import cache
from typing import Any, ClassVar
from uuid import UUID

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=False):
    """A public fact or command. Its wire name is ``<owner>.v<version>.<Class>``; the owner is its module's name.

    A reader ignores unknown fields, so that an older reader can read the messages of a newer writer.
    """

    VERSION: ClassVar[int] = 1

    @classmethod
    def wire_name(cls) -> str:
        return _wire_name(cls)


@cache
def _wire_name(type_: type[Message]) -> str:
    owner = type_.__module__.rpartition(".")[2]
    return f"{owner}.v{type_.VERSION}.{type_.__name__}"


class Envelope(msgspec.Struct, frozen=True, kw_only=True):
    """The attributes of a message."""

    id: UUID
    """Every consumer drops repeats by it."""
    source: str
    type: str
    time: datetime
    subject: str | None = None
    """The key of the message."""
    sequence: int | None = None
    """The message's position among those of its key, from 1, if the receiver must keep their order."""
    tenant_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None

    def headers(self) -> dict[str, str]:
        """The header table. Only UTF-8 strings, which Kafka and RabbitMQ clients of any language can read."""
        headers: dict[str, str] = msgspec.to_builtins(self._table())
        return headers

    def headers_json(self) -> str:
        """The header table as JSON. Every message of the outbox has one, so it is written without a dict."""
        return msgspec.json.encode(self._table()).decode()

    def _table(self) -> _HeaderTable:
        return _HeaderTable(
            self.id,
            self.source,
            self.type,
            "1.0",
            self.time,
            "application/json",
            self.subject,
            None if self.sequence is None else str(self.sequence),
            self.tenant_id,
            self.traceparent,
            self.tracestate,
        )


class _HeaderTable(msgspec.Struct, omit_defaults=True, rename={"content_type": "content-type"}):
    """The headers in their order; those that are None are left out."""

    ce_id: UUID
    ce_source: str
    ce_type: str
    ce_specversion: str
    ce_time: datetime
    content_type: str
    ce_subject: str | None = None
    ce_sequence: str | None = None
    tenant_id: str | None = None
    traceparent: str | None = None
    tracestate: str | None = None


def read_headers(headers: dict[str, Any]) -> Envelope:
    """Reads the header table back.

    Raises ValueError naming the header that is missing or malformed.
    """

    def required(name: str) -> str:
        value = headers.get(name)
        if not isinstance(value, str):
            raise ValueError(f"header {name}: missing" if value is None else f"header {name}: not a string")
        return value

    def optional(name: str) -> str | None:
        return required(name) if name in headers else None

    if required("ce_specversion") != "1.0":
        raise ValueError(f"header ce_specversion: {headers['ce_specversion']!r} is not 1.0")
    try:
        message_id = UUID(required("ce_id"))
    except ValueError as error:
        raise ValueError(f"header ce_id: {error}") from error
    try:
        time = datetime.fromisoformat(required("ce_time"))
    except ValueError as error:
        raise ValueError(f"header ce_time: {error}") from error
    sequence = optional("ce_sequence")
    if sequence is not None and not (sequence.isascii() and sequence.isdigit()):
        raise ValueError(f"header ce_sequence: {sequence!r} is not a number")
    return Envelope(
        id=message_id,
        source=required("ce_source"),
        type=required("ce_type"),
        time=time,
        subject=optional("ce_subject"),
        sequence=None if sequence is None else int(sequence),
        tenant_id=optional("tenant_id"),
        traceparent=optional("traceparent"),
        tracestate=optional("tracestate"),
    )
