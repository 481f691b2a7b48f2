"""The facts that channel stores.

`content` is personal: JSON of `Heard` or of `Words`, sealed with the subject's key for (the event's or the delivery's
id, ``content``). All else names nobody.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec


class Heard(msgspec.Struct, frozen=True):
    """What a person wrote, with the vendor's ids of conversation, person and message."""

    conversation: str
    person: str
    message: str
    text: str


class Words(msgspec.Struct, frozen=True):
    """What is to be sent, and where: the vendor's ids of the conversation and of the message that it answers."""

    conversation: str
    text: str
    reply_to: str | None


class MessageTaken(msgspec.Struct, frozen=True):
    """A message of a conversation, verified and taken. Stream: the conversation, named by its session key."""

    channel_id: UUID
    channel_type: str
    agent_id: UUID
    subject_id: str
    content: bytes
    received_at: datetime


class DeliveryQueued(msgspec.Struct, frozen=True):
    """A message waits to be sent. Stream: the delivery."""

    channel_id: UUID
    session_key: str
    run_id: UUID | None
    subject_id: str
    content: bytes


class DeliverySent(msgspec.Struct, frozen=True):
    """The vendor has taken it. vendor_message_id: of its last part, null where the vendor names none."""

    channel_id: UUID
    session_key: str
    run_id: UUID | None
    vendor_message_id: str | None


class DeliveryFailed(msgspec.Struct, frozen=True):
    """It was refused for good, or not sent at all."""

    channel_id: UUID
    session_key: str
    run_id: UUID | None
    reason: str


class DeliveryUnknown(msgspec.Struct, frozen=True):
    """It was sent, and nobody can know whether the vendor has taken it."""

    channel_id: UUID
    session_key: str
    run_id: UUID | None
    reason: str


DeliveryEvent = DeliveryQueued | DeliverySent | DeliveryFailed | DeliveryUnknown
