"""Adapter for Feishu apps (Lark with another origin): https://open.feishu.cn/document/

See the pages on event subscription (encryption, signature), on sending messages (im/v1/messages) and on access tokens.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar
from urllib.parse import quote

import msgspec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.padding import PKCS7

from infra.errors import EffectFailed, InvalidMessage, RetryLater, Transient, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Outgoing
from services.channel.vendors import feishu_events
from services.channel.vendors.base import (
    DEFAULT_RETRY,
    PLACEHOLDER,
    AccountRefused,
    Groups,
    Limit,
    Outbound,
    Preview,
    Request,
    Tokens,
    UnreadableCall,
    Vendor,
    constant_time_equals,
    decode,
    download,
    is_recent,
    read_json,
)
from services.channel.vendors.items import Ack, Ignored, Received
from services.channel.vendors.markdown import MARKDOWN, PLAIN, render
from services.channel.vendors.splitting import split

# Bytes of a rich text or a card in the request, which may have 30 KB. Markdown is sent as rich text.
MAX_TEXT = 28_000
_TOKEN_REFUSED = frozenset((99991661, 99991663, 99991664, 99991665, 99991668, 99991671, 99991677))
_LATER = frozenset((230020, 99991400, 11232, 11233, 11247))
_TRANSIENT = frozenset((2200, 5000, 230049))
# A wrong app id or secret, an app that is switched off or has no bot.
_ACCOUNT = frozenset((10003, 10012, 10014, 10015, 230006, 99991401, 99991543, 99991662, 99991672))


# The beginning of a mention, of a person or of all.
_MENTION = re.compile(r"<(?=\s*at\b)", re.IGNORECASE)


def _without_mentions(text: str) -> str:
    """The text without mentions, which would notify people: ``<at id=all></at>``."""
    return _MENTION.sub("&lt;", text)


# Feishu shows most of Markdown in a rich text and in a card, but images by its own keys only, and not in each of its
# programs headings and tables: https://open.feishu.cn/document/server-docs/im-v1/message-content-description/create_json
DIALECT = replace(MARKDOWN, escape=_without_mentions, bullet="- ")


class FeishuCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    app_id: Annotated[str, msgspec.Meta(pattern="^[!-~]{1,64}$")]
    app_secret: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    encrypt_key: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    verification_token: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class _Encrypted(msgspec.Struct):
    encrypt: str | None = None


class _Header(msgspec.Struct):
    event_id: str
    event_type: str
    token: str = ""


class _Payload(msgspec.Struct):
    type: str | None = None
    token: str | None = None
    """Only of a handshake, and of an event of the old schema."""
    challenge: str | None = None
    uuid: str | None = None
    header: _Header | None = None
    event: msgspec.Raw = msgspec.Raw(b"{}")


class _Token(msgspec.Struct):
    code: int = 0
    msg: str = ""
    tenant_access_token: str = ""
    expire: float = 7_200


class _Bot(msgspec.Struct):
    app_name: str = ""


class _Sent(msgspec.Struct):
    message_id: str | None = None
    items: list[dict[str, Any]] = []
    """Of a question for a message: it, and those that it forwards."""


class _Response(msgspec.Struct):
    code: int = 0
    msg: str = ""
    data: _Sent | None = None
    bot: _Bot | None = None


class Feishu(Vendor[FeishuCredentials]):
    """Bodies are encrypted and signed. A message carries a ``uuid``, by which Feishu drops repeats for an hour."""

    name: ClassVar[str] = "feishu"
    credentials: ClassVar[type[msgspec.Struct]] = FeishuCredentials
    kinds: ClassVar[Mapping[str, str]] = feishu_events.KINDS
    origin: ClassVar[str] = "https://open.feishu.cn"
    addresses: ClassVar[tuple[str, ...]] = ()
    effect: ClassVar[Kind] = "keyed"
    # An hour: https://open.feishu.cn/document/server-docs/im-v1/message/create
    key_known: ClassVar[timedelta | None] = timedelta(minutes=58)
    groups: ClassVar[tuple[Groups, ...]] = ("all", "mentions")
    preview: ClassVar[Preview | None] = "edit"
    steps: ClassVar[tuple[str, ...]] = (
        "Create an app with a bot; copy the app id and the app secret.",
        "Set an Encrypt Key and copy it and the Verification Token.",
        "Enter the webhook's public URL as request URL, and subscribe to im.message.receive_v1; for deletions and "
        "reactions also to im.message.recalled_v1, im.message.reaction.created_v1 and im.message.reaction.deleted_v1.",
    )

    def __init__(self) -> None:
        self._tokens = Tokens()

    def receive(self, request: Request, credentials: FeishuCredentials, now: datetime) -> Received:
        # The handshake is encrypted but not signed. So a signature is asked for after the decryption, and nothing of
        # any other body is used before it.
        try:
            encrypted = decode(request.body, _Encrypted).encrypt
        except UnreadableCall:
            encrypted = None
        if encrypted is None:
            raise Unauthenticated("the body is not encrypted, although the channel has an encrypt_key")
        plain = decrypt(credentials, encrypted)
        try:
            payload = decode(plain, _Payload)
        except (UnreadableCall, InvalidMessage):
            # A changed body may decrypt to anything.
            _verify(request, credentials, now)
            raise
        token = payload.header.token if payload.header else payload.token or ""
        if not constant_time_equals(token, credentials.verification_token):
            raise Unauthenticated("the token is not this channel's verification_token")
        if payload.type == "url_verification":
            answer = msgspec.json.encode({"challenge": payload.challenge or ""})
            return Received([], Ack(answer, "application/json"))
        _verify(request, credentials, now)
        if payload.header is None:
            return Received([Ignored((f"event/{payload.uuid}",), "an event of the old schema")])
        ids = (f"event/{payload.header.event_id}",)
        return Received([feishu_events.read(ids, payload.header.event_type, payload.event)])

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT, _length)

    def limits(self, conversation: str) -> Sequence[Limit]:
        """https://open.feishu.cn/document/server-docs/im-v1/message/create"""
        return [
            Limit("app", 50, 1),
            Limit("app minute", 1_000, 60),
            Limit(f"chat {conversation.partition('/')[0]}", 5, 1),
        ]

    async def fetch(
        self, outgoing: Outgoing, origin: str, credentials: FeishuCredentials, ref: str, most: int
    ) -> bytes:
        message, _, key = ref.partition("/")
        if key == feishu_events.FORWARDED:
            url = f"{origin}/open-apis/im/v1/messages/{quote(message)}"
            response = await self._call(outgoing, origin, credentials, "GET", url)
            items = response.data.items if response.data else []
            return feishu_events.forwarded(items).encode()[:most]
        kind = "image" if key.startswith("img_") else "file"
        path = f"/open-apis/im/v1/messages/{quote(message)}/resources/{quote(key)}?type={kind}"
        token = await self._token(outgoing, origin, credentials)
        return await download(outgoing, f"{origin}{path}", most, {"authorization": f"Bearer {token}"})

    async def identify(self, outgoing: Outgoing, origin: str, credentials: FeishuCredentials) -> str:
        response = await self._call(outgoing, origin, credentials, "GET", f"{origin}/open-apis/bot/v3/info")
        return response.bot.app_name if response.bot else credentials.app_id

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: FeishuCredentials, message: Outbound
    ) -> str | None:
        return await self._send(outgoing, origin, credentials, message, _content(message.text))

    async def place(
        self, outgoing: Outgoing, origin: str, credentials: FeishuCredentials, message: Outbound
    ) -> str | None:
        """A card, because a text can be edited twenty times only."""
        content = {"msg_type": "interactive", "content": _card(PLACEHOLDER)}
        return await self._send(outgoing, origin, credentials, message, content)

    async def edit(
        self, outgoing: Outgoing, origin: str, credentials: FeishuCredentials, message: Outbound, shown: str
    ) -> None:
        url = f"{origin}/open-apis/im/v1/messages/{quote(shown)}"
        await self._call(outgoing, origin, credentials, "PATCH", url, {"content": _card(message.text)})

    async def retract(
        self, outgoing: Outgoing, origin: str, credentials: FeishuCredentials, message: Outbound, shown: str
    ) -> None:
        url = f"{origin}/open-apis/im/v1/messages/{quote(shown)}"
        await self._call(outgoing, origin, credentials, "DELETE", url)

    async def _send(
        self,
        outgoing: Outgoing,
        origin: str,
        credentials: FeishuCredentials,
        message: Outbound,
        content: dict[str, str],
    ) -> str | None:
        chat, _, root = message.conversation.partition("/")
        body: dict[str, Any] = {**content, "uuid": message.key[:50]}
        if root:
            url = f"{origin}/open-apis/im/v1/messages/{root}/reply"
            body["reply_in_thread"] = True
        else:
            url = f"{origin}/open-apis/im/v1/messages?receive_id_type=chat_id"
            body["receive_id"] = chat
        response = await self._call(outgoing, origin, credentials, "POST", url, body)
        return response.data.message_id if response.data else None

    async def _call(
        self,
        outgoing: Outgoing,
        origin: str,
        credentials: FeishuCredentials,
        method: str,
        url: str,
        body: dict[str, Any] | None = None,
    ) -> _Response:
        for _ in range(2):
            token = await self._token(outgoing, origin, credentials)
            answer = await outgoing.request(method, url, headers={"authorization": f"Bearer {token}"}, json=body)
            response = read_json(answer, _Response)
            if response.code not in _TOKEN_REFUSED:
                break
            # The token was replaced meanwhile. A new one is fetched once.
            self._tokens.drop((origin, credentials), token)
        if response.code:
            _refuse(response.code, response.msg)
        if answer.status >= 400:
            raise EffectFailed(f"HTTP {answer.status}")
        return response

    async def _token(self, outgoing: Outgoing, origin: str, credentials: FeishuCredentials) -> str:
        async def fetch() -> tuple[str, float]:
            path = "/open-apis/auth/v3/tenant_access_token/internal"
            secret = {"app_id": credentials.app_id, "app_secret": credentials.app_secret}
            token = read_json(await outgoing.request("POST", f"{origin}{path}", json=secret), _Token)
            if token.code or not token.tenant_access_token:
                _refuse(token.code, token.msg)
            return token.tenant_access_token, token.expire

        return await self._tokens.get((origin, credentials), fetch)


def _verify(request: Request, credentials: FeishuCredentials, now: datetime) -> None:
    timestamp = request.headers.get("x-lark-request-timestamp", "")
    nonce = request.headers.get("x-lark-request-nonce", "")
    if not is_recent(timestamp, now):
        raise Unauthenticated("X-Lark-Request-Timestamp is missing or more than 5 minutes from our clock")
    expected = sign(credentials, timestamp, nonce, request.body)
    if not constant_time_equals(request.headers.get("x-lark-signature", ""), expected):
        raise Unauthenticated("X-Lark-Signature does not match")


def sign(credentials: FeishuCredentials, timestamp: str, nonce: str, body: bytes) -> str:
    return hashlib.sha256(f"{timestamp}{nonce}{credentials.encrypt_key}".encode() + body).hexdigest()


def decrypt(credentials: FeishuCredentials, encrypted: str) -> bytes:
    """Raises Unauthenticated if it was not encrypted with the channel's key."""
    try:
        blob = base64.b64decode(encrypted, validate=True)
        key = hashlib.sha256(credentials.encrypt_key.encode()).digest()
        opener = Cipher(algorithms.AES(key), modes.CBC(blob[:16])).decryptor()
        padded = opener.update(blob[16:]) + opener.finalize()
        unpadder = PKCS7(128).unpadder()
        return unpadder.update(padded) + unpadder.finalize()
    except ValueError as error:
        raise Unauthenticated("the body is not encrypted with this channel's encrypt_key") from error


def _length(text: str) -> int:
    """The bytes of the text in a request: JSON within JSON makes four of a quotation mark."""
    return len(msgspec.json.encode(msgspec.json.encode(render(text, DIALECT)).decode()))


def _content(text: str) -> dict[str, str]:
    """A text without marks, else a rich text that Feishu renders from Markdown."""
    if render(text, PLAIN) == text:
        content: dict[str, Any] = {"text": _without_mentions(text)}
        return {"msg_type": "text", "content": msgspec.json.encode(content).decode()}
    paragraph = {"tag": "md", "text": render(text, DIALECT)}
    return {"msg_type": "post", "content": msgspec.json.encode({"zh_cn": {"content": [[paragraph]]}}).decode()}


def _card(text: str) -> str:
    """A card that shows Markdown. ``update_multi``: everybody in a group sees its changes."""
    element = {"tag": "markdown", "content": render(text, DIALECT)}
    card = {"schema": "2.0", "config": {"update_multi": True}, "body": {"elements": [element]}}
    return msgspec.json.encode(card).decode()


def _refuse(code: int, message: str) -> None:
    reason = f"{code}: {message}"[:200]
    if code in _ACCOUNT or code in _TOKEN_REFUSED:
        raise AccountRefused(reason)
    if code in _LATER:
        raise RetryLater(DEFAULT_RETRY, reason)
    if code in _TRANSIENT:
        raise Transient(reason)
    raise EffectFailed(reason)
