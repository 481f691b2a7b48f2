"""Adapter for the WhatsApp Cloud API: https://developers.facebook.com/docs/whatsapp/cloud-api"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar
from urllib.parse import parse_qs, quote

import msgspec

from infra.errors import EffectFailed, RetryLater, Transient, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Outgoing
from infra.stores import filetypes
from services.channel.vendors import whatsapp_messages
from services.channel.vendors.base import (
    DEFAULT_RETRY,
    MAX_FILE,
    AccountRefused,
    Limit,
    Outbound,
    OutboundFile,
    Request,
    Vendor,
    at_origin,
    constant_time_equals,
    download,
    read_json,
)
from services.channel.vendors.items import Ack, Ignored, Received
from services.channel.vendors.markdown import PLAIN, Dialect, fenced, plain_link, quoted_lines, render, unchanged
from services.channel.vendors.multipart import multipart
from services.channel.vendors.splitting import split

# Characters.
MAX_TEXT = 4_096
VERSION = "v21.0"
# https://developers.facebook.com/docs/whatsapp/cloud-api/support/error-codes
_LATER = frozenset((4, 80007, 130429, 131048, 131056))
_TRANSIENT = frozenset((1, 2, 131000, 131016, 131057, 133004))
# More than 24 hours after the person's last message only templates are allowed.
_CLOSED = 131047
# Characters of a variable of a template, which may have no line ends.
_MAX_VARIABLE = 1_024
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
    joint="\u200b",
)


class WhatsAppCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    phone_number_id: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z_-]{1,64}$")]
    access_token: Annotated[str, msgspec.Meta(pattern="^[!-~]{1,1000}$")]
    app_secret: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    verify_token: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    template: Annotated[str, msgspec.Meta(pattern="^[0-9a-z_]{0,512}$")] = ""
    """An approved template whose body has one variable: the text of a message later than 24 hours after the person's
    last one. Empty: such a message fails."""
    template_language: Annotated[str, msgspec.Meta(pattern="^[A-Za-z_]{2,16}$")] = "en_US"


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
    kinds: ClassVar[Mapping[str, str]] = whatsapp_messages.KINDS
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
        items = whatsapp_messages.read(request.body, credentials.phone_number_id)
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
        body: dict[str, object] = {"messaging_product": "whatsapp", **_recipient(message.conversation)}
        if message.reply_to:
            body["context"] = {"message_id": message.reply_to}
        path = f"{credentials.phone_number_id}/messages"
        has_template = bool(credentials.template) and message.file is None
        # WhatsApp may accept a text that is too late, and refuse it by a receipt.
        by_template = has_template and message.is_late
        if not by_template:
            content = _content(message, await _uploaded(outgoing, origin, credentials, message.file))
            try:
                response = await _call(outgoing, origin, credentials, "POST", path, body | content)
            except _Closed:
                if not has_template:
                    raise
                # Nothing was sent.
                by_template = True
        if by_template:
            content = _template(message.text, credentials)
            response = await _call(outgoing, origin, credentials, "POST", path, body | content)
        return response.messages[0].id if response.messages else None

    def takes_late(self, credentials: WhatsAppCredentials, reason: str) -> bool:
        return bool(credentials.template) and reason.startswith(f"{_CLOSED}:")

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


def _recipient(conversation: str) -> dict[str, str]:
    """A number, the id of a person for this business such as ``US.1349`` (``…/whatsapp/business-scoped-user-ids``), or
    the id of a group."""
    if conversation.isdecimal():
        return {"recipient_type": "individual", "to": conversation}
    if "." in conversation:
        return {"recipient_type": "individual", "recipient": conversation}
    return {"recipient_type": "group", "to": conversation}


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


class _Closed(EffectFailed):
    """The person's last message is older than 24 hours."""


def _template(text: str, credentials: WhatsAppCredentials) -> dict[str, Any]:
    """https://developers.facebook.com/docs/whatsapp/cloud-api/guides/send-message-templates"""
    shown = " ".join(render(text, PLAIN).split())
    if len(shown) > _MAX_VARIABLE:
        raise EffectFailed(f"{_CLOSED}: the text is too long for a template: {_MAX_VARIABLE} characters at most")
    parameters = [{"type": "text", "text": shown}]
    return {
        "type": "template",
        "template": {
            "name": credentials.template,
            "language": {"code": credentials.template_language},
            "components": [{"type": "body", "parameters": parameters}],
        },
    }


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
        _refuse(error, answer.status)
    if answer.status >= 400:
        raise EffectFailed(f"HTTP {answer.status}")
    return response


def _refuse(error: _Error, status: int) -> None:
    reason = f"{error.code}: {error.message}"[:200]
    if status == 401 or error.code in whatsapp_messages.ACCOUNT or 200 <= error.code < 300:
        raise AccountRefused(reason)
    if error.code in _LATER:
        raise RetryLater(_PAIR_DELAY if error.code == 131056 else DEFAULT_RETRY, reason)
    if error.code in _TRANSIENT:
        raise Transient(reason)
    if error.code == _CLOSED:
        raise _Closed(reason)
    raise EffectFailed(reason)
