"""The items that an adapter finds in a webhook call of its vendor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from services.channel.events import Attachment


class Inbound(NamedTuple):
    """A person's message."""

    ids: tuple[str, ...]
    """All ids under which the vendor may send this message. If one of them is known, the message is a repeat."""
    conversation: str
    """The vendor's id of the conversation, including the thread if there is one. `send` gets it back."""
    person: str
    """The vendor's id of the author."""
    message: str
    """The vendor's id of the message, for replies."""
    text: str
    parent: str | None = None
    """The conversation that this one branched off from, such as the channel of a thread."""
    attachments: tuple[Attachment, ...] = ()
    """With them the text may be empty."""
    in_group: bool = False
    """Others read it, too."""
    mentions_bot: bool | None = False
    """None: perhaps. It is answered then, and a yes in it does not count if it may be for others."""
    replies_to_bot: bool = False
    """It quotes a message of the bot."""
    by_admin: bool = False
    """The vendor says that the author is an administrator of the group."""
    words: str = ""
    """The author's own, if the text also has those of a message of the bot that they quote. With a message of another
    person, the author answers that person: it stays empty."""
    also: str = ""
    """A further id of the author, under which later messages may come alone."""
    names_others: bool = False
    """It mentions other persons, or answers one of them."""
    quotes: str = ""
    """The vendor's id of the message that it quotes, if the vendor does not name its author."""
    root: str = ""
    """The vendor's id of the message at which its thread began."""
    in_album: bool = False
    """It is one of several files that were sent together, each as a message of its own, or may be one."""
    album: str = ""
    """The vendor's id of these files together, in the form of `ids`; empty: the vendor tells none."""

    @property
    def for_others(self) -> bool:
        """Written in a group to other persons, and not to the bot."""
        return self.in_group and self.names_others and not (self.mentions_bot or self.replies_to_bot)


class Moved(NamedTuple):
    """A conversation got another id. It goes on with its history."""

    ids: tuple[str, ...]
    old: str
    new: str
    is_person: bool = False
    """The ids are a person's. The old one may become another person's, in a conversation of their own."""


class Receipt(NamedTuple):
    """The vendor's later news of a message that it has accepted."""

    ids: tuple[str, ...]
    message: str
    """The vendor's id of the message, as `Vendor.send` returned it."""
    state: Literal["delivered", "read", "failed"]
    reason: str = ""
    """Why it failed. With the prefix of `AccountRefused` the account is refused."""


class Edited(NamedTuple):
    """A person changed the text of a message."""

    ids: tuple[str, ...]
    target: str
    """The one among the `ids` of the message by which it is found."""
    message: Inbound
    """As it is now. Only its text is new."""
    order: int
    """Rises with each change of the message, such as the vendor's time of it."""


class Deleted(NamedTuple):
    """A message of a person was deleted."""

    ids: tuple[str, ...]
    target: str
    """As in `Edited`."""


class Reacted(NamedTuple):
    """A person put signs to a message of a person or of the bot, or took them back."""

    ids: tuple[str, ...]
    target: str
    """As in `Edited`. A message of the bot is found by `message`."""
    message: str
    """The vendor's id of the message."""
    person: str
    signs: tuple[str, ...]
    mode: Literal["added", "removed", "all"]
    """``all``: `signs` are all of this person at this message now."""
    order: int
    """As in `Edited`."""
    conversation: str = ""
    """Of the message, if its id is unique in its conversation only."""


Change = Edited | Deleted | Reacted


class Ignored(NamedTuple):
    """A genuine event that starts no run."""

    ids: tuple[str, ...]
    reason: str
    """Shown to operators: the kind of the event, never its content."""


Item = Inbound | Change | Ignored | Moved | Receipt


class Ack(NamedTuple):
    """The answer to a webhook call, sent after all its items are stored."""

    body: bytes = b""
    media_type: str = "text/plain"
    status: int = 200


class Received(NamedTuple):
    """The items of one webhook call, in its order."""

    items: Sequence[Item]
    ack: Ack = Ack()
