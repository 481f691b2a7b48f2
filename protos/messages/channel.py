"""Channel: messages of people coming in, replies going out.

`session_key` is opaque: one per channel and conversation (and thread). `text` is personal content. The tenant
is in the envelope.
"""

from __future__ import annotations

from typing import Literal
from uuid import UUID

from protos.envelope import Message
from protos.messages import Count, Timestamp


class MessageReceived(Message, frozen=True, kw_only=True):
    """A person wrote; the vendor's webhook has been verified and stored. As work it starts or joins a run.

    channel_type: ``telegram``, ``slack``, …; open, for channels are added.
    conversation_id: the vendor's, to be given back in `SendMessage`.
    subject_id: our id of the person whose content this is; never the vendor's.
    vendor_message_id: what a reply may refer to.
    position: in the conversation, from 1 without a gap, by which whoever gets them out of order puts them right; 0 in
    messages from before it was there.
    """

    channel_id: UUID
    channel_type: str
    agent_id: UUID
    session_key: str
    conversation_id: str
    subject_id: str
    vendor_message_id: str
    text: str
    received_at: Timestamp
    position: Count = 0


class SendMessage(Message, frozen=True, kw_only=True):
    """Send a text to a conversation, once. delivery_id: the vendor's idempotency field is made from it.

    reply_to: vendor_message_id of the message that is answered. position: of what is sent to the session, as in
    `MessageReceived`.
    """

    delivery_id: UUID
    channel_id: UUID
    session_key: str
    conversation_id: str
    text: str
    run_id: UUID | None = None
    reply_to: str | None = None
    position: Count = 0


class MessageDelivered(Message, frozen=True, kw_only=True):
    """The vendor has accepted a message. vendor_message_id: null where the vendor returns none."""

    delivery_id: UUID
    channel_id: UUID
    session_key: str
    run_id: UUID | None
    vendor_message_id: str | None


class MessageUndelivered(Message, frozen=True, kw_only=True):
    """A message was refused for good, or nobody can know whether the vendor took it (`unknown`)."""

    delivery_id: UUID
    channel_id: UUID
    session_key: str
    run_id: UUID | None
    outcome: Literal["failed", "unknown"]
    reason: str


class AccountBroken(Message, frozen=True, kw_only=True):
    """A channel account no longer works until somebody repairs it, such as after its token was revoked."""

    channel_id: UUID
    channel_type: str
    reason: str
