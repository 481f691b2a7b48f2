"""Which facts become deliveries, and the lane that makes them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from uuid import UUID

import msgspec

from infra.clock import utcnow, uuid7
from infra.errors import InvalidMessage, NotYet, TooLarge, Transient, Unanswered
from infra.lanes.effects import Effects
from infra.outgoing import webhooks
from infra.outgoing.client import Outgoing
from infra.postgres.tx import Tx
from protos.catalog import AGENT_EVENTS, CHANNEL_EVENTS, PLATFORM_EVENTS
from protos.envelope import Message, read_headers
from services.notification.handlers import EMAILS, QueuedEmail
from services.notification.notifications import Email, Notifications
from services.notification.webhooks import endpoints
from services.notification.webhooks.endpoints import (
    RETRIES,
    WEBHOOKS,
    EndpointSecrets,
    QueuedWebhook,
    TenantEvent,
    WebhookEndpoint,
)
from services.notification.webhooks.events import event_of

TIMEOUT_SECONDS = 20.0
# The answer's body is not used. A body up to this size is read, so that the connection can be used again.
MAX_ANSWER_BYTES = 65_536
JITTER = 0.2


class Attempt(msgspec.Struct, frozen=True):
    """The answer of an endpoint; `status` is null if there was none."""

    status: int | None
    error: str | None


async def _queue(messages: Sequence[Message], tx: Tx) -> None:
    facts = []
    for message in messages:
        if (event := event_of(message)) is None:
            continue
        envelope = read_headers(dict(tx.origins[id(message)]))
        if envelope.tenant_id is None:
            continue
        body = msgspec.json.encode({"type": event.type, "timestamp": envelope.time, "data": event.data})
        facts.append(TenantEvent(envelope.tenant_id, envelope.id, event.type, body))
    if facts:
        await endpoints.queue(tx, facts)


@AGENT_EVENTS.batch(group="notification")
async def queue_run_events(messages: list[Message], tx: Tx) -> None:
    await _queue(messages, tx)


@CHANNEL_EVENTS.batch(group="notification")
async def queue_channel_events(messages: list[Message], tx: Tx) -> None:
    await _queue(messages, tx)


@PLATFORM_EVENTS.batch(group="notification")
async def queue_platform_events(messages: list[Message], tx: Tx) -> None:
    await _queue(messages, tx)


async def give_up(item: QueuedWebhook, error: str, tx: Tx, **_adapters: object) -> None:
    """The delivery has failed, and the tenant can send it again. The dead letter of the item holds the error."""
    await tx.sql(
        """
        UPDATE webhook_delivery SET state = 'failed', error = 'an internal error', updated_at = clock_timestamp()
        WHERE id = $1 AND state = 'waiting'
        """,
        item.delivery_id,
    )


@WEBHOOKS.runner(concurrency=32, per_tenant=8, dead=give_up)
async def post_webhook(
    item: QueuedWebhook,
    effects: Effects,
    tx: Tx,
    outgoing: Outgoing,
    secrets: EndpointSecrets,
    notifications: Notifications,
) -> None:
    async with effects.begin() as reading:
        found = await endpoints.read(reading, secrets, item.delivery_id, utcnow())
    if found is None:
        return
    endpoint, message_id, body, attempts = found
    attempts += 1
    if endpoint.disabled_reason:
        error = f"the endpoint is disabled: {endpoint.disabled_reason}"
        await endpoints.settle(tx, item.delivery_id, "failed", attempts=attempts - 1, error=error)
        return
    outcome = await effects.run(
        # A delivery that is sent again has another item.
        f"{effects.item_id}/{attempts}",
        lambda _: _post(outgoing, endpoint, message_id, body, utcnow()),
        kind="keyed",
        result=Attempt,
    )
    assert outcome.result is not None
    status, error_ = outcome.result.status, outcome.result.error
    record = partial(endpoints.settle, delivery_id=item.delivery_id, attempts=attempts, status=status, error=error_)
    if error_ is None:
        await record(tx, state="delivered")
        await endpoints.succeeded(tx, endpoint)
        return
    if status != 410 and attempts <= len(RETRIES):
        async with effects.begin() as recording:
            await record(recording, state="waiting")
            await _count_failure(recording, notifications, endpoint, gone=False)
        delay = RETRIES[attempts - 1]
        raise NotYet(delay * random.uniform(1 - JITTER, 1 + JITTER), f"webhook: {error_}")
    await record(tx, state="failed")
    await _count_failure(tx, notifications, endpoint, gone=status == 410)


async def _post(outgoing: Outgoing, endpoint: WebhookEndpoint, message_id: UUID, body: bytes, now: datetime) -> Attempt:
    """One attempt. It never raises: a refusal is a result, too."""
    id_ = f"msg_{message_id}"
    signed = [webhooks.sign(secret, id_, now, body) for secret in endpoint.secrets]
    signatures = " ".join(one[webhooks.SIGNATURE_HEADER] for one in signed)
    headers = {"content-type": "application/json", **signed[0], webhooks.SIGNATURE_HEADER: signatures}
    try:
        answer = await outgoing.request(
            "POST",
            endpoint.url,
            headers=headers,
            content=body,
            timeout=TIMEOUT_SECONDS,
            max_bytes=MAX_ANSWER_BYTES,
            body_matters=False,
        )
    except (Transient, Unanswered, InvalidMessage, TooLarge) as error:
        return Attempt(None, str(error)[:200])
    return Attempt(answer.status, None if 200 <= answer.status < 300 else f"HTTP {answer.status}")


async def _count_failure(tx: Tx, notifications: Notifications, endpoint: WebhookEndpoint, *, gone: bool) -> None:
    """The tenant's owners get one e-mail if this failure disables the endpoint."""
    reason = await endpoints.failed(tx, endpoint, gone=gone)
    if reason is None:
        return
    text = (
        f"Your webhook endpoint {endpoint.id} was disabled, because {reason}.\n\n"
        f"Enable it again by PATCH /api/v1/webhook-endpoints/{endpoint.id}; "
        "POST …/resend sends the events that it has missed.\n"
    )
    id_ = uuid7()
    if await notifications.queue(tx, id_, Email("", "A webhook endpoint was disabled", text, utcnow())):
        tx.enqueue(EMAILS, lane=str(id_), item=QueuedEmail(id_), item_id=id_)
