"""QQ's events: https://bot.q.qq.com/wiki/develop/api-v2/dev-prepare/interface-framework/event-emit.html"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence

import msgspec

from services.channel.events import Attachment
from services.channel.vendors.base import (
    MALFORMED,
    decode,
    described,
    forwarded,
    from_json,
    kind_of,
    placeholder,
    quoting,
)
from services.channel.vendors.items import Ignored, Inbound

_NO_MESSAGE = "no person writes it to the bot"
_NOT_TOLD = "the bot is not mentioned"
# Types of messages: https://bot.q.qq.com/wiki/develop/api-v2/server-inter/message/send-receive/event.html
_CARD, _FORWARDED, _QUOTING = 3, 102, 103
BY_EVENT = "event:"
"""Before the id of an event that is answered, and no message."""

# By the name of the event. Empty: it is read; else why it is ignored.
KINDS: Mapping[str, str] = {
    "C2C_MESSAGE_CREATE": "",
    "GROUP_AT_MESSAGE_CREATE": "",
    "GROUP_MESSAGE_CREATE": "",
    "AT_MESSAGE_CREATE": "",
    "DIRECT_MESSAGE_CREATE": "",
    "INTERACTION_CREATE": "",
    "MESSAGE_CREATE": "AT_MESSAGE_CREATE brings the messages to the bot",
    **dict.fromkeys(
        (
            "C2C_MSG_RECEIVE",
            "C2C_MSG_REJECT",
            "CHANNEL_CREATE",
            "CHANNEL_DELETE",
            "CHANNEL_UPDATE",
            "FRIEND_ADD",
            "FRIEND_DEL",
            "GROUP_ADD_ROBOT",
            "GROUP_DEL_ROBOT",
            "GROUP_MSG_RECEIVE",
            "GROUP_MSG_REJECT",
            "GUILD_CREATE",
            "GUILD_DELETE",
            "GUILD_MEMBER_ADD",
            "GUILD_MEMBER_REMOVE",
            "GUILD_MEMBER_UPDATE",
            "GUILD_UPDATE",
            "MESSAGE_AUDIT_PASS",
            "MESSAGE_AUDIT_REJECT",
            "SUBSCRIBE_MESSAGE_STATUS",
        ),
        _NO_MESSAGE,
    ),
    **dict.fromkeys(
        ("MESSAGE_DELETE", "PUBLIC_MESSAGE_DELETE", "DIRECT_MESSAGE_DELETE"),
        "a deletion in a guild, by its author or an administrator",
    ),
    **dict.fromkeys(("MESSAGE_REACTION_ADD", "MESSAGE_REACTION_REMOVE"), "a reaction in a guild"),
    **dict.fromkeys(
        ("FORUM_THREAD_CREATE", "FORUM_POST_CREATE", "FORUM_REPLY_CREATE", "OPEN_FORUM_THREAD_CREATE"), _NOT_TOLD
    ),
    **dict.fromkeys(("AUDIO_START", "AUDIO_FINISH", "AUDIO_ON_MIC", "AUDIO_OFF_MIC"), _NO_MESSAGE),
}
# Signs in a text: a mention, and a face with its name in base64 or a file in its place.
_MENTION = re.compile(r"<@!?([0-9A-Za-z]{1,64})>\s*")
_SIGN = re.compile(r"<(faceType|attachmentType)=([^<>]{0,900})>")
_NAME = re.compile(r'ext="([0-9A-Za-z+/=]{1,500})"')
# The face that stands in place of a picture.
_PICTURE = "6,"


class _Author(msgspec.Struct):
    user_openid: str | None = None
    member_openid: str | None = None
    id: str | None = None
    bot: bool | None = None


class _File(msgspec.Struct):
    url: str | None = None
    filename: str | None = None
    content_type: str | None = None
    """A MIME type, or ``voice`` or ``file``."""
    voice_wav_url: str | None = None
    """A voice message in a usual format; `url` is SILK."""
    asr_refer_text: str | None = None
    """A voice message, written down by QQ."""


class _Element(msgspec.Struct):
    """A message that is quoted or forwarded."""

    content: str | None = None
    attachments: list[_File] | None = None
    author: _Author | None = None


class _Card(msgspec.Struct):
    prompt: str | None = None
    """A line about the card, such as ``[Location] Main Street``."""


class _Mention(msgspec.Struct):
    is_you: bool | None = None
    id: str | None = None
    member_openid: str | None = None
    username: str | None = None


class _Message(msgspec.Struct):
    id: str
    author: _Author
    mentions: list[_Mention] | None = None
    content: str | None = None
    message_type: int = 0
    msg_elements: list[_Element] | None = None
    ark_data: _Card | None = None
    group_openid: str | None = None
    channel_id: str | None = None
    guild_id: str | None = None
    attachments: list[_File] | None = None


class _Resolved(msgspec.Struct):
    button_data: str | None = None
    button_id: str | None = None
    user_id: str | None = None


class _Pressed(msgspec.Struct):
    resolved: _Resolved = msgspec.field(default_factory=_Resolved)


class _Interaction(msgspec.Struct):
    """A button was pressed."""

    id: str
    group_openid: str | None = None
    group_member_openid: str | None = None
    user_openid: str | None = None
    channel_id: str | None = None
    data: _Pressed = msgspec.field(default_factory=_Pressed)


class _Face(msgspec.Struct):
    text: str = ""


def read(kind: str, event_id: str, raw: msgspec.Raw) -> Inbound | Ignored:
    """`event_id`: of the event, which is not that of its message."""
    if reason := KINDS.get(kind, f"an event {kind[:40]}"):
        return Ignored((f"event/{event_id}",), reason)
    if kind == "INTERACTION_CREATE":
        return _pressed(event_id, decode(raw, _Interaction))
    message = decode(raw, _Message)
    # QQ may tell a message to the bot in a second event as one of all messages, with the same message id.
    ids = (f"{kind}/{message.id}", f"message/{message.id}")
    person = message.author.user_openid or message.author.member_openid or message.author.id
    places = {
        "C2C_MESSAGE_CREATE": ("users", person),
        "AT_MESSAGE_CREATE": ("channels", message.channel_id),
        "DIRECT_MESSAGE_CREATE": ("dms", message.guild_id),
    }
    place, id_ = places.get(kind, ("groups", message.group_openid))
    if not person or not id_ or message.author.bot:
        return Ignored(ids, "a message without an author")
    in_group = place in ("groups", "channels")
    # The owner of a group may let a bot have all its messages. The other events bring messages to the bot only.
    mentions = message.mentions or ()
    told = kind != "GROUP_MESSAGE_CREATE" or any(one.is_you for one in mentions)
    files = list(message.attachments or ())
    own = ""
    content = message.content or ""
    own_ids = {id_ for one in mentions if one.is_you for id_ in (one.id, one.member_openid)}
    if told and own_ids.isdisjoint(_MENTION.findall(content)):
        content = _MENTION.sub("", content, count=1)
    words = [_words(_addressed(content, mentions), files)]
    elements = message.msg_elements or ()
    about = "\n".join(filter(None, (_words(one.content or "", one.attachments or ()) for one in elements)))
    if message.message_type == _FORWARDED:
        words.append(forwarded(about) if about else "")
    else:
        if about and all(one.author is None or one.author.bot for one in elements):
            own = words[0]
        # Beside a mention of the bot, QQ tells the messages before it, too.
        shown = quoting(words[0], about) if message.message_type == _QUOTING else _after(words[0], about)
        words = [shown]
    if message.message_type == _CARD:
        words.append(described("Card", message.ark_data and message.ark_data.prompt))
    files += (file for one in elements for file in one.attachments or ())
    attachments = tuple(filter(None, map(_attachment, files)))
    text = "\n\n".join(filter(None, words))
    if not text and files and not attachments:
        text = placeholder("a file", *(file.filename or "" for file in files))
    return Inbound(
        ids,
        f"{place}/{id_}",
        person,
        message.id,
        text,
        in_group=in_group,
        mentions_bot=in_group and told,
        attachments=attachments,
        words=own,
        names_others=any(not one.is_you for one in mentions),
    )


def _words(content: str, files: Sequence[_File]) -> str:
    """The text, and that of voice messages which QQ has written down."""
    spoken = (file.asr_refer_text or "" for file in files)
    return "\n".join(filter(None, (_SIGN.sub(_named, content).strip(), *spoken)))


def _addressed(content: str, mentions: Sequence[_Mention]) -> str:
    """The text with the names of the people that it mentions, and without a mention of the bot."""
    known = {id_: one for one in mentions for id_ in (one.id, one.member_openid) if id_}

    def named(found: re.Match[str]) -> str:
        one = known.get(found[1]) or _Mention()
        return "" if one.is_you else f"@{one.username} " if one.username else found[0]

    return _MENTION.sub(named, content)


def _after(words: str, before: str) -> str:
    return f"{words}\n\n[Messages before it in the group]\n{before}".lstrip() if before else words


def _attachment(file: _File) -> Attachment | None:
    """None if there is no address, or the words of it are known."""
    type_ = file.content_type or ""
    kind = "voice" if type_ == "voice" else kind_of(type_)
    url = (kind == "voice" and file.voice_wav_url) or file.url
    return Attachment(kind, url, file.filename or "") if url and not file.asr_refer_text else None


def _pressed(event_id: str, press: _Interaction) -> Inbound | Ignored:
    ids = (f"interaction/{press.id}",)
    chosen = press.data.resolved
    person = press.group_member_openid or press.user_openid or chosen.user_id
    if press.group_openid:
        place = f"groups/{press.group_openid}"
    else:
        place = f"channels/{press.channel_id}" if press.channel_id else f"users/{person}"
    if not person:
        return Ignored(ids, "a button without an author")
    text = chosen.button_data or chosen.button_id or ""
    return Inbound(ids, place, person, f"{BY_EVENT}{event_id}", text, mentions_bot=True, replies_to_bot=True)


def _named(sign: re.Match[str]) -> str:
    """The name of a face, such as ``[Emoji: /smile]``; empty for a file, which is an attachment."""
    if sign[1] == "attachmentType" or sign[2].startswith(_PICTURE):
        return ""
    found = _NAME.search(sign[2])
    try:
        name = from_json(base64.b64decode(found[1]), _Face).text if found else ""
    except (ValueError, *MALFORMED):
        name = ""
    return described("Emoji", name)
