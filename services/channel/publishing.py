"""Maps each stored fact to its public messages.

`MessageReceived` carries the plain text, and the stored fact has only the encrypted text. It is published together with
the fact in `services.channel.intake.conversations`; only a replay emits it here, without the texts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from uuid import UUID

from infra.postgres.event_store import Aggregate, Publication
from infra.postgres.upcasting import EventTypes
from protos.catalog import CHANNEL_EVENTS
from protos.messages.channel import MessageDelivered, MessageReceived, MessageUndelivered
from services.channel import domain
from services.channel.events import (
    DeliveryEvent,
    DeliveryFailed,
    DeliveryQueued,
    DeliveryReceived,
    DeliveryResumed,
    DeliverySent,
    DeliveryUnknown,
    MessageDeleted,
    MessageEdited,
    MessageReacted,
    MessageTaken,
)


def _publish_delivery(delivery_id: str, event: DeliveryEvent) -> Iterable[Publication]:
    if isinstance(event, DeliveryQueued | DeliveryResumed | DeliveryReceived):
        return
    if isinstance(event, DeliverySent) and event.again:
        # It was published before: a receiver counts each delivery once.
        return
    message: MessageDelivered | MessageUndelivered
    if isinstance(event, DeliverySent):
        message = MessageDelivered(
            delivery_id=UUID(delivery_id),
            channel_id=event.channel_id,
            session_key=event.session_key,
            run_id=event.run_id,
            vendor_message_id=event.vendor_message_id,
            sender=event.sender,
        )
    else:
        message = MessageUndelivered(
            delivery_id=UUID(delivery_id),
            channel_id=event.channel_id,
            session_key=event.session_key,
            run_id=event.run_id,
            outcome="failed" if isinstance(event, DeliveryFailed) else "unknown",
            reason=event.reason,
        )
    yield Publication(CHANNEL_EVENTS, event.session_key, message)


DELIVERY = Aggregate(
    name="delivery",
    events=EventTypes(DeliveryQueued, DeliverySent, DeliveryResumed, DeliveryFailed, DeliveryUnknown, DeliveryReceived),
    initial=domain.Delivery,
    evolve=domain.evolve,
    decide=domain.decide,
    publish=_publish_delivery,
)

CONVERSATION = Aggregate(
    name="conversation",
    events=EventTypes(MessageTaken),
    initial=int,
    evolve=domain.count,
    # The vendor states this fact; there is nothing to decide.
    decide=lambda event, _: [event],
)

MESSAGE = Aggregate(
    name="message",
    events=EventTypes(MessageEdited, MessageDeleted, MessageReacted),
    initial=domain.Changes,
    evolve=domain.changed,
    decide=domain.change,
)


def publish_again(session_key: str, fact: MessageTaken) -> Iterable[Publication]:
    """For facts beyond the retention of the topic; their texts have expired there."""
    message = MessageReceived(
        channel_id=fact.channel_id,
        channel_type=fact.channel_type,
        agent_id=fact.agent_id,
        session_key=session_key,
        conversation_id="",
        subject_id=fact.subject_id,
        vendor_message_id="",
        text="",
        received_at=fact.received_at,
    )
    yield Publication(CHANNEL_EVENTS, session_key, message)


REPLAYED = replace(CONVERSATION, publish=publish_again)
