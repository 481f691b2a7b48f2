"""Adapter for LINE bots, Messaging API: https://developers.line.biz/en/reference/messaging-api/"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import quote
from uuid import UUID, uuid5

import msgspec

from infra.errors import EffectFailed, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Outgoing
from services.channel.events import Attachment
from services.channel.vendors.base import (
    AccountRefused,
    Batch,
    Groups,
    Limit,
    Outbound,
    Request,
    Vendor,
    constant_time_equals,
    decode,
    described,
    download,
    read_json,
)
from services.channel.vendors.items import Deleted, Edited, Ignored, Inbound, Received
from services.channel.vendors.markdown import PLAIN, render
from services.channel.vendors.splitting import split, utf16_length

# UTF-16 units.
MAX_TEXT = 5_000
# Part n of a delivery has a key that is not a UUID, as the retry key must be.
_KEYS = UUID("7f6ad0c2-4f0a-4c11-9a0e-2b8a6f0f6a11")
_CONTENT_ORIGIN = "https://api-data.line.me"
# Of a file that LINE does not have, before its address.
_EXTERNAL = "external "
_FILES: dict[str, Literal["image", "voice", "video", "file"]] = {
    "image": "image",
    "video": "video",
    "audio": "voice",
    "file": "file",
}
# https://developers.line.biz/en/reference/messaging-api/#error-messages
_QUOTA = b"monthly limit"
_NO_MESSAGE = "no person writes it to the bot"
# By the type of the message, then by that of the event. Empty: it is read; else why it is ignored.
# https://developers.line.biz/en/reference/messaging-api/#webhook-event-objects
KINDS: Mapping[str, str] = {
    "text": "",
    "image": "",
    "video": "",
    "audio": "",
    "file": "",
    "location": "",
    "sticker": "",
    "event.message": "",
    "event.messageEdited": "",
    "event.postback": "",
    "event.unsend": "",
    "event.follow": _NO_MESSAGE,
    "event.unfollow": _NO_MESSAGE,
    "event.join": _NO_MESSAGE,
    "event.leave": _NO_MESSAGE,
    "event.memberJoined": _NO_MESSAGE,
    "event.memberLeft": _NO_MESSAGE,
    "event.videoPlayComplete": "a video was watched",
    "event.beacon": "a device is near",
    "event.accountLink": "the bot does not offer it",
    "event.membership": "the bot does not offer it",
    "event.module": _NO_MESSAGE,
    "event.activated": _NO_MESSAGE,
    "event.deactivated": _NO_MESSAGE,
    "event.botSuspended": _NO_MESSAGE,
    "event.botResumed": _NO_MESSAGE,
    "event.delivery": "the answer to the send tells it",
}


class LineCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    channel_secret: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    channel_access_token: Annotated[str, msgspec.Meta(pattern="^[!-~]{1,1000}$")]


class _Source(msgspec.Struct):
    userId: str | None = None
    groupId: str | None = None
    roomId: str | None = None


class _Mentionee(msgspec.Struct):
    isSelf: bool = False
    index: int = 0
    """Of UTF-16 units, as the length."""
    length: int = 0


class _Mention(msgspec.Struct):
    mentionees: list[_Mentionee] = []


class _Provider(msgspec.Struct):
    """Who has the content of a file. That of an app in LINE lies at an address."""

    type: str = ""
    originalContentUrl: str = ""


class _Message(msgspec.Struct):
    id: str
    type: str
    text: str | None = None
    fileName: str | None = None
    contentProvider: _Provider | None = None
    title: str | None = None
    address: str | None = None
    latitude: float | None = None
    longitude: float | None = None
    keywords: list[str] = []
    """The things that a sticker shows."""
    mention: _Mention | None = None
    quotedMessageId: str = ""
    imageSet: Any = None
    """Of which the image is a part."""


class _Params(msgspec.Struct):
    """The choice of a time."""

    datetime: str = ""
    date: str = ""
    time: str = ""
    newRichMenuAliasId: str = ""
    """The person has opened another tab of the menu."""


class _Postback(msgspec.Struct):
    data: str = ""
    params: _Params | None = None


class _Unsend(msgspec.Struct):
    messageId: str


class _Event(msgspec.Struct):
    type: str
    webhookEventId: str
    timestamp: int = 0
    """Milliseconds."""
    mode: str | None = None
    source: _Source | None = None
    message: msgspec.Raw = msgspec.Raw(b"null")
    postback: _Postback | None = None
    """A button was pressed."""
    unsend: _Unsend | None = None
    """A message was taken back. LINE asks for the removal of its stored content."""


class _Webhook(msgspec.Struct):
    events: list[msgspec.Raw]


class _SentMessage(msgspec.Struct):
    id: str | None = None


class _Response(msgspec.Struct):
    message: str = ""
    sentMessages: list[_SentMessage] = []
    displayName: str = ""


class Line(Vendor[LineCredentials]):
    """Messages are pushed, because a reply token is valid for a minute and once. The key is the X-Line-Retry-Key."""

    name: ClassVar[str] = "line"
    credentials: ClassVar[type[msgspec.Struct]] = LineCredentials
    kinds: ClassVar[Mapping[str, str]] = KINDS
    origin: ClassVar[str] = "https://api.line.me"
    addresses: ClassVar[tuple[str, ...]] = ()
    effect: ClassVar[Kind] = "keyed"
    # An image is its own preview, which may have one megabyte.
    files: ClassVar[Mapping[str, int]] = dict.fromkeys(("image/jpeg", "image/png"), 1_000_000)
    files_by_address: ClassVar[bool] = True
    groups: ClassVar[tuple[Groups, ...]] = ("all", "mentions")
    sign_seconds: ClassVar[int] = 20
    steps: ClassVar[tuple[str, ...]] = (
        "Create a Messaging API channel; copy the channel secret and a long-lived channel access token.",
        "Enter the webhook's public URL and enable Use webhook.",
        "Switch off the automatic replies of the console.",
    )

    def receive(self, request: Request, credentials: LineCredentials, now: datetime) -> Received:
        digest = hmac.digest(credentials.channel_secret.encode(), request.body, hashlib.sha256)
        if not constant_time_equals(request.headers.get("x-line-signature", ""), base64.b64encode(digest).decode()):
            raise Unauthenticated("X-Line-Signature does not match")
        # The console sends no events when it verifies the webhook.
        events = decode(request.body, _Webhook).events
        return Received([*Batch().of_each(events, lambda event: [_item(decode(event, _Event))])])

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT, lambda part: utf16_length(render(part, PLAIN)))

    def limits(self, conversation: str) -> Sequence[Limit]:
        """https://developers.line.biz/en/reference/messaging-api/#rate-limits"""
        return [Limit("channel", 2_000, 1)]

    async def fetch(self, outgoing: Outgoing, origin: str, credentials: LineCredentials, ref: str, most: int) -> bytes:
        if ref.startswith(_EXTERNAL):
            # A stranger's host, which must not get the token.
            return await download(outgoing, ref.removeprefix(_EXTERNAL), most)
        host = _CONTENT_ORIGIN if origin == self.origin else origin
        headers = {"authorization": f"Bearer {credentials.channel_access_token}"}
        return await download(outgoing, f"{host}/v2/bot/message/{quote(ref, safe='')}/content", most, headers)

    async def identify(self, outgoing: Outgoing, origin: str, credentials: LineCredentials) -> str:
        return (await _call(outgoing, origin, credentials, "GET", "v2/bot/info")).displayName

    async def register(self, outgoing: Outgoing, origin: str, credentials: LineCredentials, url: str) -> bool:
        await _call(outgoing, origin, credentials, "PUT", "v2/bot/channel/webhook/endpoint", {"endpoint": url})
        return True

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: LineCredentials, message: Outbound
    ) -> str | None:
        answer = await outgoing.request(
            "POST",
            f"{origin}/v2/bot/message/push",
            headers={
                "authorization": f"Bearer {credentials.channel_access_token}",
                "x-line-retry-key": str(uuid5(_KEYS, message.key)),
            },
            json={"to": message.conversation, "messages": [_content(message)]},
        )
        if answer.status == 429 and _QUOTA in answer.body:
            # It lasts until the next month. A message would not wait for so long.
            raise EffectFailed("the account has used up its messages of this month")
        response = read_json(answer, _Response)
        if answer.status in (401, 403):
            raise AccountRefused(f"HTTP {answer.status}")
        # 409: the retry key is known, so an earlier attempt was accepted.
        if answer.status >= 400 and answer.status != 409:
            raise EffectFailed(response.message[:200] or f"HTTP {answer.status}")
        return response.sentMessages[0].id if response.sentMessages else None

    async def show_typing(
        self, outgoing: Outgoing, origin: str, credentials: LineCredentials, message: Outbound
    ) -> None:
        """Only a chat with one person shows it, until the next message comes. The id of a person begins with U."""
        if not message.conversation.startswith("U"):
            raise EffectFailed("a group shows no loading animation")
        body = {"chatId": message.conversation, "loadingSeconds": self.sign_seconds}
        await _call(outgoing, origin, credentials, "POST", "v2/bot/chat/loading/start", body)


def _content(message: Outbound) -> dict[str, str]:
    """LINE fetches an image from its address, by HTTPS only."""
    if message.file and message.file.url.startswith("https://"):
        return {"type": "image", "originalContentUrl": message.file.url, "previewImageUrl": message.file.url}
    return {"type": "text", "text": render(message.text, PLAIN)}


async def _call(
    outgoing: Outgoing,
    origin: str,
    credentials: LineCredentials,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
) -> _Response:
    headers = {"authorization": f"Bearer {credentials.channel_access_token}"}
    answer = await outgoing.request(method, f"{origin}/{path}", headers=headers, json=body)
    response = read_json(answer, _Response)
    if answer.status in (401, 403):
        raise AccountRefused(f"HTTP {answer.status}")
    if answer.status >= 400:
        raise EffectFailed(response.message[:200] or f"HTTP {answer.status}")
    return response


def _item(event: _Event) -> Inbound | Edited | Deleted | Ignored:
    ids = (f"event/{event.webhookEventId}",)
    if event.mode == "standby":
        return Ignored(ids, "an event for another module of the channel")
    if event.type == "messageEdited":
        item = _spoken(ids, event)
        return item if isinstance(item, Ignored) else Edited(ids, item.ids[1], item, event.timestamp)
    if event.type == "unsend" and event.unsend:
        return Deleted(ids, _target(event.unsend.messageId))
    if event.type != "message" and event.postback is None:
        return Ignored(ids, KINDS.get(f"event.{event.type}") or f"an event {event.type[:40]}")
    return _spoken(ids, event)


def _spoken(ids: tuple[str, ...], event: _Event) -> Inbound | Ignored:
    source = event.source or _Source()
    conversation = source.groupId or source.roomId or source.userId
    if not conversation:
        return Ignored(ids, "a message without a source")
    in_group = conversation != source.userId
    if event.postback:
        person = source.userId or f"unknown/{event.webhookEventId}"
        chosen = event.postback.params or _Params()
        if chosen.newRichMenuAliasId:
            return Ignored(ids, "another tab of the menu was opened")
        pressed = " ".join(filter(None, (event.postback.data, chosen.datetime or chosen.date or chosen.time)))
        return Inbound(
            ids, conversation, person, "", pressed, in_group=in_group, mentions_bot=True, replies_to_bot=True
        )
    message = decode(event.message, _Message)
    # In a group, a person who has not agreed to it has no id. With one name for all of them, one would answer questions
    # for another.
    person = source.userId or f"unknown/{message.id}"
    ids = (*ids, _target(message.id))
    text, attachments = _content_of(message)
    if text is None:
        return Ignored(ids, f"a message of type {message.type[:40]}")
    mentionees = (message.mention or _Mention()).mentionees
    return Inbound(
        ids,
        conversation,
        person,
        message.id,
        text,
        attachments=attachments,
        in_group=in_group,
        mentions_bot=any(one.isSelf for one in mentionees),
        names_others=not all(one.isSelf for one in mentionees),
        quotes=message.quotedMessageId,
        in_album=message.imageSet is not None,
    )


def _content_of(message: _Message) -> tuple[str | None, tuple[Attachment, ...]]:
    match message.type:
        case "location":
            facts = message.title, message.address, message.latitude, message.longitude
            return described("Location", *facts), ()
        case "sticker":
            # A sticker may have a text of the person.
            return described("Sticker", message.text, *message.keywords), ()
    if message.text is None and message.type in _FILES:
        provider = message.contentProvider or _Provider()
        ref = f"{_EXTERNAL}{provider.originalContentUrl}" if provider.type == "external" else message.id
        return "", (Attachment(_FILES[message.type], ref, message.fileName or ""),)
    return _addressed(message), ()


def _addressed(message: _Message) -> str | None:
    """The text without a mention of the bot at its end or beginning, which only says to whom the person speaks."""
    units = (message.text or "").encode("utf-16-le")
    for mentionee in (message.mention or _Mention()).mentionees:
        start, end = mentionee.index * 2, (mentionee.index + mentionee.length) * 2
        before, after = (part.decode("utf-16-le", "replace").strip() for part in (units[:start], units[end:]))
        # A mention alone is a message, too.
        if mentionee.isSelf and bool(before) != bool(after):
            return before or after
    return message.text


def _target(message: str) -> str:
    """An id of each message."""
    return f"message/{message}"
