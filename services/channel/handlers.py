"""Handlers of the messages that the channel service receives, and of its delivery lane."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial
from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.errors import InvalidMessage
from infra.lanes.effects import Effects
from infra.lanes.lane import Lane
from infra.lanes.resequencer import MissingMessages, Resequencer
from infra.observe.logs import get_logger
from infra.postgres.tx import Tx
from infra.security.subjects import Erased, SubjectKeys, erasure
from protos.catalog import CHANNEL_OUTBOUND
from protos.messages.channel import SendMessage
from services.channel import projections
from services.channel.accounts import Account
from services.channel.domain import Command, MarkFailed, MarkSent, MarkUnknown, Queue
from services.channel.events import DeliveryFailed, DeliveryQueued, DeliverySent, DeliveryUnknown, File, OutboundContent
from services.channel.previews import take_over
from services.channel.publishing import DELIVERY
from services.channel.sender import NotSendable, Sender, Sent, break_account
from services.channel.vendors.base import AccountRefused, Outbound

_log = get_logger("channel.deliveries")

# A reply that is a day late is of no use.
EXPIRES = timedelta(hours=24)


class DueDelivery(msgspec.Struct, frozen=True):
    """The item of the delivery lane: it is this delivery's turn in its conversation."""

    delivery_id: UUID


# One lane per conversation. Only our own faults count against `retries`: an unavailable vendor is waited for.
DELIVERIES = Lane("deliveries", DueDelivery)

# The missing messages of each conversation's outbound sequence.
GAPS = Lane("delivery gaps", MissingMessages)
_RESEQUENCER = Resequencer(GAPS)

erase_subject = erasure("channel")


class _Turn(msgspec.Struct, frozen=True):
    """A delivery on its way into the lane of its conversation."""

    session_key: str
    delivery_id: UUID
    expires_at: datetime


@CHANNEL_OUTBOUND.worker(prefetch=50)
async def enqueue_delivery(message: SendMessage, tx: Tx, subjects: SubjectKeys) -> None:
    assert tx.cause is not None
    rows = await tx.sql(
        "SELECT subject_id FROM conversation WHERE session_key = $1 AND channel_id = $2 AND tenant_id = $3",
        message.session_key,
        message.channel_id,
        tx.tenant_id,
    )
    if not rows:
        raise InvalidMessage("session_key", "is not a conversation of this channel")
    # The text may repeat the words of the person who asked, even if another one has written since.
    subject_id = message.subject_id or rows[0][0]
    # Its life is counted from the request, so that a broker outage does not extend the life of an old reply.
    files = tuple(File("", file.name, file.path) for file in message.files)
    await queue_delivery(tx, subjects, message, subject_id, tx.cause.time + EXPIRES, files)


async def queue_delivery(
    tx: Tx,
    subjects: SubjectKeys,
    message: SendMessage,
    subject_id: str,
    expires_at: datetime,
    files: tuple[File, ...] = (),
) -> None:
    """Stores a delivery and puts it into the lane of its conversation. `subject_id`: whose key seals the text."""
    words = OutboundContent(message.conversation_id, message.text, message.reply_to, files)
    try:
        key = await subjects.key(tx, str(tx.tenant_id), subject_id)
        content = key.seal(msgspec.json.encode(words).decode(), str(message.delivery_id), "content")
    except Erased:
        # The person was erased, so the text must not be stored. The delivery fails when its turn comes.
        content = b""
    asked = DeliveryQueued(message.channel_id, message.session_key, message.run_id, subject_id, content)
    await _decide(tx, message.delivery_id, Queue(asked))
    turn = _Turn(message.session_key, message.delivery_id, expires_at)
    await _RESEQUENCER.accept(
        tx, message.session_key, message.position, msgspec.json.encode(turn), partial(_line_up, tx)
    )


async def _line_up(tx: Tx, parcel: bytes) -> None:
    """Appends the delivery to the lane of its conversation."""
    turn = msgspec.json.decode(parcel, type=_Turn)
    tx.enqueue(
        DELIVERIES,
        lane=turn.session_key,
        item=DueDelivery(turn.delivery_id),
        item_id=turn.delivery_id,
        expires_in=turn.expires_at - utcnow(),
    )


@GAPS.runner(concurrency=8)
async def skip_gap(gap: MissingMessages, effects: Effects, tx: Tx) -> None:
    await _RESEQUENCER.skip_gap(tx, gap, partial(_line_up, tx))


async def expire_delivery(due: DueDelivery, tx: Tx) -> None:
    await _decide(tx, due.delivery_id, MarkFailed("expired"))


@DELIVERIES.runner(concurrency=64, expired=expire_delivery)
async def deliver(due: DueDelivery, effects: Effects, tx: Tx, sender: Sender) -> None:
    try:
        async with effects.reading() as reading:
            account, parts, session_key = await sender.load(reading, due.delivery_id)
    except NotSendable as reason:
        await _decide(tx, due.delivery_id, MarkFailed(str(reason)))
        return
    last = shown = None
    if account.vendor.preview == "edit" and (run_id := parts[0].run_id):
        async with effects.begin() as taking:
            shown = await take_over(taking, account, run_id, session_key, due.delivery_id)
    for n, part in enumerate(parts, 1):
        if n == 1 and shown and await _replaced(effects, sender, account, part, shown):
            last = shown
            continue

        async def call(_: str, part: Outbound = part) -> Sent:
            return await sender.send(account, part)

        outcome = await effects.run(part.key, call, kind=account.vendor.effect_of(part), result=Sent)
        which = f"part {n} of {len(parts)}: " if len(parts) > 1 else ""
        if outcome.state == "failed":
            error = outcome.error or ""
            await _decide(tx, due.delivery_id, MarkFailed(which + error))
            if error.startswith(AccountRefused.PREFIX):
                await break_account(tx, account, error)
            return
        if outcome.state == "unknown":
            await _decide(tx, due.delivery_id, MarkUnknown(f"{which}{outcome.error or 'no answer'}"))
            return
        assert outcome.result is not None
        last = outcome.result.vendor_message_id
    await _decide(tx, due.delivery_id, MarkSent(last))


async def _replaced(effects: Effects, sender: Sender, account: Account, part: Outbound, shown: str) -> bool:
    """True if the text is now in the message in which the person saw it being written. Else that message is deleted."""
    key = f"{part.key}/shown"
    edited = await effects.run(key, lambda _: sender.edit(account, part, shown), kind="repeatable")
    if edited.state == "failed":
        # The message is gone, or cannot hold the text. A refusal to delete it changes nothing.
        key = f"{part.key}/retracted"
        await effects.run(key, lambda _: sender.retract(account, part, shown), kind="repeatable")
    return edited.state == "succeeded"


async def _decide(tx: Tx, delivery_id: UUID, command: Command) -> None:
    for event in await tx.decide(DELIVERY.stream(str(delivery_id)), command):
        await projections.project(tx, delivery_id, event)
        match event:
            case DeliverySent():
                _log.info("reply delivered", delivery_id=str(delivery_id))
            case DeliveryFailed(reason=reason) | DeliveryUnknown(reason=reason):
                _log.warning("reply not delivered", delivery_id=str(delivery_id), reason=reason)
