"""The messages that notification handles, and the lane in which it sends e-mails."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from functools import partial
from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.errors import InvalidMessage
from infra.lanes.effects import Effects
from infra.lanes.lane import Lane
from infra.postgres.tx import Tx
from protos.catalog import NOTIFICATION_EMAIL, NOTIFICATION_PUSH
from protos.envelope import Envelope
from protos.messages.notification import SendEmail, SendPush
from services.notification.adapters import Owners
from services.notification.domain import (
    LATE,
    LIFE,
    MAX_SUBJECT,
    SendResult,
    is_address,
    is_file,
    is_one_line,
    result_of_all,
)
from services.notification.mailer import Mailer, RecipientBusy
from services.notification.notifications import (
    Email,
    Notifications,
    reached,
    store_failure,
    store_reached,
    store_result,
)


class QueuedEmail(msgspec.Struct, frozen=True):
    """An e-mail to send. Its row has the content."""

    id: UUID


# One lane per e-mail, so that a waiting e-mail delays no other. The retries last longer than the e-mail's life: an
# e-mail that cannot be sent expires, which its tenant sees. As a dead letter it would look queued forever.
EMAILS = Lane(
    "emails",
    QueuedEmail,
    retries=tuple(timedelta(minutes=minutes) for minutes in (1, 5, 15, 60, 240, 480, 720)),
)


@NOTIFICATION_EMAIL.worker(prefetch=20)
async def queue_email(message: SendEmail, tx: Tx, notifications: Notifications) -> None:
    envelope = _envelope(tx)
    if message.to and not is_address(message.to):
        raise InvalidMessage("to", "must be one e-mail address")
    if not is_one_line(message.subject) or len(message.subject) > MAX_SUBJECT:
        raise InvalidMessage("subject", f"must be one line of up to {MAX_SUBJECT} characters")
    if message.attachment and not is_file(message.attachment.name, message.attachment.media_type):
        raise InvalidMessage("attachment", "must have a plain file name and a media type such as application/pdf")
    email = Email(message.to, message.subject, message.text, envelope.time, message.attachment)
    if not await notifications.queue(tx, envelope.id, email):
        return
    # The life begins with the request: an old e-mail from a dead-letter queue is not sent.
    life = envelope.time + LIFE - utcnow()
    tx.enqueue(EMAILS, lane=str(envelope.id), item=QueuedEmail(envelope.id), item_id=envelope.id, expires_in=life)


async def expire(item: QueuedEmail, tx: Tx) -> None:
    recipients = await reached(tx, item.id)
    result = SendResult("sent", f"to other recipients it {LATE}") if recipients else SendResult("failed", LATE)
    await store_result(tx, item.id, result, recipients)


@EMAILS.runner(concurrency=8, expired=expire)
async def send_email(
    item: QueuedEmail, effects: Effects, tx: Tx, notifications: Notifications, owners: Owners, mailer: Mailer
) -> None:
    async with effects.begin() as reading:
        email = await notifications.read(reading, item.id)
    known = [email.to] if email.to else await owners(tx.tenant_id or "")
    recipients = [address for address in dict.fromkeys(known) if is_address(address)]
    errors, have, busy = [], [], None
    for recipient in recipients:
        # One effect per recipient: after a crash, recipients that have the e-mail do not get it again.
        try:
            outcome = await effects.run(
                f"{item.id}/{hashlib.sha256(recipient.encode()).hexdigest()[:16]}",
                partial(mailer.send, to=recipient, email=email),
                kind="keyed",
            )
        except RecipientBusy as error:
            busy = error
            continue
        errors.append(outcome.error)
        if outcome.error is None:
            have.append(recipient)
    if busy:
        async with effects.begin() as recording:
            await store_reached(recording, item.id, have)
        raise busy
    await store_result(tx, item.id, result_of_all(errors), recipients)


@NOTIFICATION_PUSH.worker(prefetch=20)
async def record_push(message: SendPush, tx: Tx) -> None:
    # Devices cannot be registered yet, so every push notification fails.
    await store_failure(tx, _envelope(tx).id, "push", "undeliverable: the user has no device")


def _envelope(tx: Tx) -> Envelope:
    assert tx.cause is not None
    if not tx.cause.tenant_id:
        raise InvalidMessage("header tenant_id", "missing")
    return tx.cause
