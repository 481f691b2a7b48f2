"""Adapter for QQ bots: https://bot.q.qq.com/wiki/develop/api-v2/

See the pages on webhooks (signature), on sending messages (v2/users, v2/groups) and on access tokens.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from infra.errors import EffectFailed, RetryLater, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Outgoing
from services.channel.vendors import qq_events
from services.channel.vendors.base import (
    DEFAULT_RETRY,
    AccountRefused,
    Groups,
    Limit,
    Outbound,
    Request,
    Tokens,
    Vendor,
    at_origin,
    decode,
    download,
    is_recent,
    read_json,
)
from services.channel.vendors.items import Ack, Ignored, Received
from services.channel.vendors.markdown import PLAIN, render
from services.channel.vendors.splitting import split

# Characters of a part. A message may be answered by five parts, so parts of a very long answer are longer.
PART_TEXT = 1_500
MAX_PARTS = 5
_TOKEN_ORIGIN = "https://bots.qq.com"
_DISPATCH, _HEARTBEAT_ACK, _VALIDATION = 0, 12, 13
# The message with this msg_id and msg_seq was accepted before, or is accepted and waits for QQ's audit.
_ACCEPTED = frozenset((40054005, 304027, 304023, 304024))
_TOKEN_REFUSED = frozenset((11241, 11242, 11243, 11244, 11251, 11252, 11253, 11281))
# The text has an address that is not registered for the bot, or a name such as README.md that QQ takes for one.
_ADDRESSES = frozenset((40034028, 40054010, 304003))
_LATER = frozenset((22009, 20028, 304045, 304046, 304047, 304048, 304049, 304050))


# The dots that make an address: those before a letter, and those before the last two numbers of an IP address.
_DOT = re.compile(r"(?<=\w)\.(?=[^\W\d])|(?<=\d)\.(?=\d{1,3}\.\d)")
# The beginning of a mention.
_MENTION = re.compile(r"<(?=[@#]|qqbot-|emoji:)|@(?=everyone|all\b|全体成员)", re.IGNORECASE)


class QQCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    app_id: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z]{1,64}$")]
    secret: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class _Validation(msgspec.Struct):
    plain_token: str
    event_ts: str


class _Payload(msgspec.Struct):
    op: int
    t: str | None = None
    id: str | None = None
    d: msgspec.Raw = msgspec.Raw(b"null")


class _Token(msgspec.Struct):
    access_token: str = ""
    expires_in: str | float = 7_200
    code: int = 0
    message: str = ""


class _Response(msgspec.Struct):
    id: str | None = None
    code: int = 0
    message: str = ""
    username: str = ""


class QQ(Vendor[QQCredentials]):
    """Replies are passive: they name the message that they answer, and a number by which QQ drops repeats."""

    name: ClassVar[str] = "qq"
    credentials: ClassVar[type[msgspec.Struct]] = QQCredentials
    kinds: ClassVar[Mapping[str, str]] = qq_events.KINDS
    origin: ClassVar[str] = "https://api.sgroup.qq.com"
    addresses: ClassVar[tuple[str, ...]] = ()
    groups: ClassVar[tuple[Groups, ...]] = ("all", "mentions")
    effect: ClassVar[Kind] = "keyed"
    steps: ClassVar[tuple[str, ...]] = (
        "Create a bot; copy the app id and the secret.",
        "Enter the webhook's public URL as callback URL.",
        "Enable C2C_MESSAGE_CREATE and GROUP_AT_MESSAGE_CREATE.",
    )

    def __init__(self) -> None:
        self._tokens = Tokens()

    def effect_of(self, message: Outbound) -> Kind:
        """Only answers in chats and groups have a number by which QQ drops repeats."""
        is_numbered = message.answers and message.conversation.startswith(("users/", "groups/"))
        return "keyed" if is_numbered else "once"

    def receive(self, request: Request, credentials: QQCredentials, now: datetime) -> Received:
        timestamp = request.headers.get("x-signature-timestamp", "")
        if not is_recent(timestamp, now):
            raise Unauthenticated("X-Signature-Timestamp is missing or more than 5 minutes from our clock")
        key = signing_key(credentials)
        try:
            signature = bytes.fromhex(request.headers.get("x-signature-ed25519", ""))
            key.public_key().verify(signature, timestamp.encode() + request.body)
        except (InvalidSignature, ValueError) as error:
            raise Unauthenticated("X-Signature-Ed25519 does not match") from error
        payload = decode(request.body, _Payload)
        if payload.op == _VALIDATION:
            asked = decode(payload.d, _Validation)
            signed = key.sign(f"{asked.event_ts}{asked.plain_token}".encode()).hex()
            return Received([], _ack({"plain_token": asked.plain_token, "signature": signed}))
        ack = _ack({"op": _HEARTBEAT_ACK})
        if payload.op != _DISPATCH:
            return Received([Ignored((f"event/{payload.id}",), f"an event {payload.op}")], ack)
        return Received([qq_events.read(payload.t or "", payload.id or "", payload.d)], ack)

    def split(self, text: str) -> Sequence[str]:
        limit = PART_TEXT
        while len(parts := split(text, limit, lambda part: len(_shown(part)))) > MAX_PARTS:
            limit = limit * 5 // 4
        return parts

    def limits(self, conversation: str) -> Sequence[Limit]:
        return [Limit(f"conversation {conversation}", 5, 1)]

    async def fetch(self, outgoing: Outgoing, origin: str, credentials: QQCredentials, ref: str, most: int) -> bytes:
        # Some addresses come without a scheme.
        url = ref if "://" in ref else f"https://{ref.removeprefix('//')}"
        return await download(outgoing, at_origin(self, origin, url, "qpic.cn", "qq.com", "qq.com.cn"), most)

    async def identify(self, outgoing: Outgoing, origin: str, credentials: QQCredentials) -> str:
        return (await self._call(outgoing, origin, credentials, "GET", "/users/@me")).username

    async def send(self, outgoing: Outgoing, origin: str, credentials: QQCredentials, message: Outbound) -> str | None:
        body: dict[str, Any] = {"content": _shown(message.text), "msg_type": 0, "msg_seq": _number(message)}
        if message.answers:
            event = message.answers.removeprefix(qq_events.BY_EVENT)
            body["msg_id" if event == message.answers else "event_id"] = event
        kind = message.conversation.partition("/")[0]
        path = f"{'/v2' if kind in ('users', 'groups') else ''}/{message.conversation}/messages"
        try:
            return (await self._call(outgoing, origin, credentials, "POST", path, body)).id
        except _AddressRefused:
            # Nothing was sent. The person can read the address, and type it.
            body["content"] = _DOT.sub("．", body["content"])
            return (await self._call(outgoing, origin, credentials, "POST", path, body)).id

    async def _call(
        self,
        outgoing: Outgoing,
        origin: str,
        credentials: QQCredentials,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
    ) -> _Response:
        for _ in range(2):
            token = await self._token(outgoing, origin, credentials)
            headers = {"authorization": f"QQBot {token}"}
            template = "/v2/{kind}/{id}/messages" if body else path
            answer = await outgoing.request(method, f"{origin}{path}", headers=headers, json=body, template=template)
            response = read_json(answer, _Response)
            if response.code in _ACCEPTED:
                return _Response()
            if answer.status != 401 and response.code not in _TOKEN_REFUSED:
                break
            # The token was replaced meanwhile. A new one is fetched once.
            self._tokens.drop((origin, credentials), token)
        else:
            raise AccountRefused(f"{response.code or 'HTTP 401'}: {response.message}"[:200])
        if response.code:
            _refuse(response.code, response.message)
        if answer.status >= 400:
            raise EffectFailed(f"HTTP {answer.status}")
        return response

    async def _token(self, outgoing: Outgoing, origin: str, credentials: QQCredentials) -> str:
        async def fetch() -> tuple[str, float]:
            host = _TOKEN_ORIGIN if origin == self.origin else origin
            secret = {"appId": credentials.app_id, "clientSecret": credentials.secret}
            token = read_json(await outgoing.request("POST", f"{host}/app/getAppAccessToken", json=secret), _Token)
            if not token.access_token:
                raise AccountRefused(f"{token.code}: {token.message}"[:200])
            return token.access_token, float(token.expires_in)

        return await self._tokens.get((origin, credentials), fetch)


def signing_key(credentials: QQCredentials) -> Ed25519PrivateKey:
    """The key pair that both sides derive from the secret: the secret, repeated and cut to 32 bytes, is its seed."""
    secret = credentials.secret.encode()
    seed = (secret * (32 // len(secret) + 1))[:32]
    return Ed25519PrivateKey.from_private_bytes(seed)


def _number(message: Outbound) -> int:
    """The number of a reply, the same for each attempt. Others to the same message, such as a question before the
    answer, have other numbers."""
    # A key is a UUID with or without the part.
    delivery = hashlib.sha256(message.key[:36].encode()).digest()
    return int.from_bytes(delivery[:2]) * 16 + message.part


def _shown(text: str) -> str:
    """Plain text with a zero-width space in each mention, which would notify people, and in each link to a channel.

    https://bot.q.qq.com/wiki/develop/api-v2/server-inter/message/trans/text-chain.html
    """
    return _MENTION.sub("\\g<0>\u200b", render(text, PLAIN))


def _ack(answer: dict[str, Any]) -> Ack:
    return Ack(msgspec.json.encode(answer), "application/json")


class _AddressRefused(EffectFailed):
    """The text has an address that is not registered for the bot."""


def _refuse(code: int, message: str) -> None:
    reason = f"{code}: {message}"[:200]
    if code in _ADDRESSES:
        raise _AddressRefused(reason)
    if code in _LATER:
        raise RetryLater(DEFAULT_RETRY, reason)
    # Among them: the message that it answers is too old, or was answered five times.
    raise EffectFailed(reason)
