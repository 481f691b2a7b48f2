"""Endpoints and deliveries: their tables."""

from __future__ import annotations

import base64
import os
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple
from uuid import UUID

import msgspec

from infra.lanes.lane import Lane
from infra.postgres.tx import Tx, derived_id
from infra.security.crypto import Cipher
from infra.security.rewrap import SealedColumn

# The time before each further attempt (Standard Webhooks' recommendation, as Svix does it), with ±20 % jitter.
RETRIES = tuple(timedelta(seconds=seconds) for seconds in (5, 300, 1_800, 7_200, 18_000, 36_000, 36_000))
# An endpoint that has refused everything for this time is disabled.
DISABLED_AFTER = timedelta(days=5)
KEEP = timedelta(days=30)
_PURPOSE = "webhook endpoint"
SEALED = tuple(SealedColumn("webhook_endpoint", column, _PURPOSE, ("id::text",)) for column in ("secret", "old_secret"))
_SECRET_BYTES = 32


class QueuedWebhook(msgspec.Struct, frozen=True):
    """A delivery to make. Its row has the content."""

    delivery_id: UUID


# One lane per delivery, so that a waiting one delays no other.
WEBHOOKS = Lane("webhooks", QueuedWebhook)


class WebhookEndpoint(NamedTuple):
    """An endpoint, as a delivery needs it."""

    id: UUID
    url: str
    secrets: Sequence[str]
    """The present one, and the one before it while that is still valid. Each signs."""
    disabled_reason: str | None


class TenantEvent(NamedTuple):
    """An event of a tenant."""

    tenant_id: str
    message_id: UUID
    type: str
    body: bytes


def new_secret() -> str:
    return "whsec_" + base64.b64encode(os.urandom(_SECRET_BYTES)).decode()


class EndpointSecrets:
    """Seals the secrets of endpoints."""

    def __init__(self, cipher: Cipher) -> None:
        self._cipher = cipher

    def seal(self, endpoint_id: UUID, secret: str) -> bytes:
        return self._cipher.seal(secret, _PURPOSE, str(endpoint_id))

    def open(self, endpoint_id: UUID, sealed: bytes) -> str:
        return self._cipher.open(sealed, _PURPOSE, str(endpoint_id)).decode()


async def queue(tx: Tx, facts: Iterable[TenantEvent]) -> None:
    """Stores a delivery of each fact for each endpoint that asked for it. A repeated fact changes nothing."""
    of_tenant: dict[str, list[TenantEvent]] = {}
    for fact in facts:
        of_tenant.setdefault(fact.tenant_id, []).append(fact)
    endpoints = await tx.sql(
        """
        SELECT tenant_id, id, events FROM webhook_endpoint
        WHERE tenant_id = ANY($1::text[]) AND disabled_reason IS NULL
        ORDER BY id
        """,
        sorted(of_tenant),
    )
    wanted = [
        (derived_id(endpoint_id, "webhook", fact.message_id), endpoint_id, fact)
        for tenant_id, endpoint_id, events in endpoints
        for fact in of_tenant[tenant_id]
        if fact.type in events
    ]
    if not wanted:
        return
    wanted.sort(key=lambda row: row[0])
    rows = await tx.sql(
        """
        INSERT INTO webhook_delivery (id, endpoint_id, tenant_id, message_id, type, body)
        SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::uuid[], $5::text[], $6::bytea[])
        ON CONFLICT DO NOTHING
        RETURNING id, tenant_id
        """,
        [id_ for id_, _, _ in wanted],
        [endpoint_id for _, endpoint_id, _ in wanted],
        [fact.tenant_id for _, _, fact in wanted],
        [fact.message_id for _, _, fact in wanted],
        [fact.type for _, _, fact in wanted],
        [fact.body for _, _, fact in wanted],
    )
    for id_, tenant_id in rows:
        tx.tenant_id = tenant_id
        enqueue(tx, UUID(str(id_)))


def enqueue(tx: Tx, delivery_id: UUID) -> None:
    tx.enqueue(WEBHOOKS, lane=str(delivery_id), item=QueuedWebhook(delivery_id))


async def read(
    tx: Tx, secrets: EndpointSecrets, delivery_id: UUID, now: datetime
) -> tuple[WebhookEndpoint, UUID, bytes, int] | None:
    """The endpoint of a delivery, the event's id and body, and the attempts so far. None if it was delivered."""
    rows = await tx.sql(
        """
        SELECT e.id, e.url, e.secret, e.old_secret, e.old_until, e.disabled_reason, d.message_id, d.body, d.attempts
        FROM webhook_delivery d JOIN webhook_endpoint e ON e.id = d.endpoint_id
        -- One that has failed has an item only if its dead letter is redriven.
        WHERE d.id = $1 AND d.state <> 'delivered'
        """,
        delivery_id,
    )
    if not rows:
        return None
    [(endpoint_id, url, secret, old, old_until, disabled_reason, message_id, body, attempts)] = rows
    valid = [secret, old] if old_until and now < old_until else [secret]
    opened = [secrets.open(endpoint_id, sealed) for sealed in valid]
    return WebhookEndpoint(endpoint_id, url, opened, disabled_reason), message_id, body, attempts


async def settle(
    tx: Tx, delivery_id: UUID, state: str, *, attempts: int, status: int | None = None, error: str | None = None
) -> None:
    """Records an attempt. `state`: ``waiting`` if there will be another one."""
    await tx.sql(
        """
        UPDATE webhook_delivery
        SET state = $2, attempts = $3, status = $4, error = $5, updated_at = clock_timestamp()
        WHERE id = $1
        """,
        delivery_id,
        state,
        attempts,
        status,
        error,
    )


async def succeeded(tx: Tx, endpoint: WebhookEndpoint) -> None:
    """Records that the endpoint took a delivery. An answer of an address that it had before changes nothing."""
    # Without a change no row is locked: many deliveries of an endpoint may end at once.
    await tx.sql(
        """
        UPDATE webhook_endpoint SET failing_since = NULL
        WHERE id = $1 AND url = $2 AND failing_since IS NOT NULL
        """,
        endpoint.id,
        endpoint.url,
    )


async def failed(tx: Tx, endpoint: WebhookEndpoint, *, gone: bool) -> str | None:
    """Records that the endpoint refused a delivery. The reason if it is disabled by this one. An answer of an address
    that it had before changes nothing.

    gone: it asked for no more.
    """
    await tx.sql(
        """
        UPDATE webhook_endpoint SET failing_since = clock_timestamp()
        WHERE id = $1 AND url = $2 AND failing_since IS NULL
        """,
        endpoint.id,
        endpoint.url,
    )
    reason = "it answered 410" if gone else f"it has accepted nothing for {DISABLED_AFTER.days} days"
    disabled = await tx.sql(
        """
        UPDATE webhook_endpoint SET disabled_reason = $2, updated_at = clock_timestamp()
        WHERE id = $1 AND disabled_reason IS NULL AND ($3 OR failing_since < clock_timestamp() - $4::interval)
            AND url = $5
        RETURNING url
        """,
        endpoint.id,
        reason,
        gone,
        DISABLED_AFTER,
        endpoint.url,
    )
    return reason if disabled else None


async def forget(tx: Tx, limit: int) -> int:
    """Deletes up to `limit` old deliveries that do not wait. Returns their number."""
    # Each tenant by the index of its deliveries. A delivery has an endpoint of its tenant.
    rows = await tx.sql(
        """
        DELETE FROM webhook_delivery WHERE id IN (
            SELECT id FROM webhook_delivery
            WHERE tenant_id IN (SELECT tenant_id FROM webhook_endpoint)
                AND created_at < clock_timestamp() - $1::interval AND state <> 'waiting'
            ORDER BY id
            LIMIT $2
            FOR UPDATE SKIP LOCKED
        )
        RETURNING id
        """,
        KEEP,
        limit,
    )
    return len(rows)
