"""Messages to DingTalk robots: https://open.dingtalk.com/document/orgapp/receive-message"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

import msgspec

from services.channel.events import Attachment
from services.channel.vendors.base import (
    MALFORMED,
    UnreadableCall,
    decode,
    described,
    forwarded,
    from_json,
    placeholder,
    quoting,
)
from services.channel.vendors.items import Ignored, Inbound

# By the type of the message. Empty: it is read; else why it is ignored.
KINDS: Mapping[str, str] = {
    "text": "",
    "richText": "",
    "picture": "",
    "audio": "",
    "video": "",
    "file": "",
    "chatRecord": "",
    "location": "",
    "link": "",
    "markdown": "",
    "actionCard": "",
    "interactiveCard": "",
    "unknownMsgType": "",
    "card.actionCallback": "",
}
_FILES: dict[str, Literal["image", "voice", "video", "file"]] = {
    "picture": "image",
    "audio": "voice",
    "video": "video",
    "file": "file",
}


_WORDS = ("text", "content", "msg", "recognition", "fileName", "biz_custom_action_url")
"""The fields of a part of a message that may have its words."""


class _Replied(msgspec.Struct):
    """The message to which another one replies."""

    content: Any = None
    """An object, or the same as JSON in a text."""
    msgType: str | None = None
    senderId: str | None = None

    @property
    def parts(self) -> Any:
        try:
            given = from_json(self.content) if isinstance(self.content, str) else self.content
        except MALFORMED:
            return self.content
        return given if isinstance(given, dict) else self.content


class _Text(msgspec.Struct):
    content: str | None = None
    repliedMsg: _Replied | None = None


class _Content(msgspec.Struct):
    repliedMsg: _Replied | None = None
    richText: list[dict[str, Any]] | None = None
    recognition: str | None = None
    """A voice message, written down by the vendor."""
    fileName: str | None = None
    downloadCode: str | None = None
    chatRecord: str | None = None
    """Forwarded messages, as JSON."""
    address: str | None = None
    title: str | None = None
    text: str | None = None
    messageUrl: str | None = None
    biz_custom_action_url: str | None = None
    """Of a card, such as that of a document which a person shares."""
    latitude: float | str | None = None
    longitude: float | str | None = None


class _Message(msgspec.Struct):
    msgId: str
    conversationId: str
    msgtype: str
    conversationType: str = "1"
    senderStaffId: str | None = None
    senderId: str | None = None
    chatbotUserId: str | None = None
    robotCode: str | None = None
    isAdmin: bool | None = None
    senderCorpId: str | None = None
    chatbotCorpId: str | None = None
    sessionWebhook: str | None = None
    text: _Text | None = None
    content: _Content | str | None = None
    """As an object, or as JSON in a text."""

    @property
    def parts(self) -> _Content:
        if not isinstance(self.content, str):
            return self.content or _Content()
        try:
            return from_json(self.content, _Content)
        except MALFORMED as error:
            raise UnreadableCall(f"content: {error}") from error

    @property
    def replied(self) -> _Replied | None:
        """In a message of any type it stands in the field text or in the field content."""
        return next((one.repliedMsg for one in (self.text, self.parts) if one and one.repliedMsg), None)


class _Press(msgspec.Struct):
    """A person pressed a button of a card, or filled in its form."""

    type: str = ""
    outTrackId: str = ""
    """Of the card."""
    userId: str = ""
    userIdType: int | None = None
    spaceType: str | None = None
    spaceId: str | None = None
    content: str = "{}"
    """JSON."""


class _Private(msgspec.Struct, frozen=True):
    actionIds: list[str] | None = None
    params: dict[str, Any] | None = None


class _PressContent(msgspec.Struct):
    cardPrivateData: _Private = _Private()


def read_card(body: bytes, timestamp: str) -> Inbound | Ignored:
    """https://open.dingtalk.com/document/orgapp/event-callback-card. `timestamp`: of the call, which has no id."""
    press = decode(body, _Press)
    ids = (f"card/{press.outTrackId}/{press.userId}/{timestamp}",)
    if press.type != "actionCallback":
        return Ignored(ids, f"a call of a card of type {press.type[:40]}")
    if not press.userId or press.userIdType == 2:
        return Ignored(ids, "a card without the user id of its person")
    private = decode(press.content.encode(), _PressContent).cardPrivateData
    params = private.params or {}
    words = [value for value in params.values() if isinstance(value, str)]
    if params:
        # One value is a word of the person, such as a yes.
        text = words[0] if len(words) == len(params) == 1 else msgspec.json.encode(params).decode()
    else:
        text = ", ".join(private.actionIds or ())
    # Other types of a space do not tell a group from a chat with the robot. An answer to the person always arrives.
    is_group = press.spaceType == "IM_GROUP" and press.spaceId
    conversation = f"group/{press.spaceId}" if is_group else f"user/{press.userId}"
    return Inbound(ids, conversation, press.userId, press.outTrackId, text)


def read(body: bytes, robot_code: str) -> Inbound | Ignored:
    message = decode(body, _Message)
    ids = (f"message/{message.msgId}",)
    person = message.senderStaffId or message.senderId
    if message.robotCode not in (None, "normal", robot_code):
        return Ignored(ids, "a message to another robot")
    if not person or (message.senderId is not None and message.senderId == message.chatbotUserId):
        return Ignored(ids, "a message that no person wrote")
    # JSON in a text is decoded once.
    message.content = message.parts
    attachments = _attachments(message)
    text = _text(message)
    if text is None and attachments:
        text = ""
    if text is None:
        return Ignored(ids, f"a message of type {message.msgtype[:40]}")
    conversation = f"user/{person}" if message.conversationType == "1" else f"group/{message.conversationId}"
    path = _session(message.sessionWebhook or "") or message.msgId
    # Of the organisation, so of each of its groups. A group may have members of others.
    is_ours = message.senderCorpId in (None, message.chatbotCorpId)
    by_admin = message.isAdmin is True and message.conversationType != "1" and is_ours
    return Inbound(
        ids,
        conversation,
        person,
        path,
        text,
        attachments=attachments,
        by_admin=by_admin,
        words=_own_words(message),
        # DingTalk does not say which files were sent together.
        in_album=message.msgtype in ("picture", "video", "file"),
    )


def _session(url: str) -> str:
    """Path and query of the session's webhook; empty if there is none."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise UnreadableCall("sessionWebhook: is not an address") from error
    return f"{parts.path}?{parts.query}" if parts.path.startswith("/") else ""


def _attachments(message: _Message) -> tuple[Attachment, ...]:
    content = message.parts
    files: Iterable[Attachment] = ()
    if content.richText is not None:
        files = _files("picture", content.richText)
    elif message.msgtype in _FILES and not content.recognition and content.downloadCode:
        files = [Attachment(_FILES[message.msgtype], content.downloadCode, content.fileName or "")]
    return (*files, *(_quoted_files(message.replied) if message.replied else ()))


def _quoted_files(replied: _Replied) -> Iterator[Attachment]:
    """The files of a message to which another one replies: the person asks about them."""
    if isinstance(given := replied.parts, dict):
        parts = given.get("richText")
        kind = "picture" if isinstance(parts, list) else replied.msgType or ""
        yield from _files(kind, parts if isinstance(parts, list) else [given])


def _files(kind: str, parts: Sequence[Any]) -> Iterator[Attachment]:
    for part in parts:
        if kind in _FILES and isinstance(part, dict) and not part.get("recognition"):
            code = part.get("downloadCode") or part.get("pictureDownloadCode")
            if isinstance(code, str) and code:
                yield Attachment(_FILES[kind], code, str(part.get("fileName") or ""))


def _text(message: _Message) -> str | None:
    own = _own_text(message)
    quoted = _words(message.replied.parts) if message.replied else ""
    return quoting(own or "", quoted) if quoted else own


def _own_text(message: _Message) -> str | None:
    """Without that of the message to which it replies."""
    content = message.parts
    if content.richText is not None:
        return "".join(_words(part) for part in content.richText).strip()
    if message.text and message.text.content is not None:
        return message.text.content.strip()
    match message.msgtype:
        case "text":
            return ""
        case "chatRecord":
            return forwarded("\n".join(_forwarded(content.chatRecord or "")))
        case "location":
            return described("Location", content.title, content.address, content.latitude, content.longitude)
        case "link":
            return described("Link", content.title, content.text, content.messageUrl)
        case "markdown":
            return content.text
        case "actionCard":
            return "\n".join(filter(None, (content.title, content.text)))
        case "interactiveCard" if content.biz_custom_action_url:
            return described("Link", content.title, content.biz_custom_action_url)
        case "interactiveCard" | "unknownMsgType":
            return placeholder("a message that DingTalk does not pass on", content.title or "")
    if content.recognition or message.msgtype not in _FILES or content.downloadCode:
        return content.recognition
    return placeholder("a file", content.fileName or "")


def _own_words(message: _Message) -> str:
    """Those beside a quotation of the bot."""
    replied = message.replied
    if not replied or replied.senderId not in (None, message.chatbotUserId):
        return ""
    return _own_text(message) or ""


def _words(part: Any) -> str:
    """The words of a part of a rich text, or of a quoted message."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        return ""
    if isinstance(name := part.get("atName"), str):
        return f"@{name} "
    if isinstance(parts := part.get("richText"), list):
        return "".join(_words(one) for one in parts if isinstance(one, dict) and "richText" not in one)
    if isinstance(blocks := part.get("cardContent"), list):
        return "\n".join(filter(None, map(_card_words, blocks)))
    found = (part.get(name) for name in _WORDS)
    return next((one for one in found if isinstance(one, str) and one), "")


def _card_words(block: Any) -> str:
    """The words of one block of a card. As a card DingTalk quotes each answer of the bot."""
    children = block.get("children") if isinstance(block, dict) else None
    words = ""
    for child in children if isinstance(children, list) else ():
        kind = str(child.get("elementType")).lower() if isinstance(child, dict) else ""
        if kind in ("text", "link") and isinstance(value := child.get("value"), str):
            words += f" {value} " if kind == "link" else value
    return words.strip()


def _forwarded(record: str) -> list[str]:
    """A line for each of the forwarded messages."""
    try:
        messages = from_json(record, list[dict[str, Any]])
    except (msgspec.DecodeError, RecursionError):
        return [record]
    lines = [
        (str(one.get("senderNick") or one.get("senderName") or ""), _words(one) or described(str(one.get("msgType"))))
        for one in messages
    ]
    return [f"{sender}: {words}" if sender else words for sender, words in lines]
