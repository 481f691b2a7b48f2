"""Dead letters: one table in every service's schema for the messages that could not be processed.

On an ordered topic a failed record parks its key: later records of the key wait behind it, in the same table. The
head is redriven by the service itself (`Redriver`), so that a redrive is the same code in the same transaction as the
first attempt was. An operator only marks a row: ``redriving`` or ``discarded``.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol
from uuid import UUID

import msgspec
from sqlalchemy.ext.asyncio import AsyncConnection

from infra.clock import uuid7
from infra.errors import Conflict
from infra.postgres.db import sql, storable

# Longer than any message can be delivered again.
CLOSED_FOR = timedelta(days=45)
OPEN_FOR = timedelta(days=30)
"""An open dead letter is discarded after this time since its last failure, because it may hold words of a
person whom it does not name."""
OPEN = "state IN ('failed', 'waiting', 'redriving')"
"""SQL: the dead letter is open. Written as in the table's partial indices, which would not serve another form."""


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A message that could not be processed; `headers` is JSON."""

    destination: str
    place: str
    message_id: str
    key: str | None
    tenant_id: str | None
    attempts: int
    error: str
    headers: str
    payload: bytes
    state: str = "failed"


class DeadLetterView(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter as an operator sees it. `source` is ``kafka:…``, ``rabbit:…``, ``outbox:…`` or ``lane:…``."""

    id: UUID
    service: str
    consumer: str
    source: str
    place: str
    message_id: str
    key: str | None
    tenant_id: str | None
    state: str
    attempts: int
    error: str
    first_failed_at: datetime
    last_failed_at: datetime
    headers: dict[str, str]
    payload: str = ""
    """Read on its own (`read_payload`), because it may hold a person's words."""


class SealedPayload(NamedTuple):
    """The payload of a dead letter as it is stored. Empty: its person was erased, or the letter was discarded."""

    content: bytes
    subject_id: str | None
    """The person under whose key it is sealed; None: it is sealed under the platform's key."""


class Sealing(Protocol):
    """Seals payloads; `infra.security.sealed_letters` does it in every service."""

    async def seal(self, connection: AsyncConnection, letters: Sequence[DeadLetter]) -> list[SealedPayload]: ...

    async def open(
        self, connection: AsyncConnection, tenant_id: str | None, message_id: str, payload: SealedPayload
    ) -> bytes:
        """Raises infra.errors.Conflict if the person was erased."""
        ...


async def store_dead_letters(
    connection: AsyncConnection, consumer: str, source: str, letters: Sequence[DeadLetter], sealing: Sealing | None
) -> None:
    """Stores dead letters; one that lies there already is left as it is. Without `sealing` payloads stay as they are:
    for benches and tests without personal content."""
    payloads = (
        await sealing.seal(connection, letters)
        if sealing
        else [SealedPayload(letter.payload, None) for letter in letters]
    )
    await sql(
        connection,
        """
        INSERT INTO dead_letter (id, consumer, source, destination, place, message_id, key, tenant_id, state, attempts,
                                 error, headers, payload, subject_id, sealed)
        SELECT i, $1::text, $2::text, d, p, m, k, t, s, a, e, h, y, u, $15::boolean
        FROM unnest($3::uuid[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::int[],
                    $11::text[], $12::text[], $13::bytea[], $14::text[]) AS n(i, d, p, m, k, t, s, a, e, h, y, u)
        ON CONFLICT DO NOTHING
        """,
        consumer,
        source,
        [uuid7() for _ in letters],
        [letter.destination for letter in letters],
        [letter.place for letter in letters],
        [letter.message_id for letter in letters],
        # PostgreSQL's text has no NUL, but another system's messages may contain one.
        [None if letter.key is None else storable(letter.key) for letter in letters],
        [letter.tenant_id and storable(letter.tenant_id) for letter in letters],
        [letter.state for letter in letters],
        [letter.attempts for letter in letters],
        [storable(letter.error, 4000) for letter in letters],
        [letter.headers for letter in letters],
        [payload.content for payload in payloads],
        [payload.subject_id for payload in payloads],
        sealing is not None,
    )


async def lock_parked(connection: AsyncConnection, consumer: str, topic: str, keys: Sequence[str]) -> set[str]:
    """Which of `keys` are parked; their rows stay locked until the transaction ends.

    The redriver locks the same rows: it cannot unpark a key between this look and the store behind it.
    """
    rows = await sql(
        connection,
        """
        SELECT key FROM parked_key WHERE consumer = $1 AND topic = $2 AND key = ANY($3::text[])
        ORDER BY key FOR UPDATE
        """,
        consumer,
        topic,
        list(keys),
    )
    return {key for (key,) in rows}


async def park(connection: AsyncConnection, consumer: str, topic: str, key: str) -> None:
    """Marks the key: later records with it wait until its failed one is redriven or discarded. May be repeated."""
    await sql(
        connection,
        "INSERT INTO parked_key (consumer, topic, key) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        consumer,
        topic,
        key,
    )


async def erase(connection: AsyncConnection, tenant_id: str, subject_id: str | None = None) -> None:
    """Deletes the payload of every dead letter of the subject, and of those that were stored unsealed and name it.

    subject_id: None for all dead letters of the tenant. A redrive of one then fails.
    """
    await sql(
        connection,
        """
        UPDATE dead_letter
        SET payload = '', error = error || ' (the payload was erased with its subject)'
        WHERE tenant_id = $1 AND payload <> ''
          AND ($2::text IS NULL OR subject_id = $2
               OR (NOT sealed AND position(convert_to($2, 'UTF8') IN payload) > 0))
        """,
        tenant_id,
        subject_id,
    )


async def prune(connection: AsyncConnection) -> None:
    """Deletes dead letters that were redriven and are older than CLOSED_FOR.

    Discarded ones stay, without a payload: a replay must skip their messages.
    """
    await sql(
        connection,
        """
        DELETE FROM dead_letter
        WHERE id IN (
            SELECT id FROM dead_letter
            WHERE state = 'redriven' AND last_failed_at < clock_timestamp() - $1::interval
            LIMIT 10000
        )
        """,
        CLOSED_FOR,
    )


async def count_parked(connection: AsyncConnection) -> dict[tuple[str, str], int]:
    """(consumer, topic) → how many keys are parked."""
    rows = await sql(connection, "SELECT consumer, topic, count(*) FROM parked_key GROUP BY 1, 2")
    return {(consumer, topic): count for consumer, topic, count in rows}


async def count_open(connection: AsyncConnection) -> dict[str, tuple[int, float]]:
    """Consumer → the number of its open dead letters, and the seconds since the oldest one failed first."""
    rows = await sql(
        connection,
        f"""
        SELECT consumer, count(*), extract(epoch FROM clock_timestamp() - min(first_failed_at))::float8
        FROM dead_letter
        WHERE {OPEN}
        GROUP BY 1
        """,
    )
    return {consumer: (count, oldest) for consumer, count, oldest in rows}


_VIEW = """
    SELECT id, consumer, source || ':' || destination, place, message_id, key, tenant_id, state, attempts, error,
    first_failed_at, last_failed_at, headers FROM dead_letter
    """


def _view(service: str, row: Sequence[Any]) -> DeadLetterView:
    fields = dict(zip(DeadLetterView.__struct_fields__[2:-2], row[1:-1], strict=True))
    return DeadLetterView(id=UUID(str(row[0])), service=service, **fields, headers=msgspec.json.decode(row[-1]))


async def list_dead_letters(
    connection: AsyncConnection,
    service: str,
    *,
    limit: int = 100,
    after: UUID | None = None,
    tenant_id: str | None = None,
) -> list[DeadLetterView]:
    """The open dead letters without their payloads, the oldest first; with `tenant_id` only those of that tenant."""
    rows = await sql(
        connection,
        _VIEW + f"WHERE {OPEN} AND ($1::uuid IS NULL OR id > $1) "
        "AND ($3::text IS NULL OR tenant_id = $3) ORDER BY id LIMIT $2",
        after,
        limit,
        tenant_id,
    )
    return [_view(service, row) for row in rows]


async def get_dead_letter(connection: AsyncConnection, service: str, id_: UUID) -> DeadLetterView | None:
    """Without its payload."""
    rows = await sql(connection, _VIEW + "WHERE id = $1", id_)
    return _view(service, rows[0]) if rows else None


async def read_payload(connection: AsyncConnection, id_: UUID, sealing: Sealing | None) -> str:
    """The message of a dead letter as text: ``[erased]`` if its person was erased. The caller audits the reading."""
    [(tenant_id, message_id, *payload, sealed)] = await sql(
        connection,
        "SELECT tenant_id, message_id, payload, subject_id, sealed FROM dead_letter WHERE id = $1",
        id_,
    )
    try:
        content = await open_payload(connection, sealing, tenant_id, message_id, SealedPayload(*payload), sealed=sealed)
    except Conflict:
        return "[erased]"
    return content.decode("utf-8", errors="backslashreplace")


async def open_payload(
    connection: AsyncConnection,
    sealing: Sealing | None,
    tenant_id: str | None,
    message_id: str,
    payload: SealedPayload,
    *,
    sealed: bool,
) -> bytes:
    """The bytes of a message. Raises Conflict if its person was erased."""
    if not sealed:
        return payload.content
    if sealing is None:
        raise RuntimeError("this process has no key that opens dead letters")
    return await sealing.open(connection, tenant_id, message_id, payload)
