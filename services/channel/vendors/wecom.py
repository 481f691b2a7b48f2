"""Adapter for WeCom apps: https://developer.work.weixin.qq.com/document/

See the pages on receiving messages (encryption) and on sending application messages (cgi-bin/message/send).
"""

from __future__ import annotations

import base64
import hashlib
import struct
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar
from urllib.parse import parse_qsl, quote

import msgspec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from infra.errors import EffectFailed, RetryLater, Transient, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Outgoing
from services.channel.vendors import wecom_messages
from services.channel.vendors.base import (
    DEFAULT_RETRY,
    MALFORMED,
    AccountRefused,
    Limit,
    Outbound,
    Request,
    Tokens,
    Vendor,
    constant_time_equals,
    download,
    is_recent,
    read_json,
)
from services.channel.vendors.items import Ack, Received
from services.channel.vendors.markdown import PLAIN, render
from services.channel.vendors.splitting import split, utf8_length

# Bytes.
MAX_TEXT = 2_048
_DUPLICATE_SECONDS = 1_800
_MARK_BITS = 16
_INVISIBLE = "\u200b\u200c"
_BLOCK = 32
# https://developer.work.weixin.qq.com/document/path/90313
_TOKEN_REFUSED = frozenset((40014, 41001, 42001))
_ACCOUNT = frozenset((40001, 40013, 40056, 41002, 41004, 48002, 50003, 60011, 60020, 301002))
_LATER = frozenset((45009, 45033, 45011))
_TRANSIENT = frozenset((-1, 50001, 90211))


class WeComCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    corp_id: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    agent_id: Annotated[str, msgspec.Meta(pattern="^[0-9]{1,18}$")]
    secret: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    token: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    encoding_aes_key: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z+/]{43}$")]


class _Token(msgspec.Struct):
    errcode: int = 0
    errmsg: str = ""
    access_token: str = ""
    expires_in: float = 7_200


class _Response(msgspec.Struct):
    errcode: int = 0
    errmsg: str = ""
    msgid: str | None = None
    invaliduser: str | None = None
    name: str = ""


class WeCom(Vendor[WeComCredentials]):
    """Bodies are encrypted and signed. WeCom drops a repeat of the same text to the same person within half an hour."""

    name: ClassVar[str] = "wecom"
    credentials: ClassVar[type[msgspec.Struct]] = WeComCredentials
    kinds: ClassVar[Mapping[str, str]] = wecom_messages.KINDS
    origin: ClassVar[str] = "https://qyapi.weixin.qq.com"
    addresses: ClassVar[tuple[str, ...]] = ()
    effect: ClassVar[Kind] = "keyed"
    key_known: ClassVar[timedelta | None] = timedelta(seconds=_DUPLICATE_SECONDS - 120)
    steps: ClassVar[tuple[str, ...]] = (
        "Create an app; copy the corp id, the agent id and the secret.",
        "Under Receive messages, generate a token and an EncodingAESKey.",
        "Enter the webhook's public URL there and save.",
    )

    def __init__(self) -> None:
        self._tokens = Tokens()

    def receive(self, request: Request, credentials: WeComCredentials, now: datetime) -> Received:
        query = dict(parse_qsl(request.query, keep_blank_values=True))
        is_handshake = request.method == "GET"
        encrypted = query.get("echostr", "") if is_handshake else wecom_messages.fields(request.body).get("Encrypt", "")
        timestamp, nonce = query.get("timestamp", ""), query.get("nonce", "")
        if not constant_time_equals(query.get("msg_signature", ""), sign(credentials, timestamp, nonce, encrypted)):
            raise Unauthenticated("msg_signature does not match")
        if not is_recent(timestamp, now):
            raise Unauthenticated("timestamp is missing or more than 5 minutes from our clock")
        content = decrypt(credentials, encrypted)
        if is_handshake:
            return Received([], Ack(content))
        return Received([wecom_messages.read(content, credentials.agent_id)])

    def split(self, text: str) -> Sequence[str]:
        room = MAX_TEXT - utf8_length(_mark(""))
        return split(text, room, lambda part: utf8_length(render(part, PLAIN)))

    def limits(self, conversation: str) -> Sequence[Limit]:
        """https://developer.work.weixin.qq.com/document/path/90312"""
        return [Limit(f"member {conversation}", 30, 60), Limit(f"member {conversation} hour", 1_000, 3_600)]

    async def fetch(self, outgoing: Outgoing, origin: str, credentials: WeComCredentials, ref: str, most: int) -> bytes:
        token = await self._token(outgoing, origin, credentials)
        url = f"{origin}/cgi-bin/media/get?access_token={token}&media_id={quote(ref, safe='')}"
        content = await download(outgoing, url, most, template="/cgi-bin/media/get")
        if content.startswith(b'{"errcode"'):
            # An error is JSON with the status 200.
            try:
                refused = msgspec.json.decode(content, type=_Response)
            except MALFORMED:
                return content
            _refuse(refused.errcode, refused.errmsg)
        return content

    async def identify(self, outgoing: Outgoing, origin: str, credentials: WeComCredentials) -> str:
        path = "/cgi-bin/agent/get"
        query = f"agentid={credentials.agent_id}"
        return (await self._call(outgoing, origin, credentials, "GET", path, query)).name

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: WeComCredentials, message: Outbound
    ) -> str | None:
        body = {
            "touser": message.conversation,
            "msgtype": "text",
            "agentid": int(credentials.agent_id),
            "text": {"content": render(message.text, PLAIN) + _mark(message.key)},
            "enable_duplicate_check": 1,
            "duplicate_check_interval": _DUPLICATE_SECONDS,
        }
        response = await self._call(outgoing, origin, credentials, "POST", "/cgi-bin/message/send", "", body)
        if response.invaliduser:
            raise EffectFailed("the person is not a user of this app")
        return response.msgid

    async def _call(
        self,
        outgoing: Outgoing,
        origin: str,
        credentials: WeComCredentials,
        method: str,
        path: str,
        query: str,
        body: dict[str, Any] | None = None,
    ) -> _Response:
        for _ in range(2):
            token = await self._token(outgoing, origin, credentials)
            url = f"{origin}{path}?access_token={token}{f'&{query}' if query else ''}"
            answer = await outgoing.request(method, url, json=body, template=path)
            response = read_json(answer, _Response)
            if response.errcode not in _TOKEN_REFUSED:
                break
            # The token was replaced meanwhile. A new one is fetched once.
            self._tokens.drop((origin, credentials), token)
        if response.errcode:
            _refuse(response.errcode, response.errmsg)
        if answer.status >= 400:
            raise EffectFailed(f"HTTP {answer.status}")
        return response

    async def _token(self, outgoing: Outgoing, origin: str, credentials: WeComCredentials) -> str:
        async def fetch() -> tuple[str, float]:
            query = f"corpid={credentials.corp_id}&corpsecret={credentials.secret}"
            url = f"{origin}/cgi-bin/gettoken?{query}"
            token = read_json(await outgoing.request("GET", url, template="/cgi-bin/gettoken"), _Token)
            if token.errcode or not token.access_token:
                _refuse(token.errcode, token.errmsg)
            return token.access_token, token.expires_in

        return await self._tokens.get((origin, credentials), fetch)


def sign(credentials: WeComCredentials, timestamp: str, nonce: str, encrypted: str) -> str:
    parts = "".join(sorted((credentials.token, timestamp, nonce, encrypted)))
    return hashlib.sha1(parts.encode()).hexdigest()


def decrypt(credentials: WeComCredentials, encrypted: str) -> bytes:
    """Raises Unauthenticated if it was not encrypted with the channel's key, or for another company."""
    try:
        key = base64.b64decode(f"{credentials.encoding_aes_key}=")
        opener = Cipher(algorithms.AES(key), modes.CBC(key[:16])).decryptor()
        padded = opener.update(base64.b64decode(encrypted, validate=True)) + opener.finalize()
        padding = padded[-1]
        if not 1 <= padding <= _BLOCK:
            raise ValueError("padding")
        content = padded[16:-padding]
        (length,) = struct.unpack(">I", content[:4])
        message, receiver = content[4 : 4 + length], content[4 + length :]
    except (ValueError, IndexError, struct.error) as error:
        raise Unauthenticated("the message is not encrypted with this channel's encoding_aes_key") from error
    if not constant_time_equals(receiver.decode("latin-1"), credentials.corp_id):
        raise Unauthenticated("the message is for another company")
    return message


def _mark(key: str) -> str:
    """Characters without width that tell deliveries apart.

    WeCom has no field for a key: it drops a text that the person got within the last half hour. Without the mark, a
    second "Yes." would be dropped too.
    """
    bits = int.from_bytes(hashlib.sha256(key.encode()).digest()[:2])
    return "".join(_INVISIBLE[bits >> n & 1] for n in range(_MARK_BITS))


def _refuse(code: int, message: str) -> None:
    reason = f"{code}: {message}"[:200]
    if code in _ACCOUNT or code in _TOKEN_REFUSED:
        raise AccountRefused(reason)
    if code in _LATER:
        raise RetryLater(DEFAULT_RETRY, reason)
    if code in _TRANSIENT:
        raise Transient(reason)
    raise EffectFailed(reason)
