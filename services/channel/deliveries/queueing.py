"""Queues deliveries: stores each one and appends it to the lane of its conversation, in the order of the positions.

Requests that wait together form a group: one statement reads and locks, `decide` is called for each request in order,
and one statement writes. A request that is out of order, or not new, needs more reads: it is queued after the group, in
the same transaction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.errors import InvalidMessage
from infra.lanes.lane import Lane
from infra.lanes.resequencer import MissingMessages, Resequencer
from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from infra.security.subjects import Erased, Subject, SubjectKeys
from protos.messages.channel import SendMessage
from services.channel import projections
from services.channel.domain import Delivery, QueueDelivery, decide
from services.channel.events import DeliveryQueued, File, OutboundContent
from services.channel.publishing import DELIVERY

# A reply that is a day late is of no use.
EXPIRES = timedelta(hours=24)


class DueDelivery(msgspec.Struct, frozen=True):
    """The item of the delivery lane: it is this delivery's turn in its conversation."""

    delivery_id: UUID


# One lane per conversation. Only our own faults count against `retries`: an unavailable vendor is waited for.
DELIVERIES = Lane("deliveries", DueDelivery)

# The missing messages of each conversation's outbound sequence.
GAPS = Lane("delivery gaps", MissingMessages)
RESEQUENCER = Resequencer(GAPS)

_LOCK_DELIVERIES = """
-- Locks the positions of the conversations, in the order of their names.
SELECT * FROM lock_deliveries($1, $2::text[], $3::text[], $4::uuid[], $5::uuid[], $6::text[])
"""
_STORE_DELIVERIES = """
-- The positions are locked already. A delivery that another transaction has stored meanwhile violates the key.
WITH listed AS (
    INSERT INTO delivery (id, tenant_id, channel_id, session_key, run_id, state)
    SELECT *, 'queued' FROM unnest($1::uuid[], $2::text[], $3::uuid[], $4::text[], $5::uuid[])
)
UPDATE sequence
SET last = n.last
FROM unnest($7::text[], $8::text[], $9::bigint[]) AS n(tenant_id, key, last)
WHERE sequence.tenant_id = n.tenant_id AND sequence.name = $6 AND sequence.key = n.key
"""


class DeliveryRequest(NamedTuple):
    """A request for a delivery."""

    tenant_id: str
    message: SendMessage
    expires_at: datetime
    trace: Callable[[], object]
    """Makes the span of this request in its own trace; a context manager."""


class _Turn(msgspec.Struct, frozen=True):
    """A delivery on its way into the lane of its conversation."""

    session_key: str
    delivery_id: UUID
    expires_at: datetime


class _Found(NamedTuple):
    """A row of `lock_deliveries`: the state by which a request is decided."""

    subject_id: str | None
    last: int
    is_simple: bool
    has_key: bool
    wrapped: bytes | None


async def queue_group(tx: Tx, subjects: SubjectKeys, group: Sequence[DeliveryRequest]) -> None:
    """Queues the deliveries in the order of the group. Raises InvalidMessage if one is not for a conversation of its
    channel."""
    found = await _lock(tx, group)
    keys = await _keys(tx, subjects, group, found)
    last: dict[Subject, int] = {}
    others: list[tuple[DeliveryRequest, str]] = []
    waits: set[Subject] = set()
    rows: list[tuple[Any, ...]] = []
    seen: set[UUID] = set()
    for asked, (subject_id, before, is_simple, _, _) in zip(group, found, strict=True):
        if subject_id is None:
            raise InvalidMessage("session_key", "is not a conversation of this channel")
        message, lane = asked.message, (asked.tenant_id, asked.message.session_key)
        in_order = message.position <= last.setdefault(lane, before) + 1
        key = keys[asked.tenant_id, subject_id]
        if not (is_simple and in_order and key) or lane in waits or message.delivery_id in seen:
            # The later ones of the conversation have to follow this one.
            waits.add(lane)
            others.append((asked, subject_id))
            continue
        seen.add(message.delivery_id)
        with asked.trace():  # type: ignore[attr-defined]
            tx.tenant_id = asked.tenant_id
            [event] = decide(QueueDelivery(_queued(message, subject_id, key, _files(message))), Delivery())
            tx.append(DELIVERY.stream(str(message.delivery_id)), event)
            _enqueue(tx, _Turn(message.session_key, message.delivery_id, asked.expires_at))
        last[lane] = max(last[lane], message.position)
        rows.append((message.delivery_id, asked.tenant_id, message.channel_id, message.session_key, message.run_id))
    if rows:
        lanes = list(last)
        await tx.sql(
            _STORE_DELIVERIES,
            *map(list, zip(*rows, strict=True)),
            GAPS.name,
            [tenant_id for tenant_id, _ in lanes],
            [session_key for _, session_key in lanes],
            list(last.values()),
        )
        # The others are decided by these rows.
        await tx.flush()
    for asked, subject_id in others:
        with asked.trace():  # type: ignore[attr-defined]
            tx.tenant_id = asked.tenant_id
            await queue_delivery(tx, subjects, asked.message, subject_id, asked.expires_at, _files(asked.message))
            await tx.flush()


async def _lock(tx: Tx, group: Sequence[DeliveryRequest]) -> list[_Found]:
    rows = await tx.sql(
        _LOCK_DELIVERIES,
        GAPS.name,
        [asked.tenant_id for asked in group],
        [asked.message.session_key for asked in group],
        [asked.message.channel_id for asked in group],
        [asked.message.delivery_id for asked in group],
        # The text may repeat the words of the person who asked, even if another one has written since.
        [asked.message.subject_id for asked in group],
    )
    return [_Found(*row) for row in rows]


async def _keys(
    tx: Tx, subjects: SubjectKeys, group: Sequence[DeliveryRequest], found: Sequence[_Found]
) -> Mapping[Subject, DataKey | None]:
    """The keys of the persons, made if they do not exist; None for a destroyed one."""
    keys: dict[Subject, DataKey | None] = {}
    unknown: set[Subject] = set()
    for asked, one in zip(group, found, strict=True):
        if one.subject_id is None:
            continue
        subject = asked.tenant_id, one.subject_id
        if not one.has_key:
            unknown.add(subject)
        elif subject not in keys:
            keys[subject] = subjects.opened(subject, one.wrapped)
    return keys | await subjects.keys(tx, unknown) if unknown else keys


async def queue_delivery(
    tx: Tx,
    subjects: SubjectKeys,
    message: SendMessage,
    subject_id: str,
    expires_at: datetime,
    files: tuple[File, ...],
) -> None:
    """Stores a delivery and puts it into the lane of its conversation. `subject_id`: whose key seals the text."""
    try:
        key: DataKey | None = await subjects.key(tx, str(tx.tenant_id), subject_id)
    except Erased:
        key = None
    delivery = DELIVERY.stream(str(message.delivery_id))
    for event in await tx.decide(delivery, QueueDelivery(_queued(message, subject_id, key, files))):
        await projections.project(tx, message.delivery_id, event)
    turn = _Turn(message.session_key, message.delivery_id, expires_at)
    await RESEQUENCER.accept(
        tx, message.session_key, message.position, msgspec.json.encode(turn), partial(enqueue_released, tx)
    )


async def enqueue_released(tx: Tx, released: bytes) -> None:
    """Appends a delivery, which the resequencer releases, to the lane of its conversation."""
    _enqueue(tx, msgspec.json.decode(released, type=_Turn))


def _enqueue(tx: Tx, turn: _Turn) -> None:
    tx.enqueue(
        DELIVERIES,
        lane=turn.session_key,
        item=DueDelivery(turn.delivery_id),
        item_id=turn.delivery_id,
        expires_in=turn.expires_at - utcnow(),
    )


def _files(message: SendMessage) -> tuple[File, ...]:
    return tuple(File("", file.name, file.path) for file in message.files)


def _queued(message: SendMessage, subject_id: str, key: DataKey | None, files: tuple[File, ...]) -> DeliveryQueued:
    """key: None if the person was erased: the text must not be stored, and the delivery fails when its turn comes."""
    words = OutboundContent(message.conversation_id, message.text, message.reply_to, files)
    content = key.seal(msgspec.json.encode(words).decode(), str(message.delivery_id), "content") if key else b""
    return DeliveryQueued(message.channel_id, message.session_key, message.run_id, subject_id, content, message.sender)
