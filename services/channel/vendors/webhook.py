"""Adapter for any program, by Standard Webhooks in both directions.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

import msgspec

from infra.clock import utcnow, uuid7
from infra.errors import EffectFailed, InvalidMessage
from infra.lanes.effects import Kind
from infra.outgoing import webhooks
from infra.outgoing.client import Outgoing
from infra.web.http import decode_json
from services.channel.events import Attachment
from services.channel.vendors.base import (
    MAX_FILE,
    AccountRefused,
    Limit,
    Outbound,
    Request,
    Vendor,
    download,
    kind_of,
    mended,
    raise_for_transient,
)
from services.channel.vendors.items import Inbound, Received
from services.channel.vendors.splitting import split

# Characters. It keeps one message below the usual body limits of HTTP servers.
MAX_TEXT = 100_000
# Any text without NUL, which databases refuse.
_Id = Annotated[str, msgspec.Meta(pattern="^[^\\x00]{1,500}$")]


class WebhookCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    secret: str
    """``whsec_`` and base64 of 24 to 64 bytes. It signs both directions."""
    reply_url: Annotated[str, msgspec.Meta(min_length=1, max_length=2_000)]

    def __post_init__(self) -> None:
        webhooks.read_secret(self.secret)


class _File(msgspec.Struct):
    url: Annotated[str, msgspec.Meta(min_length=1, max_length=2_000)]
    name: Annotated[str, msgspec.Meta(max_length=200)] = ""
    content_type: str = ""


class _Message(msgspec.Struct):
    conversation_id: _Id
    user_id: _Id
    text: str = ""
    attachments: Annotated[list[_File], msgspec.Meta(max_length=10)] = []


class Webhook(Vendor[WebhookCredentials]):
    """The idempotency key is the ``webhook-id``, by which the receiver drops repeats."""

    name: ClassVar[str] = "webhook"
    credentials: ClassVar[type[msgspec.Struct]] = WebhookCredentials
    kinds: ClassVar[Mapping[str, str]] = {"text": "", "attachments": ""}
    origin: ClassVar[str] = ""
    addresses: ClassVar[tuple[str, ...]] = ("reply_url",)
    effect: ClassVar[Kind] = "keyed"
    files: ClassVar[Mapping[str, int]] = {"": MAX_FILE}
    steps: ClassVar[tuple[str, ...]] = (
        "Generate a secret: whsec_ and the base64 of 24 to 64 random bytes.",
        "Sign each message by Standard Webhooks and post it to the webhook's public URL.",
        "Verify the replies that arrive at reply_url with the same secret.",
    )

    def receive(self, request: Request, credentials: WebhookCredentials, now: datetime) -> Received:
        id_ = webhooks.verify(credentials.secret, request.headers, request.body, now)
        try:
            message = decode_json(request.body, _Message)
        except InvalidMessage:
            message = decode_json(mended(request.body), _Message)
        return Received(
            [
                Inbound(
                    ids=(id_,),
                    conversation=message.conversation_id,
                    person=message.user_id,
                    message=id_,
                    text=message.text,
                    attachments=tuple(
                        [Attachment(kind_of(file.content_type), file.url, file.name) for file in message.attachments]
                    ),
                )
            ]
        )

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT)

    def limits(self, conversation: str) -> Sequence[Limit]:
        return []

    async def fetch(
        self, outgoing: Outgoing, origin: str, credentials: WebhookCredentials, ref: str, most: int
    ) -> bytes:
        return await download(outgoing, ref, most)

    async def identify(self, outgoing: Outgoing, origin: str, credentials: WebhookCredentials) -> str:
        """Sends ``{"type": "test"}``, signed as a reply is."""
        await _post(outgoing, credentials, f"test_{uuid7()}", {"type": "test"})
        return urlsplit(credentials.reply_url).netloc

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: WebhookCredentials, message: Outbound
    ) -> str | None:
        body: dict[str, Any] = {
            "conversation_id": message.conversation,
            "text": message.text,
            "run_id": message.run_id,
        }
        if file := message.file:
            body["text"] = ""
            # A file of our store is in the message itself.
            data = f"data:{file.content_type};base64,{base64.b64encode(file.content).decode()}"
            body["attachments"] = [{"url": file.url or data, "name": file.name, "content_type": file.content_type}]
        await _post(outgoing, credentials, message.key, body)
        return None


async def _post(outgoing: Outgoing, credentials: WebhookCredentials, id_: str, body: dict[str, Any]) -> None:
    content = msgspec.json.encode(body)
    headers = {"content-type": "application/json", **webhooks.sign(credentials.secret, id_, utcnow(), content)}
    answer = await outgoing.request("POST", credentials.reply_url, headers=headers, content=content)
    if answer.status == 410:
        raise AccountRefused("HTTP 410: the receiver is gone")
    raise_for_transient(answer)
    if not 200 <= answer.status < 300:
        raise EffectFailed(f"HTTP {answer.status}")
