"""Feishu's events about messages: https://open.feishu.cn/document/server-docs/im-v1/message/events/receive"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import msgspec

from services.channel.events import Attachment
from services.channel.vendors.base import UnreadableCall, decode, described, from_json, placeholder
from services.channel.vendors.items import Deleted, Ignored, Inbound, Reacted

_FILES: dict[str, tuple[Literal["image", "voice", "video", "file"], str]] = {
    "image": ("image", "image_key"),
    "media": ("video", "file_key"),
    "audio": ("voice", "file_key"),
    "file": ("file", "file_key"),
}
"""The kind of each type of message with a file, and the field with its key."""
FORWARDED = "merge_forward"
"""In place of the key of a file: the messages that a message forwards."""
_NO_MESSAGE = "no person writes it to the bot"
# By the type of the message, then by that of the event. Empty: it is read; else why it is ignored.
# https://open.feishu.cn/document/server-docs/im-v1/message-content-description/message_content
KINDS: Mapping[str, str] = {
    "text": "",
    "post": "",
    "image": "",
    "file": "",
    "folder": "",
    "audio": "",
    "media": "",
    "sticker": "",
    "interactive": "",
    "share_chat": "",
    "share_user": "",
    "location": "",
    "todo": "",
    "vote": "",
    "video_chat": "",
    "share_calendar_event": "",
    "calendar": "",
    "general_calendar": "",
    "hongbao": "",
    "merge_forward": "",
    "system": "a notice about the chat",
    "event.im.message.receive_v1": "",
    "event.im.message.recalled_v1": "",
    "event.im.message.reaction.created_v1": "",
    "event.im.message.reaction.deleted_v1": "",
    "event.card.action.trigger": "",
    "event.im.message.message_read_v1": "it names messages, and not which delivery of ours",
    "event.im.message.bot_muted_v1": _NO_MESSAGE,
    "event.im.chat.access_event.bot_p2p_chat_entered_v1": _NO_MESSAGE,
    "event.im.chat.member.bot.added_v1": _NO_MESSAGE,
    "event.im.chat.member.bot.deleted_v1": _NO_MESSAGE,
    "event.im.chat.member.user.added_v1": _NO_MESSAGE,
    "event.im.chat.member.user.deleted_v1": _NO_MESSAGE,
    "event.im.chat.member.user.withdrawn_v1": _NO_MESSAGE,
    "event.im.chat.updated_v1": _NO_MESSAGE,
    "event.im.chat.disbanded_v1": _NO_MESSAGE,
    "event.application.bot.menu_v6": "it names no chat",
}
_NAMES = {
    "sticker": "Sticker",
    "location": "Location",
    "share_chat": "Group",
    "share_user": "Contact",
    "folder": "Folder",
    "todo": "Task",
    "vote": "Poll",
    "video_chat": "Video meeting",
    "share_calendar_event": "Calendar event",
    "calendar": "Calendar event",
    "general_calendar": "Calendar event",
    "hongbao": "Red packet",
}
"""The names of messages without text. Its fields of `_FACTS` follow."""
_FACTS = (
    "title",
    "name",
    "file_name",
    "topic",
    "text",
    "summary",
    "latitude",
    "longitude",
    "start_time",
    "end_time",
    "due_time",
    "chat_id",
    "user_id",
)


# Elements of a card whose text is their content: https://open.feishu.cn/document/feishu-cards/card-json-v2-components
_CARD_TEXTS = ("plain_text", "lark_md", "markdown")
# An image in Markdown, by its key.
_MD_IMAGE = re.compile(r"!\[[^\]\n]{0,200}\]\((img_[0-9A-Za-z_-]{1,200})\)")
_RICH = {"post": "a text", "interactive": "a card"}
_KEY = re.compile(r"@_(all|user_[0-9]+)")
"""In place of a name."""
_ALL = "@_all"
"""All people, who mostly have no entry among the mentions."""


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
    parent_id: str | None = None
    """The message that it quotes; in a thread, the first one."""
    mentions: list[_Mention] | None = None


class _Event(msgspec.Struct):
    sender: _Sender
    message: _Message


class _Action(msgspec.Struct):
    """The values that a person pressed, chose or entered in a card. Those of other elements may be null."""

    value: Any = None
    name: str | None = None
    option: str | None = None
    options: list[str] | None = None
    input_value: str | None = None
    form_value: dict[str, Any] | None = None


class _Context(msgspec.Struct):
    open_message_id: str = ""
    open_chat_id: str = ""


class _Pressed(_Context, kw_only=True):
    """The ids of the message and the chat stand in `context`, or beside it."""

    operator: _PersonId
    action: _Action
    context: _Context | None = None


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
    if kind == "card.action.trigger":
        return _pressed(ids, decode(event, _Pressed))
    if kind == "im.message.receive_v1":
        return _item(ids, decode(event, _Event))
    if kind == "im.message.recalled_v1":
        return Deleted(ids, _target(decode(event, _Recalled).message_id))
    if mode := _REACTIONS.get(kind):
        return _reacted(ids, mode, decode(event, _Reaction))
    return Ignored(ids, KINDS.get(f"event.{kind}") or f"an event {kind[:60]}")


def _pressed(ids: tuple[str, ...], press: _Pressed) -> Inbound | Ignored:
    """https://open.feishu.cn/document/feishu-cards/card-callback-communication"""
    place = press.context or press
    author, chat, action = _author(press.operator), place.open_chat_id, press.action
    if not author or not chat:
        return Ignored(ids, "a button without a chat or an author")
    chosen = [action.input_value, action.option, ", ".join(action.options or ())]
    value = action.form_value or action.value
    if value:
        chosen.insert(0, value if isinstance(value, str) else msgspec.json.encode(value).decode())
    text = "\n".join(filter(None, chosen)) or action.name or ""
    # In which thread the card stands is not told, nor the kind of the chat. A button is for the bot in any.
    message = place.open_message_id
    return Inbound(ids, chat, author, message, text, mentions_bot=True, replies_to_bot=True)


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
    text = "" if attachments and message.message_type != "post" else _text(message)
    if text is None:
        return Ignored(ids, KINDS.get(message.message_type) or f"a message of type {message.message_type[:40]}")
    return Inbound(
        ids,
        f"{message.chat_id}{thread}",
        author,
        message.message_id,
        text,
        parent=message.chat_id if thread else None,
        attachments=attachments,
        in_group=message.chat_type == "group",
        # If Feishu does not say who is mentioned, it may be the bot.
        mentions_bot=any(one.mentioned_type in ("bot", "") and one.key != _ALL for one in message.mentions or ()),
        names_others=any(mention.mentioned_type == "user" for mention in message.mentions or ()),
        quotes="" if thread else message.parent_id or "",
        root=(thread and message.root_id) or "",
        # Feishu does not say which files were sent together.
        in_album=message.message_type in ("image", "media", "file"),
    )


def _attachments(message: _Message) -> tuple[Attachment, ...]:
    if message.message_type == "merge_forward":
        # The event does not have the messages. They are fetched as a file is.
        return (Attachment("file", f"{message.message_id}/{FORWARDED}", "forwarded messages.txt"),)
    content = _content_of(message)
    if message.message_type == "post":
        files = _post_files(_post(content))
        return tuple(Attachment(kind, f"{message.message_id}/{key}") for kind, key in files)
    kind, field = _FILES.get(message.message_type, ("file", ""))
    if not isinstance(content, dict) or not isinstance(key := content.get(field), str) or not key:
        return ()
    return (Attachment(kind, f"{message.message_id}/{key}", str(content.get("file_name") or "")),)


def _post_files(node: Any) -> Iterator[tuple[Literal["image", "video"], str]]:
    """The pictures and videos in a rich text."""
    if isinstance(node, dict):
        if node.get("tag") == "img" and isinstance(key := node.get("image_key"), str):
            yield "image", key
        elif node.get("tag") == "media" and isinstance(key := node.get("file_key"), str):
            yield "video", key
        elif node.get("tag") == "md" and isinstance(text := node.get("text"), str):
            yield from (("image", key) for key in _MD_IMAGE.findall(text))
        node = list(node.values())
    if isinstance(node, list):
        for child in node:
            yield from _post_files(child)


def _content_of(message: _Message) -> Any:
    try:
        return from_json(message.content)
    except msgspec.DecodeError as error:
        raise UnreadableCall(f"content: {error}") from error


def _text(message: _Message) -> str | None:
    content = _content_of(message)
    if not isinstance(content, dict):
        return None
    if message.message_type == "text":
        text = str(content.get("text") or "")
    elif message.message_type in ("post", "interactive"):
        rich = _post(content) if message.message_type == "post" else content
        text = "".join(_post_texts(rich)).strip()
        # Of pictures without a text, people make a rich text, too.
        if not text and not any(_post_files(rich)):
            text = placeholder(_RICH[message.message_type])
    elif name := _NAMES.get(message.message_type):
        text = _facts(name, content)
    elif message.message_type in _FILES:
        text = placeholder("a file")
    else:
        return None
    names = {mention.key: mention.name for mention in message.mentions or ()}
    bots = {mention.key for mention in message.mentions or () if mention.mentioned_type == "bot"}

    def named(key: re.Match[str]) -> str:
        # At an end of the text, it only says to whom the person speaks.
        is_address = key[0] in bots and not (text[: key.start()].strip() and text[key.end() :].strip())
        return "" if is_address else f"@{names.get(key[0], key[1])}"

    # A mention alone is a message, too.
    return _KEY.sub(named, text).strip() or _KEY.sub(lambda key: f"@{names.get(key[0], key[1])}", text)


def _facts(name: str, content: dict[str, Any]) -> str:
    facts = (content.get(field) for field in _FACTS)
    # The summary of a task is a rich text.
    words = ("".join(_post_texts(fact)).strip() if isinstance(fact, dict) else fact for fact in facts)
    options = content.get("options")
    choices = [f"- {option}" for option in options] if isinstance(options, list) else []
    return "\n".join([described(name, *words), *choices])


def forwarded(messages: Iterable[Mapping[str, Any]]) -> str:
    """The texts of the messages that a message forwards, a paragraph for each.

    https://open.feishu.cn/document/server-docs/im-v1/message/get
    """
    return "\n\n".join(filter(None, map(_forwarded, messages)))


def _forwarded(given: Mapping[str, Any]) -> str:
    kind = str(given.get("msg_type") or "")
    if kind == FORWARDED:
        # The messages in it are among the others.
        return ""
    if given.get("deleted"):
        return described("Deleted message")
    body = given.get("body")
    content = str(body.get("content") or "{}") if isinstance(body, dict) else "{}"
    try:
        mentions = msgspec.convert(given.get("mentions"), list[_Mention] | None)
        text = _text(_Message("", "", kind, content, mentions=mentions))
    except (UnreadableCall, msgspec.ValidationError):
        text = None
    return text or described("Message", kind)


def _post(content: Any) -> Any:
    """A rich text once: Feishu may tell it in several languages, and also in the newer form ``content_v2``."""
    if not isinstance(content, dict):
        return None
    if not content.keys() & {"title", "content", "content_v2"}:
        content = next((one for one in content.values() if isinstance(one, dict)), {})
    newer = content.get("content_v2")
    paragraphs = newer if isinstance(newer, list) and newer else content.get("content")
    return {"title": content.get("title"), "content": paragraphs}


def _post_texts(node: Any) -> Iterator[str]:
    """The texts of a rich text, in their order, a line for each paragraph."""
    if isinstance(node, dict):
        if isinstance(title := node.get("title"), str) and title:
            yield f"{title}\n"
        if node.get("tag") in _CARD_TEXTS and isinstance(content := node.get("content"), str):
            yield f"{content}\n"
        if isinstance(text := node.get("text"), str):
            yield _MD_IMAGE.sub("", text) if node.get("tag") == "md" else text
        elif node.get("tag") == "at":
            key = str(node.get("user_id") or "")
            yield key if _KEY.fullmatch(key) else f"@{node.get('user_name') or key}"
        elif node.get("tag") == "emotion":
            yield f":{node.get('emoji_type') or 'emoji'}:"
        if node.get("tag") == "a" and isinstance(address := node.get("href"), str) and address not in ("", text):
            yield f" ({address})" if text else address
        for value in node.values():
            if isinstance(value, list | dict):
                yield from _post_texts(value)
    elif isinstance(node, list):
        for child in node:
            yield from _post_texts(child)
            if isinstance(child, list):
                yield "\n"
