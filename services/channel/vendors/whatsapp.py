"""Adapter for the WhatsApp Cloud API: https://developers.facebook.com/docs/whatsapp/cloud-api"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import parse_qs, quote

import msgspec

from infra.errors import EffectFailed, RetryLater, Transient, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Outgoing
from infra.stores import filetypes
from services.channel.events import Attachment
from services.channel.multipart import multipart
from services.channel.vendors.base import (
    DEFAULT_RETRY,
    MAX_FILE,
    AccountRefused,
    Limit,
    Outbound,
    OutboundFile,
    Request,
    UnreadableCall,
    Vendor,
    at_origin,
    constant_time_equals,
    decode,
    download,
    kind_of,
    placeholder,
    read_json,
)
from services.channel.vendors.items import Ack, Ignored, Inbound, Item, Reacted, Receipt, Received
from services.channel.vendors.markdown import Dialect, fenced, plain_link, quoted_lines, render, unchanged
from services.channel.vendors.splitting import split

# Characters.
MAX_TEXT = 4_096
VERSION = "v21.0"
_FILES: dict[str, Literal["image", "voice", "video"]] = {"image": "image", "audio": "voice", "video": "video"}
_ATTACHMENTS = {"sticker": "a sticker", "location": "a location", "contacts": "a contact"}
# https://developers.facebook.com/docs/whatsapp/cloud-api/support/error-codes
_ACCOUNT = frozenset((10, 190, 368, 131005, 131031, 131042, 131045, 133010))
_LATER = frozenset((4, 80007, 130429, 131048, 131056))
_TRANSIENT = frozenset((1, 2, 131000, 131016, 131057))
# At most one message in six seconds to one person, over a longer time.
_PAIR_DELAY = timedelta(seconds=6)

# https://developers.facebook.com/docs/whatsapp/cloud-api/reference/media#supported-media-types
_PHOTOS = ("image/jpeg", "image/png")
_SENT = dict.fromkeys(_PHOTOS, 5_000_000) | dict.fromkeys((filetypes.PDF, *filetypes.OFFICE, filetypes.TEXT), MAX_FILE)

# https://faq.whatsapp.com/539178204879377
DIALECT = Dialect(
    bold=("*", "*"),
    italic=("_", "_"),
    strike=("~", "~"),
    code=("`", "`"),
    fence=fenced,
    quote=quoted_lines,
    link=plain_link,
    escape=unchanged,
)


class WhatsAppCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    phone_number_id: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z_-]{1,64}$")]
    access_token: Annotated[str, msgspec.Meta(pattern="^[!-~]{1,1000}$")]
    app_secret: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    verify_token: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class _Text(msgspec.Struct):
    body: str = ""


class _Media(msgspec.Struct):
    id: str = ""
    caption: str | None = None
    filename: str | None = None
    mime_type: str = ""


class _Title(msgspec.Struct):
    title: str = ""


class _Interactive(msgspec.Struct):
    button_reply: _Title | None = None
    list_reply: _Title | None = None


class _Button(msgspec.Struct):
    text: str = ""


class _Reaction(msgspec.Struct):
    message_id: str
    emoji: str = ""
    """Empty: the person took the sign back. Each person has one at most."""


class _Message(msgspec.Struct):
    id: str
    type: str
    from_: str = msgspec.field(name="from")
    text: _Text | None = None
    image: _Media | None = None
    video: _Media | None = None
    audio: _Media | None = None
    document: _Media | None = None

    @property
    def media(self) -> _Media | None:
        return self.image or self.video or self.audio or self.document

    button: _Button | None = None
    interactive: _Interactive | None = None
    timestamp: str = ""
    """Unix seconds, in decimal digits."""
    reaction: _Reaction | None = None


class _Problem(msgspec.Struct):
    code: int = 0
    title: str = ""


class _Status(msgspec.Struct):
    id: str
    status: str = ""
    errors: list[_Problem] | None = None


class _Metadata(msgspec.Struct):
    phone_number_id: str = ""


class _Value(msgspec.Struct):
    metadata: _Metadata | None = None
    messages: list[_Message] | None = None
    statuses: list[_Status] | None = None


class _Change(msgspec.Struct):
    field: str
    value: msgspec.Raw = msgspec.Raw(b"{}")


class _Entry(msgspec.Struct):
    changes: list[_Change] | None = None


class _Webhook(msgspec.Struct):
    entry: list[_Entry] | None = None


class _Error(msgspec.Struct):
    code: int = 0
    message: str = ""


class _SentMessage(msgspec.Struct):
    id: str | None = None


class _Response(msgspec.Struct):
    messages: list[_SentMessage] = []
    error: _Error | None = None
    display_phone_number: str = ""
    url: str = ""
    id: str = ""


class WhatsApp(Vendor[WhatsAppCredentials]):
    """WhatsApp accepts no idempotency key: an unanswered send stays unknown."""

    name: ClassVar[str] = "whatsapp"
    credentials: ClassVar[type[msgspec.Struct]] = WhatsAppCredentials
    origin: ClassVar[str] = "https://graph.facebook.com"
    addresses: ClassVar[tuple[str, ...]] = ()
    effect: ClassVar[Kind] = "once"
    files: ClassVar[Mapping[str, int]] = _SENT
    sign_seconds: ClassVar[int] = 25
    max_body: ClassVar[int] = 3 * 1_048_576
    steps: ClassVar[tuple[str, ...]] = (
        "Create an app with WhatsApp; copy the phone number id, a permanent access token and the app secret.",
        "Choose a verify_token.",
        "Enter the webhook's public URL and the verify_token under Webhooks, and subscribe to messages.",
    )

    def receive(self, request: Request, credentials: WhatsAppCredentials, now: datetime) -> Received:
        if request.method == "GET":
            # The handshake is not signed. It proves itself by the verify token.
            query = parse_qs(request.query)
            given = query.get("hub.verify_token", [""])[0]
            if query.get("hub.mode") != ["subscribe"] or not constant_time_equals(given, credentials.verify_token):
                raise Unauthenticated("hub.verify_token is not this channel's verify_token")
            return Received([], Ack(query.get("hub.challenge", [""])[0].encode()))
        digest = hmac.digest(credentials.app_secret.encode(), request.body, hashlib.sha256)
        if not constant_time_equals(request.headers.get("x-hub-signature-256", ""), f"sha256={digest.hex()}"):
            raise Unauthenticated("X-Hub-Signature-256 does not match")
        webhook = decode(request.body, _Webhook)
        changes = [change for entry in webhook.entry or () for change in entry.changes or ()]
        items = [item for change in changes for item in _items(change, credentials.phone_number_id)]
        return Received(items or [Ignored((f"body/{digest.hex()}",), "no messages")])

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT, lambda part: len(render(part, DIALECT)))

    def limits(self, conversation: str) -> Sequence[Limit]:
        """https://developers.facebook.com/docs/whatsapp/cloud-api/overview#throughput"""
        return [Limit("number", 80, 1), Limit(f"pair {conversation}", 45, 270)]

    async def fetch(
        self, outgoing: Outgoing, origin: str, credentials: WhatsAppCredentials, ref: str, most: int
    ) -> bytes:
        """The id of a file leads to an address that is valid for five minutes."""
        found = await _call(outgoing, origin, credentials, "GET", quote(ref, safe=""))
        url = at_origin(self, origin, found.url, "fbsbx.com", "facebook.com", "whatsapp.net")
        headers = {"authorization": f"Bearer {credentials.access_token}"}
        return await download(outgoing, url, most, headers)

    async def identify(self, outgoing: Outgoing, origin: str, credentials: WhatsAppCredentials) -> str:
        path = f"{credentials.phone_number_id}?fields=display_phone_number"
        return (await _call(outgoing, origin, credentials, "GET", path)).display_phone_number

    async def register(self, outgoing: Outgoing, origin: str, credentials: WhatsAppCredentials, url: str) -> bool:
        """Overrides the app's address for this number (WhatsApp Cloud API, Webhooks, Overrides)."""
        webhook = {"override_callback_uri": url, "verify_token": credentials.verify_token}
        body = {"webhook_configuration": webhook}
        await _call(outgoing, origin, credentials, "POST", credentials.phone_number_id, body)
        return True

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: WhatsAppCredentials, message: Outbound
    ) -> str | None:
        body = {
            "messaging_product": "whatsapp",
            "recipient_type": "individual",
            "to": message.conversation,
            **_content(message, await _uploaded(outgoing, origin, credentials, message.file)),
        }
        if message.reply_to:
            body["context"] = {"message_id": message.reply_to}
        path = f"{credentials.phone_number_id}/messages"
        response = await _call(outgoing, origin, credentials, "POST", path, body)
        return response.messages[0].id if response.messages else None

    async def show_typing(
        self, outgoing: Outgoing, origin: str, credentials: WhatsAppCredentials, message: Outbound
    ) -> None:
        """The sign belongs to a message, which is shown as read."""
        body = {
            "messaging_product": "whatsapp",
            "status": "read",
            "message_id": message.answers,
            "typing_indicator": {"type": "text"},
        }
        await _call(outgoing, origin, credentials, "POST", f"{credentials.phone_number_id}/messages", body)


async def _uploaded(
    outgoing: Outgoing, origin: str, credentials: WhatsAppCredentials, file: OutboundFile | None
) -> dict[str, str]:
    """How a message names its file: by the address from which WhatsApp fetches it, or by the id of an upload.

    https://developers.facebook.com/docs/whatsapp/cloud-api/reference/media
    """
    if file is None or file.url:
        return {"link": file.url} if file else {}
    fields = {"messaging_product": "whatsapp", "type": file.content_type}
    header, content = multipart(fields, "file", file.name, file.content_type, file.content)
    path = f"{credentials.phone_number_id}/media"
    media = await _call(outgoing, origin, credentials, "POST", path, headers=header, content=content)
    if not media.id:
        raise EffectFailed("the upload of the file was not accepted")
    return {"id": media.id}


def _content(message: Outbound, source: dict[str, str]) -> dict[str, Any]:
    if (file := message.file) is None:
        return {"type": "text", "text": {"body": render(message.text, DIALECT), "preview_url": False}}
    if file.content_type in _PHOTOS:
        return {"type": "image", "image": source}
    return {"type": "document", "document": {**source, "filename": file.name}}


async def _call(
    outgoing: Outgoing,
    origin: str,
    credentials: WhatsAppCredentials,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    *,
    headers: Mapping[str, str] | None = None,
    content: bytes | None = None,
) -> _Response:
    headers = {"authorization": f"Bearer {credentials.access_token}", **(headers or {})}
    answer = await outgoing.request(method, f"{origin}/{VERSION}/{path}", headers=headers, json=body, content=content)
    response = read_json(answer, _Response)
    if error := response.error:
        _refuse(error)
    if answer.status >= 400:
        raise EffectFailed(f"HTTP {answer.status}")
    return response


def _items(change: _Change, number: str) -> Iterator[Item]:
    if change.field != "messages":
        yield Ignored(
            (f"change/{hashlib.sha256(bytes(change.value)).hexdigest()}",), f"a change of {change.field[:40]}"
        )
        return
    value = decode(change.value, _Value)
    for status in value.statuses or ():
        yield _status(status)
    for message in value.messages or ():
        ids = (f"message/{message.id}",)
        text = _text(message)
        if value.metadata is None or value.metadata.phone_number_id != number:
            yield Ignored(ids, "a message to another number")
        elif message.reaction:
            yield _reacted(ids, message, message.reaction)
        elif text is None:
            yield Ignored(ids, f"a message of type {message.type[:40]}")
        else:
            attachments = _attachments(message)
            yield Inbound(ids, message.from_, message.from_, message.id, text, attachments=attachments)


def _reacted(ids: tuple[str, ...], message: _Message, reaction: _Reaction) -> Reacted:
    time = message.timestamp
    if not (time.isascii() and time.isdecimal() and len(time) <= 12):
        raise UnreadableCall("timestamp: is not a time")
    signs = (reaction.emoji,) if reaction.emoji else ()
    target = f"message/{reaction.message_id}"
    return Reacted(ids, target, reaction.message_id, message.from_, signs, "all", int(time))


def _status(status: _Status) -> Ignored | Receipt:
    ids = (f"status/{status.id}/{status.status}",)
    match status.status:
        case "delivered" | "read":
            return Receipt(ids, status.id, status.status)
        case "failed":
            problem = next(iter(status.errors or ()), _Problem())
            return Receipt(ids, status.id, "failed", f"{problem.code}: {problem.title}"[:200].replace("\0", ""))
    return Ignored(ids, f"a status {status.status[:40]}")


def _text(message: _Message) -> str | None:
    if message.text:
        return message.text.body
    if message.button:
        return message.button.text
    if message.interactive:
        chosen = message.interactive.button_reply or message.interactive.list_reply
        return chosen.title if chosen else None
    if message.media:
        return message.media.caption or ""
    kind = _ATTACHMENTS.get(message.type)
    return placeholder(kind) if kind else None


def _attachments(message: _Message) -> tuple[Attachment, ...]:
    if (media := message.media) is None:
        return ()
    kind = _FILES.get(message.type) or kind_of(media.mime_type)
    return (Attachment(kind, media.id, media.filename or ""),)


def _refuse(error: _Error) -> None:
    reason = f"{error.code}: {error.message}"[:200]
    if error.code in _ACCOUNT or 200 <= error.code < 300:
        raise AccountRefused(reason)
    if error.code in _LATER:
        raise RetryLater(_PAIR_DELAY if error.code == 131056 else DEFAULT_RETRY, reason)
    if error.code in _TRANSIENT:
        raise Transient(reason)
    # Among them 131047: more than 24 hours after the person's last message only templates are allowed.
    raise EffectFailed(reason)
