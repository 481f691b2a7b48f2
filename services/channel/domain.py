"""The pure rules of conversations and deliveries, and the pseudonyms of an account."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, assert_never
from uuid import UUID

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hmac import HMAC
from msgspec.structs import replace

from services.channel.events import (
    DeliveryEvent,
    DeliveryFailed,
    DeliveryQueued,
    DeliveryReceived,
    DeliveryResumed,
    DeliverySent,
    DeliveryUnknown,
    MessageChange,
    MessageDeleted,
    MessageEdited,
    MessageReacted,
    MessageTaken,
)

State = Literal["queued", "sent", "delivered", "read", "failed", "unknown"]


class Delivery(msgspec.Struct, frozen=True):
    """The state of one delivery."""

    queued: DeliveryQueued | None = None
    """The request; None before it was queued."""
    state: State = "queued"
    sent: tuple[str | None, ...] = ()
    """The vendor's id of each part, once the parts were sent."""
    late: tuple[int, ...] = ()
    """The parts that the vendor refused as too late, from 0."""
    due: tuple[int, ...] = ()
    """Those of them that are to be sent now."""


class QueueDelivery(NamedTuple):
    asked: DeliveryQueued


class MarkSent(NamedTuple):
    ids: tuple[str | None, ...]
    """The vendor's id of each part."""
    due: tuple[int, ...] = ()
    """As in `Delivery`, when the sending began."""


class MarkFailed(NamedTuple):
    reason: str
    ids: tuple[str | None, ...] = ()
    """As in `MarkSent`, if some parts were sent before."""


class MarkUnknown(NamedTuple):
    reason: str
    ids: tuple[str | None, ...] = ()
    """As in `MarkFailed`."""


class MarkReceived(NamedTuple):
    """A receipt, which the vendor sends after it has accepted the message."""

    state: Literal["delivered", "read", "failed"]
    reason: str
    of_last: bool = True
    """False: it is about a part before the last one."""
    late: str = ""
    """The vendor's id of a message that it refused as too late, if it can be sent nevertheless."""


Command = QueueDelivery | MarkSent | MarkFailed | MarkUnknown | MarkReceived


def decide(command: Command, delivery: Delivery) -> Sequence[DeliveryEvent]:
    asked = delivery.queued
    if isinstance(command, QueueDelivery):
        # A repeated request changes nothing: the first one counts.
        return [] if asked else [command.asked]
    if isinstance(command, MarkReceived):
        return _received(command, delivery)
    if asked is None or delivery.state != "queued":
        # The delivery has already ended: a late expiry must not undo a sent message.
        return []
    about = asked.channel_id, asked.session_key, asked.run_id
    match command:
        case MarkSent(due=due) if due != delivery.due:
            # Another part was refused meanwhile. It is sent by an item of its own, which ends the delivery.
            return []
        case MarkSent(ids):
            last = next((id_ for id_ in reversed(ids) if id_), None)
            return [DeliverySent(*about, last, ids if len(ids) > 1 else (), bool(delivery.late), asked.sender)]
        case MarkFailed(reason, ids):
            return [DeliveryFailed(*about, reason, ids if any(ids) else ())]
        case MarkUnknown(reason, ids):
            return [DeliveryUnknown(*about, reason, ids if any(ids) else ())]
        case _:
            assert_never(command)


def _received(command: MarkReceived, delivery: Delivery) -> Sequence[DeliveryEvent]:
    """Receipts come in any order and repeatedly: only one that says more than the last one counts. The last part tells
    whether the person has it all; each part can fail."""
    asked, state = delivery.queued, delivery.state
    if command.late in delivery.sent and state in ("queued", "sent", "delivered"):
        part = delivery.sent.index(command.late)
        if part not in delivery.late:
            return [DeliveryResumed(part)]
    if command.state == "failed":
        if asked and (state == "sent" or (state == "delivered" and not command.of_last)):
            return [DeliveryFailed(asked.channel_id, asked.session_key, asked.run_id, command.reason)]
        return []
    if command.of_last and (command.state, state) in (("delivered", "sent"), ("read", "sent"), ("read", "delivered")):
        return [DeliveryReceived(command.state)]
    return []


def evolve(delivery: Delivery, event: DeliveryEvent) -> Delivery:
    match event:
        case DeliveryQueued():
            return Delivery(event)
        case DeliverySent():
            return replace(delivery, state="sent", sent=event.parts or (event.vendor_message_id,), due=())
        case DeliveryResumed(part):
            return replace(delivery, state="queued", late=(*delivery.late, part), due=(*delivery.due, part))
        case DeliveryFailed():
            return replace(delivery, state="failed")
        case DeliveryUnknown():
            return replace(delivery, state="unknown")
        case DeliveryReceived(state):
            return replace(delivery, state=state)
        case _:
            assert_never(event)


def count(messages: int, event: MessageTaken) -> int:
    """The state of a conversation is the number of its messages."""
    return messages + 1


class Changes(msgspec.Struct, frozen=True):
    """How a message has changed since it was taken or sent."""

    count: int = 0
    deleted: bool = False
    content_bytes: int = 0
    """Of its edits and reactions; 0 once it is deleted, as their texts are removed then."""


# Of one message. Each costs a row, and a person can change a message as often as they like. To show or change the
# message, all of them are read.
MAX_CHANGES = 200
MAX_CHANGE_BYTES = 4 * 1024 * 1024
"""A further change is refused beyond this. One alone has up to a vendor's call more."""


def change(event: MessageChange, changes: Changes) -> Sequence[MessageChange]:
    """The vendor states the change. Nothing follows a deletion, and a deletion is never one too many."""
    is_full = changes.count >= MAX_CHANGES or changes.content_bytes >= MAX_CHANGE_BYTES
    if changes.deleted or (is_full and not isinstance(event, MessageDeleted)):
        return []
    return [event]


def changed(changes: Changes, event: MessageChange) -> Changes:
    match event:
        case MessageDeleted():
            return Changes(changes.count + 1, True)
        case MessageEdited() | MessageReacted():
            return Changes(changes.count + 1, content_bytes=changes.content_bytes + len(event.content))
        case _:
            assert_never(event)


class Pseudonyms:
    """Our ids for a vendor's conversations, people and limits: HMAC-SHA256 of the vendor's id.

    They are stable, and they reveal nothing without `key`. Each account has its own key, so the same person on two
    accounts is two subjects.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key

    def session(self, conversation: str) -> str:
        return _pseudonym(self._key, "session", conversation)

    def subject(self, person: str) -> str:
        return _pseudonym(self._key, "subject", person)

    def limit(self, scope: str) -> str:
        return _pseudonym(self._key, "limit", scope)


# The key schedule would cost more than the digest.
@lru_cache(maxsize=1024)
def _keyed(key: bytes) -> HMAC:
    return HMAC(key, SHA256())


# A conversation has many messages, and a person writes more than one.
@lru_cache(maxsize=8192)
def _pseudonym(key: bytes, kind: str, vendor_id: str) -> str:
    keyed = _keyed(key).copy()
    keyed.update(f"{kind}\0{vendor_id}".encode())
    return keyed.finalize().hex()[:32]


def part_id(channel_id: UUID, message: str) -> str:
    """How `delivery.part_ids` has the vendor's id of a message, which is unique in its channel at most."""
    return f"{channel_id}/{message}"


def dedupe_hash(channel_id: UUID, vendor_id: str) -> bytes:
    """The key under which a vendor's id is deduplicated: SHA-256, because the id itself may identify a person."""
    return hashlib.sha256(channel_id.bytes + vendor_id.encode()).digest()
