"""Conversations and deliveries: pure."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Literal, NamedTuple, assert_never
from uuid import UUID

import msgspec

from services.channel.events import (
    DeliveryEvent,
    DeliveryFailed,
    DeliveryQueued,
    DeliverySent,
    DeliveryUnknown,
    MessageTaken,
)

State = Literal["queued", "sent", "delivered", "read", "failed", "unknown"]


class Delivery(msgspec.Struct, frozen=True):
    """`queued` is what was asked; None before that. `state` as people are shown it."""

    queued: DeliveryQueued | None = None
    state: State = "queued"


class Queue(NamedTuple):
    asked: DeliveryQueued


class MarkSent(NamedTuple):
    vendor_message_id: str | None


class MarkFailed(NamedTuple):
    reason: str


class MarkUnknown(NamedTuple):
    reason: str


Command = Queue | MarkSent | MarkFailed | MarkUnknown


def decide(command: Command, delivery: Delivery) -> Sequence[DeliveryEvent]:
    asked = delivery.queued
    if isinstance(command, Queue):
        # Asked again: the first one stands.
        return [] if asked else [command.asked]
    if asked is None or delivery.state != "queued":
        # Settled is settled: an expiry that comes late does not undo what was sent.
        return []
    about = asked.channel_id, asked.session_key, asked.run_id
    match command:
        case MarkSent(vendor_message_id):
            return [DeliverySent(*about, vendor_message_id)]
        case MarkFailed(reason):
            return [DeliveryFailed(*about, reason)]
        case MarkUnknown(reason):
            return [DeliveryUnknown(*about, reason)]
        case _:
            assert_never(command)


def evolve(delivery: Delivery, event: DeliveryEvent) -> Delivery:
    match event:
        case DeliveryQueued():
            return Delivery(event)
        case DeliverySent():
            return Delivery(delivery.queued, "sent")
        case DeliveryFailed():
            return Delivery(delivery.queued, "failed")
        case DeliveryUnknown():
            return Delivery(delivery.queued, "unknown")
        case _:
            assert_never(event)


def count(messages: int, event: MessageTaken) -> int:
    """A conversation's state: how many messages it has."""
    return messages + 1


class Pseudonyms:
    """Our names for a vendor's conversations, people and limits, the same each time and telling nothing without `key`.

    `key` is the account's own, so the same person on two accounts is two subjects.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def session(self, conversation: str) -> str:
        return self._name("session", conversation)

    def subject(self, person: str) -> str:
        return self._name("subject", person)

    def limit(self, scope: str) -> str:
        return self._name("limit", scope)

    def _name(self, kind: str, vendor_id: str) -> str:
        return hmac.digest(self._key, f"{kind}\0{vendor_id}".encode(), hashlib.sha256).hex()[:32]


def seen_as(channel_id: UUID, vendor_id: str) -> bytes:
    """What a vendor's id is remembered by: SHA-256, for the id itself may tell of a person."""
    return hashlib.sha256(channel_id.bytes + vendor_id.encode()).digest()
