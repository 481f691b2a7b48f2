"""Feishu's events about messages: https://open.feishu.cn/document/server-docs/im-v1/message/events/receive"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec

from services.channel.events import Attachment
from services.channel.vendors.base import UnreadableCall, decode, placeholder
from services.channel.vendors.items import Deleted, Ignored, Inbound, Reacted

_FILES: dict[str, tuple[Literal["image", "voice", "video", "file"], str]] = {
    "image": ("image", "image_key"),
    "media": ("video", "file_key"),
    "audio": ("voice", "file_key"),
    "file": ("file", "file_key"),
}
"""The kind of each type of message with a file, and the field with its key."""
_ATTACHMENTS = {
    "sticker": "a sticker",
    "location": "a location",
    "share_chat": "a contact",
    "share_user": "a contact",
    "folder": "a folder",
    "interactive": "a card",
}


class _PersonId(msgspec.Struct):
    open_id: str | None = None
    user_id: str | None = None
    union_id: str | None = None


class _Sender(msgspec.Struct):
    sender_id: _PersonId | None = None
    sender_type: str = ""


class _Mention(msgspec.Struct):
    key: str
    name: str = ""
    mentioned_type: str = ""


class _Message(msgspec.Struct):
    message_id: str
    chat_id: str
    message_type: str
    content: str = "{}"
    chat_type: str = ""
    thread_id: str | None = None
    root_id: str | None = None
    mentions: list[_Mention] | None = None


class _Event(msgspec.Struct):
    sender: _Sender
    message: _Message


class _Recalled(msgspec.Struct):
    message_id: str


class _ReactionType(msgspec.Struct):
    emoji_type: str = ""


class _Reaction(msgspec.Struct):
    message_id: str
    reaction_type: _ReactionType
    action_time: str
    """Milliseconds, in decimal digits."""
    operator_type: str = ""
    user_id: _PersonId | None = None


_REACTIONS: dict[str, Literal["added", "removed"]] = {
    "im.message.reaction.created_v1": "added",
    "im.message.reaction.deleted_v1": "removed",
}


def read(ids: tuple[str, ...], kind: str, event: msgspec.Raw) -> Inbound | Deleted | Reacted | Ignored:
    if kind == "im.message.receive_v1":
        return _item(ids, decode(event, _Event))
    if kind == "im.message.recalled_v1":
        return Deleted(ids, _target(decode(event, _Recalled).message_id))
    if mode := _REACTIONS.get(kind):
        return _reacted(ids, mode, decode(event, _Reaction))
    return Ignored(ids, f"an event {kind[:60]}")


def _target(message: str) -> str:
    """An id of each message."""
    return f"message/{message}"


def _reacted(ids: tuple[str, ...], mode: Literal["added", "removed"], reaction: _Reaction) -> Reacted | Ignored:
    if reaction.operator_type != "user" or not (author := _author(reaction.user_id)):
        return Ignored(ids, "a reaction that no person made")
    time = reaction.action_time
    if not (time.isascii() and time.isdecimal() and len(time) <= 15):
        raise UnreadableCall("action_time: is not a time")
    signs = (f":{reaction.reaction_type.emoji_type}:",)
    return Reacted(ids, _target(reaction.message_id), reaction.message_id, author, signs, mode, int(time))


def _author(person: _PersonId | None) -> str | None:
    return (person.open_id or person.union_id or person.user_id) if person else None


def _item(ids: tuple[str, ...], event: _Event) -> Inbound | Ignored:
    message = event.message
    ids = (*ids, _target(message.message_id))
    author = _author(event.sender.sender_id)
    if event.sender.sender_type != "user" or author is None:
        return Ignored(ids, "a message that no person wrote")
    thread = f"/{message.root_id or message.message_id}" if message.thread_id else ""
    attachments = _attachments(message)
    text = "" if attachments else _text(message)
    if text is None:
        return Ignored(ids, f"a message of type {message.message_type[:40]}")
    return Inbound(
        ids,
        f"{message.chat_id}{thread}",
        author,
        message.message_id,
        text,
        parent=message.chat_id if thread else None,
        attachments=attachments,
        in_group=message.chat_type == "group",
        # If Feishu does not tell who is mentioned, it may be the bot.
        mentions_bot=any(mention.mentioned_type in ("bot", "") for mention in message.mentions or ()),
    )


def _attachments(message: _Message) -> tuple[Attachment, ...]:
    kind, field = _FILES.get(message.message_type, ("file", ""))
    content = _content_of(message)
    if not isinstance(content, dict) or not isinstance(key := content.get(field), str) or not key:
        return ()
    return (Attachment(kind, f"{message.message_id}/{key}", str(content.get("file_name") or "")),)


def _content_of(message: _Message) -> Any:
    try:
        return msgspec.json.decode(message.content)
    except msgspec.DecodeError as error:
        raise UnreadableCall(f"content: {error}") from error


def _text(message: _Message) -> str | None:
    content = _content_of(message)
    if not isinstance(content, dict):
        return None
    if message.message_type == "text":
        text = str(content.get("text") or "")
    elif message.message_type == "post":
        text = "".join(_post_texts(content)).strip()
    elif kind := _ATTACHMENTS.get(message.message_type):
        return placeholder(kind)
    else:
        return None
    for mention in message.mentions or ():
        text = text.replace(mention.key, f"@{mention.name}")
    return text


def _post_texts(node: Any) -> Iterator[str]:
    """The texts of a rich text, in their order, a line for each paragraph."""
    if isinstance(node, dict):
        if isinstance(title := node.get("title"), str) and title:
            yield f"{title}\n"
        if isinstance(text := node.get("text"), str):
            yield text
        elif node.get("tag") == "at":
            yield str(node.get("user_id") or f"@{node.get('user_name', '')}")
        for value in node.values():
            if isinstance(value, list | dict):
                yield from _post_texts(value)
    elif isinstance(node, list):
        for child in node:
            yield from _post_texts(child)
            if isinstance(child, list):
                yield "\n"
