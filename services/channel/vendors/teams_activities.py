"""Activities of the Bot Framework: https://learn.microsoft.com/microsoftteams/platform/bots/how-to/conversations"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Literal

import msgspec

from services.channel.events import Attachment
from services.channel.vendors.base import UnreadableCall, kind_of, placeholder
from services.channel.vendors.items import Deleted, Edited, Ignored, Inbound, Item, Reacted, Receipt

_FILE_INFO = "application/vnd.microsoft.teams.file.download.info"
_READ = "application/vnd.microsoft.readReceipt"
# Without another < inside: otherwise each of many would search the whole rest for its end.
_MENTION = re.compile(r"<at[^<>]*>[^<]*</at>\s*")


class _Account(msgspec.Struct):
    id: str
    role: str | None = None


class _Conversation(msgspec.Struct):
    id: str
    tenantId: str | None = None
    conversationType: str | None = None


class _Entity(msgspec.Struct):
    mentioned: _Account | None = None


class _Sign(msgspec.Struct):
    type: str


class _Attachment(msgspec.Struct):
    contentType: str = ""
    name: str | None = None
    contentUrl: str | None = None
    content: Any = None


class Activity(msgspec.Struct):
    type: str
    id: str = ""
    name: str = ""
    """Of an event."""
    serviceUrl: str = ""
    channelId: str = ""
    text: str | None = None
    from_: _Account | None = msgspec.field(name="from", default=None)
    recipient: _Account | None = None
    conversation: _Conversation | None = None
    attachments: list[_Attachment] | None = None
    entities: list[_Entity] | None = None
    timestamp: datetime | None = None
    replyToId: str = ""
    """Of a reaction: the message that it is about."""
    reactionsAdded: list[_Sign] = []
    reactionsRemoved: list[_Sign] = []
    value: Any = None
    """The values that a card submits after a button was pressed."""


def read(activity: Activity, tenant: str) -> Sequence[Item]:
    """The items of an activity. `tenant`: whose messages are accepted; empty: every tenant's."""
    match activity.type:
        case "message":
            return [_spoken(activity, tenant)]
        case "messageUpdate":
            message = _spoken(activity, tenant)
            if isinstance(message, Ignored):
                return [message]
            order = _order(activity)
            return [Edited((f"update/{message.ids[0]}/{order}",), message.ids[0], message, order)]
        case "messageDelete" if activity.id and activity.conversation:
            target = _target(activity, activity.id)
            return [Deleted((f"deletion/{target}",), target)]
        case "messageReaction" if activity.id and activity.conversation and activity.from_ and activity.replyToId:
            return [*_reacted(activity, "added"), *_reacted(activity, "removed")]
        case "event" if activity.name == _READ and isinstance(activity.value, dict):
            # https://learn.microsoft.com/microsoftteams/platform/bots/how-to/conversations/conversation-messages
            last = str(activity.value.get("lastReadMessageId", ""))[:200]
            return [Receipt((f"activity/{activity.id}", f"read/{last}"), last, "read")]
    return [Ignored((f"activity/{activity.id}",), f"an activity {activity.type[:40]}")]


def _target(activity: Activity, id_: str) -> str:
    """An id of each message."""
    assert activity.conversation
    return f"activity/{activity.conversation.id}/{id_}"


def _order(activity: Activity) -> int:
    if activity.timestamp is None:
        raise UnreadableCall("timestamp: is missing")
    return round(activity.timestamp.timestamp() * 1_000)


def _reacted(activity: Activity, mode: Literal["added", "removed"]) -> Sequence[Reacted]:
    """Teams tells reactions to messages of the bot."""
    assert activity.conversation
    assert activity.from_
    given = activity.reactionsAdded if mode == "added" else activity.reactionsRemoved
    signs = tuple(sign.type for sign in given)
    if not signs:
        return []
    ids = (f"reaction/{activity.conversation.id}/{activity.id}/{mode}",)
    target, author = _target(activity, activity.replyToId), activity.from_.id
    order, conversation = _order(activity), activity.conversation.id
    return [Reacted(ids, target, activity.replyToId, author, signs, mode, order, conversation)]


def _spoken(activity: Activity, tenant: str) -> Inbound | Ignored:
    ids = (f"activity/{activity.id}",)
    if not activity.id or activity.from_ is None or activity.conversation is None:
        raise UnreadableCall("a message without id, author or conversation")
    if activity.from_.role == "bot" or (activity.recipient and activity.from_.id == activity.recipient.id):
        return Ignored(ids, "a bot's message")
    if tenant and activity.conversation.tenantId != tenant:
        return Ignored(ids, "a message of another tenant")
    text = _MENTION.sub("", activity.text or "").strip()
    # A copy of the text as HTML is an attachment, too.
    files = [one for one in activity.attachments or () if one.contentType != "text/html"]
    attachments = tuple(filter(None, map(_attachment, files)))
    if not text and files and not attachments:
        text = placeholder("a file", *(one.name or "" for one in files))
    # The values of a card come without a text.
    pressed = not text and not files and activity.value is not None
    if pressed:
        text = activity.value if isinstance(activity.value, str) else msgspec.json.encode(activity.value).decode()
    return Inbound(
        (_target(activity, activity.id),),
        activity.conversation.id,
        activity.from_.id,
        f"{activity.id} {activity.serviceUrl}",
        text,
        attachments=attachments,
        in_group=activity.conversation.conversationType in ("groupChat", "channel"),
        # A button stands under a message of the bot.
        mentions_bot=pressed
        or any(
            entity.mentioned and activity.recipient and entity.mentioned.id == activity.recipient.id
            for entity in activity.entities or ()
        ),
        replies_to_bot=pressed,
    )


def _attachment(file: _Attachment) -> Attachment | None:
    """A file of a chat has an address that needs no token; an image in a text has one that does."""
    content = file.content if isinstance(file.content, dict) else {}
    if file.contentType == _FILE_INFO and isinstance(url := content.get("downloadUrl"), str):
        return Attachment("file", f"open {url}", file.name or "")
    if file.contentType.startswith(("image/", "audio/", "video/")) and file.contentUrl:
        return Attachment(kind_of(file.contentType), f"token {file.contentUrl}", file.name or "")
    return None
