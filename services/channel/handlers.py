"""Handlers of the messages that the channel service receives, and of its delivery lane."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from uuid import UUID

from infra.errors import InvalidMessage
from infra.lanes.effects import Effects, Outcome
from infra.lanes.resequencer import MissingMessages
from infra.observe import logs
from infra.observe.logs import get_logger
from infra.postgres.tx import Tx
from infra.security.subjects import SubjectKeys, erasure
from protos.catalog import CHANNEL_OUTBOUND
from protos.envelope import read_headers
from protos.messages.channel import SendMessage
from services.channel import projections
from services.channel.accounts.store import ChannelAccount, break_account, unless_replaced
from services.channel.deliveries.previews import take_over
from services.channel.deliveries.queueing import (
    DELIVERIES,
    EXPIRES,
    GAPS,
    RESEQUENCER,
    DeliveryRequest,
    DueDelivery,
    enqueue_released,
    queue_group,
)
from services.channel.deliveries.sender import NotSendable, Sender, Sent
from services.channel.domain import Command, MarkFailed, MarkSent, MarkUnknown
from services.channel.events import DeliveryFailed, DeliverySent, DeliveryUnknown
from services.channel.publishing import DELIVERY
from services.channel.vendors.base import AccountRefused, Outbound

_log = get_logger("channel.deliveries")

erase_subject = erasure("channel")


@CHANNEL_OUTBOUND.batch_worker(most=100)
async def enqueue_deliveries(messages: list[SendMessage], tx: Tx, subjects: SubjectKeys) -> None:
    # A single message is handled in its own trace already.
    of_many = len(messages) > 1
    group = [
        _asked(message, tx, partial(tx.follow, message, "queue delivery") if of_many else nullcontext)
        for message in messages
    ]
    await queue_group(tx, subjects, group)


def _asked(message: SendMessage, tx: Tx, trace: Callable[[], object]) -> DeliveryRequest:
    envelope = read_headers(dict(tx.origins[id(message)]))
    if envelope.tenant_id is None:
        raise InvalidMessage("header tenant_id", "missing")
    # Its life is counted from the request, so that a broker outage does not extend the life of an old reply.
    return DeliveryRequest(envelope.tenant_id, message, envelope.time + EXPIRES, trace)


@GAPS.runner(concurrency=8)
async def skip_gap(gap: MissingMessages, effects: Effects, tx: Tx) -> None:
    await RESEQUENCER.skip_gap(tx, gap, partial(enqueue_released, tx))


async def expire_delivery(due: DueDelivery, tx: Tx) -> None:
    await _give_up(tx, due.delivery_id, "expired")


# An address of a tenant that never answers must not hold the slots of all tenants.
@DELIVERIES.runner(concurrency=64, per_tenant=24, expired=expire_delivery)
async def deliver(due: DueDelivery, effects: Effects, tx: Tx, sender: Sender) -> None:
    try:
        async with effects.reading() as reading:
            sendable = await sender.load(reading, due.delivery_id)
        parts = await sendable.parts()
    except NotSendable as reason:
        await _give_up(tx, due.delivery_id, str(reason))
        return
    account = sendable.account
    vendor = account.vendor
    run_id = parts[0].run_id
    about = {"channel_id": str(account.id), **({"run_id": str(run_id)} if run_id else {})}
    logs.work_on(**about)
    sent = list(sendable.sent) or [None] * len(parts)
    shown = None
    if vendor.preview == "edit" and run_id:
        async with effects.begin() as taking:
            shown = await take_over(taking, account, run_id, sendable.session_key, due.delivery_id)
    for n, part in enumerate(parts, 1):
        if n == 1 and shown and await _replaced(effects, sender, account, part, shown):
            sent[0] = shown
            continue
        if sendable.due:
            if n - 1 not in sendable.due:
                continue
            part = part._replace(key=f"{part.key}/late", is_late=True)
        outcome = await _sent(effects, sender, account, part)
        if outcome.state == "failed" and (other := vendor.otherwise(part, outcome.error or "")):
            outcome = await _sent(effects, sender, account, other)
        which = f"part {n} of {len(parts)}: " if len(parts) > 1 else ""
        if outcome.state == "failed":
            error = outcome.error or ""
            await _decide(tx, due.delivery_id, MarkFailed(which + error, tuple(sent)), **about)
            if error.startswith(AccountRefused.PREFIX):
                await break_account(tx, account, error)
            return
        if outcome.state == "unknown":
            unknown = MarkUnknown(f"{which}{outcome.error or 'no answer'}", tuple(sent))
            await _decide(tx, due.delivery_id, unknown, **about)
            return
        assert outcome.result is not None
        # Slack gives no id of the message of a file.
        sent[n - 1] = outcome.result.vendor_message_id
    await _decide(tx, due.delivery_id, MarkSent(tuple(sent), sendable.due), **about)


async def _sent(effects: Effects, sender: Sender, account: ChannelAccount, part: Outbound) -> Outcome[Sent]:
    vendor = account.vendor

    async def call(_: str) -> Sent:
        return await unless_replaced(effects, account, sender.send(account, part))

    return await effects.run(part.key, call, kind=vendor.effect_of(part), key_known=vendor.key_known, result=Sent)


async def _replaced(effects: Effects, sender: Sender, account: ChannelAccount, part: Outbound, shown: str) -> bool:
    """True if the text is now in the message in which the person saw it being written. Else that message is deleted."""

    async def edit(_: str) -> None:
        await unless_replaced(effects, account, sender.edit(account, part, shown))

    async def retract(_: str) -> None:
        await unless_replaced(effects, account, sender.retract(account, part, shown))

    edited = await effects.run(f"{part.key}/shown", edit, kind="repeatable")
    if edited.state == "failed":
        # The message is gone, or cannot hold the text. A refusal to delete it changes nothing.
        await effects.run(f"{part.key}/retracted", retract, kind="repeatable")
    return edited.state == "succeeded"


async def _give_up(tx: Tx, delivery_id: UUID, reason: str) -> None:
    """Ends a delivery that is not sent any more. Some or all of its parts may have been sent before, and one may
    have been sent without an answer of the vendor."""
    delivery = await tx.load(DELIVERY.stream(name := str(delivery_id)))
    rows = await tx.sql(
        # The bounds hold in each collation: digits are before letters.
        """
        SELECT e.key, coalesce(convert_from(e.result, 'UTF8')::jsonb ->> 'vendor_message_id', p.message_id),
               e.state = 'started' AND e.kind <> 'repeatable',
               -- After the last part.
               e.state = 'succeeded' AND (
                   e.key IN ($3, $3 || '/shown')
                   OR coalesce((convert_from(e.result, 'UTF8')::jsonb ->> 'is_last')::boolean, false)
               ),
               -- A part that the vendor had refused as too late.
               e.state = 'succeeded' AND e.key LIKE '%/late'
        FROM lane_effect e
            JOIN delivery d ON d.id = $2
            LEFT JOIN preview p
                ON p.run_id = d.run_id AND p.delivery_id = d.id AND e.key IN ($3 || '/shown', $3 || '-1/shown')
        WHERE e.tenant_id = $1 AND e.key BETWEEN $3 AND $3 || 'z' AND e.state IN ('started', 'succeeded')
        ORDER BY e.key
        """,
        tx.tenant_id,
        delivery_id,
        name,
    )
    parts = [(int(key.removeprefix(name).partition("/")[0].strip("-") or 1), *row) for key, *row in rows]
    sent = dict(enumerate(delivery.sent, 1)) | {n: id_ for n, id_, *_ in parts if id_}
    ids = tuple(sent.get(n) for n in range(1, max(sent, default=0) + 1))
    in_doubt = any(is_open for _, _, is_open, *_ in parts)
    again = {n - 1 for n, *_, is_again in parts if is_again}
    if again.issuperset(delivery.due) if delivery.due else any(is_end for *_, is_end, _ in parts):
        # The process died before it could say so.
        await _decide(tx, delivery_id, MarkSent(ids, delivery.due))
    else:
        await _decide(tx, delivery_id, MarkUnknown(reason, ids) if in_doubt else MarkFailed(reason, ids))


async def _decide(tx: Tx, delivery_id: UUID, command: Command, **about: str) -> None:
    """`about`: fields by which the log line is searched. The tenant sees the line."""
    fields = {"tenant": tx.tenant_id, "delivery_id": str(delivery_id), **about}
    for event in await tx.decide(DELIVERY.stream(str(delivery_id)), command):
        await projections.project(tx, delivery_id, event)
        match event:
            case DeliverySent():
                _log.info("reply delivered", **fields)
            case DeliveryFailed(reason=reason) | DeliveryUnknown(reason=reason):
                _log.warning("reply not delivered", reason=reason, **fields)
