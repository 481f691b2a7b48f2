"""Channel: messages that people send, and replies to them.

`session_key` is opaque: one per channel and conversation (and thread). `text` is personal content. The tenant
is in the envelope.
"""

from __future__ import annotations

from typing import Final, Literal
from uuid import UUID

import msgspec

from protos.envelope import Message
from protos.messages import Count, Timestamp

ASKER: Final = "asker"
"""Of the names of approvers: the person who asked."""
CHAT_ADMINS: Final = "chat-admins"
"""Of the names of approvers: whom the vendor calls an administrator of the group in which the answer is written."""
FORWARDED: Final = "[Forwarded message]"
"""The line of a text behind which it has the words of another message, perhaps of another person."""
IN_REPLY: Final = "[In reply to this message]"
"""As `FORWARDED`."""


class Image(msgspec.Struct, frozen=True, kw_only=True):
    """An image that a person sent with a message."""

    path: str
    """In the object store."""
    content_type: str


class MessageReceived(Message, frozen=True, kw_only=True):
    """A person wrote a message; the vendor's webhook is verified and stored. As work it starts or joins a run."""

    channel_id: UUID
    channel_type: str
    """``telegram``, ``slack``, …; an open set, because channel types are added."""
    agent_id: UUID
    session_key: str
    conversation_id: str
    """The vendor's id; `SendMessage` returns it."""
    subject_id: str
    """Our id of the person who owns this content; never the vendor's id."""
    vendor_message_id: str
    """The vendor's id, to which a reply may refer."""
    text: str
    received_at: Timestamp
    position: Count = 0
    """Position in the conversation, from 1 without a gap: a receiver restores the order with it. 0 in messages from
    before this field was added."""
    parent_session_key: str = ""
    """The session of the conversation that this one branched off from, such as the channel of a thread; empty if there
    is none."""
    images: tuple[Image, ...] = ()
    """For models that see. The text names them."""
    by_admin: bool = False
    """The vendor says that its author is an administrator of the group."""
    approvers: tuple[str, ...] = ()
    """Who may decide by a message in this channel about a call that waits for approval: asker, chat-admins or
    ``person:<subject id>``. Empty: whom the agent's definition names."""
    words: str = ""
    """The author's own words, if `text` also quotes a message of the bot: they alone can allow or refuse a call that
    waits for approval. Empty: `text` can."""
    for_others: bool = False
    """Written in a group to other persons, and not to the bot: it neither allows nor refuses a call."""
    thread_run_id: UUID | None = None
    """The run whose message began the thread of this message: it alone can be answered from the thread, of the runs
    that wait in the parent session."""
    in_album: bool = False
    """It is a part of an album, whose other parts come as messages of their own."""


class AnswerByPerson(Message, frozen=True, kw_only=True):
    """A member or a client of the API has written to a conversation. As work it is kept for the agent if the session is
    taken over."""

    agent_id: UUID
    """Of the conversation."""
    session_key: str
    subject_id: str
    """Our id of the person whose content this is."""
    text: str
    sent_at: Timestamp


class MessageChanged(Message, frozen=True, kw_only=True):
    """A person has edited or deleted a message. As work it changes the message, or tells the run that has taken it."""

    channel_id: UUID
    agent_id: UUID
    session_key: str
    conversation_id: str
    subject_id: str
    """Of the message."""
    vendor_message_id: str
    message_id: UUID
    """The id under which its `MessageReceived` was sent as work."""
    position: Count
    """Of the message. A receiver that has not handled this position yet gets the change again later."""
    deleted: bool
    text: str
    """The new text; empty if it was deleted."""
    has_files: bool
    """The message has files, whose texts are not part of `text`."""
    order: int
    """Of two edits of a message, the one with the higher number is newer."""
    changed_at: Timestamp


class File(msgspec.Struct, frozen=True, kw_only=True):
    """A file that an agent made."""

    path: str
    """In the object store."""
    name: str


class Sender(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who sends a message: the groups of its usage in reports, and the scopes of budgets. Empty: unknown."""

    agent_id: UUID | None = None
    member_id: UUID | None = None
    api_key_id: str = ""
    tag: str = ""
    """The agent's."""


class SendMessage(Message, frozen=True, kw_only=True):
    """Send a text, and files, to a conversation, once."""

    delivery_id: UUID
    """The vendor's idempotency field is made from it."""
    channel_id: UUID
    session_key: str
    conversation_id: str
    text: str
    run_id: UUID | None = None
    reply_to: str | None = None
    """The vendor_message_id of the message that this one answers."""
    subject_id: str = ""
    """The person with whom the text is erased; empty in messages from before this field was added."""
    files: tuple[File, ...] = ()
    """They are sent after the text."""
    sender: Sender = Sender()
    position: Count = 0
    """Position among the messages sent to the session, as in `MessageReceived`. The last field: it is known last."""


class MessageDelivered(Message, frozen=True, kw_only=True):
    """The vendor has accepted a message."""

    delivery_id: UUID
    channel_id: UUID
    session_key: str
    run_id: UUID | None
    vendor_message_id: str | None
    """Null if the vendor does not return an id."""
    sender: Sender = Sender()
    """As in `SendMessage`."""


class MessageUndelivered(Message, frozen=True, kw_only=True):
    """A message was refused for good (`failed`), or the vendor may or may not have taken it (`unknown`)."""

    delivery_id: UUID
    channel_id: UUID
    session_key: str
    run_id: UUID | None
    outcome: Literal["failed", "unknown"]
    reason: str


class AccountBroken(Message, frozen=True, kw_only=True):
    """A channel account does not work until a person repairs it, for example after its token was revoked."""

    channel_id: UUID
    channel_type: str
    reason: str
