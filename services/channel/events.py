"""The facts that the channel service stores.

A field `content` is personal: JSON of `InboundContent` or `OutboundContent` unless its event says otherwise, encrypted
with the subject's key. The associated data are the id of the event or the delivery, and ``content``. It is empty if the
message was deleted. No other field identifies a person
of a chat.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec

from protos.messages.channel import Sender


class Attachment(msgspec.Struct, frozen=True):
    """A file that a person sent with a message."""

    kind: Literal["image", "voice", "video", "file"]
    ref: str
    """The vendor's id of the content, or its address."""
    name: str = ""


class InboundContent(msgspec.Struct, frozen=True):
    """The text of a person's message, with the vendor's ids of the conversation, the person and the message."""

    conversation: str
    person: str
    message: str
    text: str
    """As the person wrote it; empty if there are only attachments."""
    attachments: tuple[Attachment, ...] = ()
    words: str = ""
    """The person's own, if the text also quotes a message of the bot."""
    for_others: bool = False
    """Written in a group to other persons, and not to the bot; or it quotes another message than the bot's."""
    in_album: bool = False
    """As `Inbound.in_album`."""


class File(msgspec.Struct, frozen=True):
    """A file to send, by its address or its path in the object store."""

    url: str
    name: str = ""
    path: str = ""
    """Empty if there is an address."""

    @property
    def link(self) -> str:
        """The file as a text in Markdown, in which signs of the address mark nothing."""
        if self.path:
            return f"[The file {self.name} cannot be sent in this chat.]"
        return f"{self.name}: <{self.url}>" if self.name else f"<{self.url}>"


class OutboundContent(msgspec.Struct, frozen=True):
    """The text to send, with the vendor's ids of the conversation and of the message that it answers."""

    conversation: str
    text: str
    reply_to: str | None
    files: tuple[File, ...] = ()
    """They are sent after the text, in their order."""


class MessageTaken(msgspec.Struct, frozen=True):
    """A verified message was accepted into its conversation. Stream: the conversation, named by its session key."""

    channel_id: UUID
    channel_type: str
    agent_id: UUID
    subject_id: str
    content: bytes
    received_at: datetime
    by_admin: bool = False
    """The vendor says that its author is an administrator of the group."""
    approvers: tuple[str, ...] = ()
    """The channel's, when the message was accepted."""


class MessageEdited(msgspec.Struct, frozen=True):
    """A person changed the text of a message. Stream of this and the next two: the message, named by the id of its
    `MessageTaken`, or by that of its delivery."""

    subject_id: str
    content: bytes
    """The new text."""
    order: int
    """The vendor's: of two edits the one with the higher number is newer, also if it comes first."""


class MessageDeleted(msgspec.Struct, frozen=True):
    """The message was deleted. Its text is removed from its `MessageTaken` and from each `MessageEdited`."""


class MessageReacted(msgspec.Struct, frozen=True):
    """A person put signs to the message, or took them back."""

    subject_id: str
    content: bytes
    """JSON of a list of signs."""
    mode: Literal["added", "removed", "all"]
    """``all``: these are all signs of this person now."""
    order: int


MessageChange = MessageEdited | MessageDeleted | MessageReacted


class DeliveryQueued(msgspec.Struct, frozen=True):
    """A message was queued for sending. Stream: the delivery."""

    channel_id: UUID
    session_key: str
    run_id: UUID | None
    subject_id: str
    content: bytes
    sender: Sender = Sender()


class DeliverySent(msgspec.Struct, frozen=True):
    """The vendor accepted the message."""

    channel_id: UUID
    session_key: str
    run_id: UUID | None
    vendor_message_id: str | None
    """The vendor's id of the last part that has one; null if no part has one."""
    parts: tuple[str | None, ...] = ()
    """If there are several: the vendor's id of each part, in their order."""
    again: bool = False
    """It follows a `DeliveryResumed`."""
    sender: Sender = Sender()


class DeliveryResumed(msgspec.Struct, frozen=True):
    """The vendor refused a part that it had accepted, as it is too late for an ordinary message. The part is sent once
    more, as a message that may be late."""

    part: int
    """From 0."""


class DeliveryFailed(msgspec.Struct, frozen=True):
    """The vendor refused the message permanently, told later that it was not delivered, or it was not sent at all."""

    channel_id: UUID
    session_key: str
    run_id: UUID | None
    reason: str
    parts: tuple[str | None, ...] = ()
    """If some of several parts were sent before: the vendor's id of each part, in their order."""


class DeliveryUnknown(msgspec.Struct, frozen=True):
    """The message was sent, but the vendor did not confirm it."""

    channel_id: UUID
    session_key: str
    run_id: UUID | None
    reason: str
    parts: tuple[str | None, ...] = ()
    """As in `DeliveryFailed`."""


class DeliveryReceived(msgspec.Struct, frozen=True):
    """The message reached the person's device, or the person has read it."""

    state: Literal["delivered", "read"]


DeliveryEvent = DeliveryQueued | DeliverySent | DeliveryResumed | DeliveryFailed | DeliveryUnknown | DeliveryReceived
