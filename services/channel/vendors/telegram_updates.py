"""Telegram's updates: https://core.telegram.org/bots/api#update"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from services.channel.events import Attachment
from services.channel.vendors.base import Batch, UnreadableCall, decode, described, forwarded, kind_of, quoting
from services.channel.vendors.items import Ack, Deleted, Edited, Ignored, Inbound, Moved, Reacted, Received
from services.channel.vendors.telegram_kinds import KINDS, why_ignored, words

# The kinds of update that are read; Telegram sends no others.
ASKED = [kind for kind, reason in KINDS.items() if not reason and "." not in kind]
# The kind of file by the field of the message that holds it; None: by the stated type.
_FILES: dict[str, Literal["image", "voice", "video"] | None] = {
    "photo": "image",
    "live_photo": "video",
    "voice": "voice",
    "audio": "voice",
    "video": "video",
    "video_note": "video",
    "animation": "video",
    "document": None,
}


class Bot(NamedTuple):
    """The bot that got the update."""

    id: str
    name: str
    """Such as ``@ada_bot``; empty: not known."""


class _User(msgspec.Struct):
    id: int
    is_bot: bool = False


class _Chat(msgspec.Struct):
    id: int
    type: str = "private"


class _Entity(msgspec.Struct):
    type: str
    offset: int
    length: int
    user: _User | None = None
    url: str = ""


class _Quoted(msgspec.Struct):
    """The message to which another one replies."""

    from_: _User | None = msgspec.field(name="from", default=None)
    text: str | None = None
    caption: str | None = None
    entities: list[_Entity] | None = None
    caption_entities: list[_Entity] | None = None


class _Topic(msgspec.Struct):
    topic_id: int


class _Quote(msgspec.Struct):
    """The part of a message to which another one replies."""

    text: str = ""


class _File(msgspec.Struct):
    file_id: str
    file_name: str | None = None
    mime_type: str | None = None


class _Paid(msgspec.Struct):
    """A preview has no file."""

    photo: list[_File] | None = None
    video: _File | None = None


class _PaidMedia(msgspec.Struct):
    paid_media: list[_Paid] = []


class _Message(msgspec.Struct):
    message_id: int
    chat: _Chat
    from_: _User | None = msgspec.field(name="from", default=None)
    sender_chat: _Chat | None = None
    """The chat in whose name the message was written: an anonymous administrator, or a channel."""
    text: str | None = None
    caption: str | None = None
    entities: list[_Entity] | None = None
    caption_entities: list[_Entity] | None = None
    quote: _Quote | None = None
    media_group_id: str | None = None
    """Of an album."""
    business_connection_id: str | None = None
    """The message was written to a person in whose name the bot answers."""
    message_thread_id: int | None = None
    is_topic_message: bool | None = None
    is_automatic_forward: bool | None = None
    direct_messages_topic: _Topic | None = None
    """A person writes to a channel. All of them do it in one chat."""
    forward_origin: Any = None
    """The message was written by another person, or elsewhere."""
    migrate_to_chat_id: int | None = None
    migrate_from_chat_id: int | None = None


# The author of a channel's posts in the group that is linked to it.
_FORWARDER = 777000


class _Press(msgspec.Struct):
    """A button under a message was pressed. The message is missing if it is too old."""

    id: str
    from_: _User = msgspec.field(name="from")
    data: str | None = None
    message: _Message | None = None


class _DeletedOfBusiness(msgspec.Struct):
    business_connection_id: str
    chat: _Chat
    message_ids: list[int]


class _Sign(msgspec.Struct):
    type: str = ""
    emoji: str = ""


class _Reaction(msgspec.Struct):
    """`user` is missing if the reaction was made in the name of a chat."""

    chat: _Chat
    message_id: int
    user: _User | None = None
    actor_chat: _Chat | None = None
    new_reaction: list[_Sign] = []


def read(body: bytes, bot: Bot) -> Received:
    """The items of an update."""
    update = decode(body, dict[str, msgspec.Raw])
    number = decode(update.pop("update_id", msgspec.Raw(b"null")), int)
    ids = (f"update/{number}",)
    if "callback_query" in update:
        return _pressed(ids, decode(update["callback_query"], _Press))
    if "message_reaction" in update:
        return Received([_reacted(ids, decode(update["message_reaction"], _Reaction), number)])
    if "deleted_business_messages" in update:
        return Received(_deleted(number, decode(update["deleted_business_messages"], _DeletedOfBusiness)))
    for kind in ("message", "business_message"):
        if kind in update:
            return Received([_message(ids, update[kind], bot)])
    for kind in ("edited_message", "edited_business_message"):
        if kind in update:
            return Received([_edited(ids, update[kind], bot, number)])
    kind = min(update, default="")
    return Received([Ignored(ids, KINDS.get(kind) or f"an update of kind {kind[:80]}")])


def _message(ids: tuple[str, ...], raw: msgspec.Raw, bot: Bot) -> Inbound | Ignored | Moved:
    return _item(ids, decode(raw, _Message), decode(raw, dict[str, msgspec.Raw]), bot)


def _edited(ids: tuple[str, ...], raw: msgspec.Raw, bot: Bot, number: int) -> Edited | Ignored:
    if "location" in decode(raw, dict[str, msgspec.Raw]):
        # Each of its moves is an edit.
        return Ignored(ids, "a live location has moved")
    item = _message(ids, raw, bot)
    if isinstance(item, Inbound):
        return Edited(ids, item.ids[1], item, number)
    return Ignored(ids, "an edit of a message that no person wrote")


def _deleted(number: int, deleted: _DeletedOfBusiness) -> list[Deleted]:
    place = f"{deleted.chat.id}@{deleted.business_connection_id}"
    ids = Batch().counted(deleted.message_ids)
    return [Deleted((f"update/{number}/{id_}",), f"message/{place}/{id_}") for id_ in ids]


def _reacted(ids: tuple[str, ...], reaction: _Reaction, number: int) -> Reacted:
    chat = reaction.chat.id
    author = f"chat/{reaction.actor_chat.id}" if reaction.actor_chat else str(reaction.user.id) if reaction.user else ""
    signs = tuple(sign.emoji or f"[{sign.type}]" for sign in reaction.new_reaction)
    target, message = f"message/{chat}/{reaction.message_id}", str(reaction.message_id)
    return Reacted(ids, target, message, author, signs, "all", number, str(chat))


def _item(
    ids: tuple[str, ...], message: _Message, fields: Mapping[str, msgspec.Raw], bot: Bot
) -> Inbound | Ignored | Moved:
    chat = message.chat.id
    # A group became a supergroup. Telegram says so in both chats.
    if message.migrate_to_chat_id is not None:
        return Moved(ids, str(chat), str(message.migrate_to_chat_id))
    if message.migrate_from_chat_id is not None:
        return Moved(ids, str(message.migrate_from_chat_id), str(chat))
    if message.is_automatic_forward or (message.from_ and message.from_.id == _FORWARDER):
        return Ignored(ids, "a channel's post, forwarded to its group automatically")
    # In the name of a chat, `from` is one of Telegram's own bots. Several persons write so. With one name for all of
    # them, one would answer questions for another.
    if message.sender_chat is not None:
        person = f"chat/{message.sender_chat.id}/{_place(message)}/{message.message_id}"
    elif message.from_ is None:
        return Ignored(ids, "a message without an author")
    elif message.from_.is_bot:
        return Ignored(ids, "a bot's message")
    else:
        person = str(message.from_.id)
    if message.business_connection_id and person != str(chat):
        return Ignored(ids, "a message of the person in whose name the bot answers")
    text = _text(message)
    attachments = _attachments(fields)
    if text is None and attachments:
        text = ""
    if text is None:
        text = words(fields)
    if text is None:
        return Ignored(ids, why_ignored(fields))
    if message.forward_origin is not None and text:
        # It may be of another person, whose yes approves nothing.
        text = forwarded(text)
    # Of a message of another chat or topic, the text is not told.
    raw = fields.get("reply_to_message") or fields.get("external_reply") or msgspec.Raw(b"{}")
    quoted, quoted_fields = decode(raw, _Quoted), decode(raw, dict[str, msgspec.Raw])
    is_answer = _is(bot, quoted.from_)
    files = () if is_answer else _attachments(quoted_fields)
    own = ""
    part: str | None = message.quote.text if message.quote else ""
    if not is_answer and not part:
        part = _text(quoted) or (described("File", *(file.name for file in files)) if files else words(quoted_fields))
        if "external_reply" in fields:
            part = part or described("Message of another chat or topic, which cannot be read here")
    if part:
        # The agent does not know the messages of others, and people ask about them: "@ada_bot translate this". Of a
        # message of its own it is told the part that the person has chosen.
        own, text = text if is_answer else "", quoting(text, part)
    mentions_bot, names_others = _mentions(message, bot)
    return Inbound(
        # Edits and reactions name the message by chat and number.
        ids=(*ids, f"message/{_place(message)}/{message.message_id}"),
        conversation=_conversation(message),
        person=person,
        message=str(message.message_id),
        text=text,
        attachments=attachments + files,
        in_group=message.chat.type != "private",
        mentions_bot=mentions_bot,
        replies_to_bot=is_answer,
        # An administrator who stays anonymous writes in the name of the group. Telegram does not name the others.
        by_admin=message.sender_chat is not None and message.sender_chat.id == chat,
        words=own,
        names_others=names_others,
        in_album=message.media_group_id is not None,
        album=f"album/{_place(message)}/{message.media_group_id}" if message.media_group_id else "",
    )


def _pressed(ids: tuple[str, ...], press: _Press) -> Received:
    """The value of the button as a message. The answer to the call ends the button's sign that it works."""
    answer = {"method": "answerCallbackQuery", "callback_query_id": press.id}
    ack = Ack(msgspec.json.encode(answer), "application/json")
    if not press.data or press.message is None:
        return Received([Ignored(ids, "a button without a value or a message")], ack)
    message = press.message
    item = Inbound(
        ids,
        _conversation(message),
        str(press.from_.id),
        str(message.message_id),
        press.data,
        in_group=message.chat.type != "private",
        mentions_bot=True,
        replies_to_bot=True,
    )
    return Received([item], ack)


def _text(message: _Message | _Quoted) -> str | None:
    """The text or the caption, with the addresses behind its words. Offsets count UTF-16 units."""
    text = message.text if message.text is not None else message.caption
    links = [one for one in message.entities or message.caption_entities or () if one.type == "text_link"]
    if not text or not links:
        return text
    units = text.encode("utf-16-le", "surrogatepass")
    for link in sorted(links, key=lambda link: link.offset, reverse=True):
        end = (link.offset + link.length) * 2
        label = units[link.offset * 2 : end].decode("utf-16-le", "replace")
        if not link.url.removesuffix("/").endswith(label):
            units = units[:end] + f" ({link.url})".encode("utf-16-le") + units[end:]
    return units.decode("utf-16-le", "replace")


def _conversation(message: _Message) -> str:
    topic = f"/{message.message_thread_id}" if message.is_topic_message and message.message_thread_id else ""
    if message.direct_messages_topic:
        topic = f"/direct-{message.direct_messages_topic.topic_id}"
    return f"{_place(message)}{topic}"


def _place(message: _Message) -> str:
    """The chat, and the connection by which the bot answers in the name of a person."""
    connection = message.business_connection_id
    return f"{message.chat.id}@{connection}" if connection else str(message.chat.id)


def _is(bot: Bot, user: _User | None) -> bool:
    return user is not None and str(user.id) == bot.id


def _mentions(message: _Message, bot: Bot) -> tuple[bool | None, bool]:
    """Whether the bot is mentioned, and whether others are. A command without a name is for the bot. Offsets count
    UTF-16 units. While the bot's own name is not known, each name may be the bot's or another one's."""
    named: bool | None = False
    others = False
    text = (message.text or message.caption or "").encode("utf-16-le", "surrogatepass")
    for entity in message.entities or message.caption_entities or ():
        part = text[entity.offset * 2 : (entity.offset + entity.length) * 2].decode("utf-16-le", "replace")
        match entity.type:
            case "text_mention":
                is_own = _is(bot, entity.user)
            case "mention" | "bot_command":
                _, at, name = part.partition("@")
                is_own = at + name.lower() == bot.name.lower() if at else entity.type == "bot_command"
                if at and not bot.name:
                    named = named or None
            case _:
                continue
        named, others = is_own or named, others or not is_own
    return named, others


def _attachments(fields: Mapping[str, msgspec.Raw]) -> tuple[Attachment, ...]:
    if "paid_media" in fields:
        return _paid(fields["paid_media"])
    # An animation has the field document too, with the same file.
    for field, kind in _FILES.items():
        if field not in fields:
            continue
        try:
            # A photo comes in several sizes, the largest last.
            file = decode(fields[field], list[_File])[-1] if field == "photo" else decode(fields[field], _File)
        except (UnreadableCall, IndexError):
            return ()
        name = file.file_name or ("photo.jpg" if field == "photo" else "")
        return (Attachment(kind or kind_of(file.mime_type or ""), file.file_id, name),)
    return ()


def _paid(raw: msgspec.Raw) -> tuple[Attachment, ...]:
    media = decode(raw, _PaidMedia).paid_media
    photos = (Attachment("image", one.photo[-1].file_id, "photo.jpg") for one in media if one.photo)
    videos = (Attachment("video", one.video.file_id, one.video.file_name or "") for one in media if one.video)
    return (*photos, *videos)
