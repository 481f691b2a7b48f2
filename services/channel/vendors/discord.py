"""Adapter for Discord apps, by interactions over HTTP.

https://discord.com/developers/docs/interactions/overview, https://discord.com/developers/docs/resources/webhook,
https://discord.com/developers/docs/resources/message, https://discord.com/developers/docs/topics/rate-limits
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from infra.errors import EffectFailed, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Answer, Outgoing
from services.channel.events import Attachment
from services.channel.multipart import multipart
from services.channel.vendors.base import (
    MAX_FILE,
    AccountRefused,
    Limit,
    Outbound,
    OutboundFile,
    Preview,
    Request,
    Vendor,
    at_origin,
    decode,
    download,
    is_recent,
    kind_of,
    raise_for_transient,
    read_json,
)
from services.channel.vendors.items import Ack, Ignored, Inbound, Received
from services.channel.vendors.markdown import Dialect, quoted_lines, render, unchanged
from services.channel.vendors.splitting import split

# Characters.
MAX_TEXT = 2_000
_NONCE_LENGTH = 25
_PING, _COMMAND, _COMPONENT, _AUTOCOMPLETE = 1, 2, 3, 4
_STRING_OPTION, _FILE_OPTION = 3, 11
# Answers to an interaction: a pong, "is thinking", no choices.
_PONG, _DEFERRED = ({"type": kind} for kind in (1, 5))
_NO_CHOICES = {"type": 8, "data": {"choices": []}}
# The command that people use.
_ASK = {
    "name": "ask",
    "description": "Ask the assistant",
    "options": [
        {"type": _STRING_OPTION, "name": "question", "description": "The question", "required": True},
        {"type": _FILE_OPTION, "name": "file", "description": "A file for the question", "required": False},
    ],
}
# The token of the interaction is no longer valid: unknown webhook, invalid webhook token, unknown message.
_EXPIRED = (10008, 10015, 50027)

# Discord shows Markdown itself, but no tables and no images.
DIALECT = Dialect(
    bold=("**", "**"),
    italic=("*", "*"),
    strike=("~~", "~~"),
    code=("`", "`"),
    fence=lambda text, language: f"```{language}\n{text}\n```",
    quote=quoted_lines,
    link=lambda label, url: url if label == url else f"[{label}]({url})",
    escape=unchanged,
)


class DiscordCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    application_id: Annotated[str, msgspec.Meta(pattern="^[0-9]{1,32}$")]
    public_key: Annotated[str, msgspec.Meta(pattern="^[0-9a-fA-F]{64}$")]
    bot_token: Annotated[str, msgspec.Meta(pattern="^[!-~]{1,256}$")]


class _User(msgspec.Struct):
    id: str


# https://discord.com/developers/docs/topics/permissions: it has all permissions of the server.
_ADMINISTRATOR = 1 << 3


class _Member(msgspec.Struct):
    user: _User | None = None
    permissions: str = "0"
    """A set of bits, in decimal."""


class _File(msgspec.Struct):
    url: str
    filename: str = ""
    content_type: str | None = None


class _Resolved(msgspec.Struct):
    attachments: dict[str, _File] | None = None


class _Data(msgspec.Struct):
    name: str = ""
    options: list[dict[str, Any]] | None = None
    custom_id: str = ""
    values: list[str] | None = None
    """The choices of a menu; a button has only its `custom_id`."""
    resolved: _Resolved | None = None


class _Interaction(msgspec.Struct):
    type: int
    id: str = ""
    token: str = ""
    channel_id: str | None = None
    member: _Member | None = None
    user: _User | None = None
    data: _Data | None = None
    event: dict[str, Any] | None = None
    """Only webhook events have it; interactions do not."""


class _Message(msgspec.Struct):
    id: str | None = None
    code: int = 0
    message: str = ""
    retry_after: float | None = None
    username: str = ""


class Discord(Vendor[DiscordCredentials]):
    """The text is the string option of a command. It is answered at once with "is thinking"; the reply replaces that.

    Further parts, and replies after the fifteen minutes of the interaction, are messages of the bot with a nonce.
    """

    name: ClassVar[str] = "discord"
    credentials: ClassVar[type[msgspec.Struct]] = DiscordCredentials
    origin: ClassVar[str] = "https://discord.com"
    addresses: ClassVar[tuple[str, ...]] = ()
    # The first part replaces the same message again; the others carry a nonce.
    effect: ClassVar[Kind] = "keyed"
    files: ClassVar[Mapping[str, int]] = {"": MAX_FILE}
    preview: ClassVar[Preview | None] = "edit"
    steps: ClassVar[tuple[str, ...]] = (
        "Create an application; copy its id, its public key and the token of its bot.",
        "Register a command with one string option, and enter the webhook's public URL as Interactions Endpoint URL.",
    )

    def receive(self, request: Request, credentials: DiscordCredentials, now: datetime) -> Received:
        timestamp = request.headers.get("x-signature-timestamp", "")
        if not is_recent(timestamp, now):
            raise Unauthenticated("X-Signature-Timestamp is missing or more than 5 minutes from our clock")
        try:
            signature = bytes.fromhex(request.headers.get("x-signature-ed25519", ""))
            key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(credentials.public_key))
            key.verify(signature, timestamp.encode() + request.body)
        except (InvalidSignature, ValueError) as error:
            raise Unauthenticated("X-Signature-Ed25519 does not match") from error
        unnamed = (f"body/{hashlib.sha256(request.body).hexdigest()}",)
        interaction = decode(request.body, _Interaction)
        if interaction.event is not None or interaction.type == 0:
            ignored = [] if interaction.type == 0 else [Ignored(unnamed, "a webhook event")]
            return Received(ignored, Ack(status=204))
        if interaction.type == _PING:
            return Received([], _ack(_PONG))
        ids = (f"interaction/{interaction.id}",) if interaction.id else unnamed
        if interaction.type not in (_COMMAND, _COMPONENT):
            ack = _ack(_NO_CHOICES) if interaction.type == _AUTOCOMPLETE else Ack()
            return Received([Ignored(ids, f"an interaction of type {interaction.type}")], ack)
        author = (interaction.member and interaction.member.user) or interaction.user
        if author is None or interaction.channel_id is None:
            return Received([Ignored(ids, "a command without a channel or an author")], _ack(_DEFERRED))
        data = interaction.data or _Data()
        if interaction.type == _COMPONENT:
            text = ", ".join(data.values or ()) or data.custom_id
        else:
            text = next(_strings(data.options), None) or f"/{data.name}"
        files = (data.resolved or _Resolved()).attachments or {}
        attachments = tuple(
            Attachment(kind_of(file.content_type or ""), file.url, file.filename) for file in files.values()
        )
        item = Inbound(
            ids,
            interaction.channel_id,
            author.id,
            interaction.token,
            text,
            attachments=attachments,
            by_admin=_is_admin(interaction.member),
        )
        return Received([item], _ack(_DEFERRED))

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT, lambda part: len(render(part, DIALECT)))

    def limits(self, conversation: str) -> Sequence[Limit]:
        return [Limit("app", 50, 1), Limit(f"channel {conversation}", 5, 5)]

    async def fetch(
        self, outgoing: Outgoing, origin: str, credentials: DiscordCredentials, ref: str, most: int
    ) -> bytes:
        return await download(outgoing, at_origin(self, origin, ref, "discordapp.com", "discordapp.net"), most)

    async def identify(self, outgoing: Outgoing, origin: str, credentials: DiscordCredentials) -> str:
        return (await _as_bot(outgoing, origin, credentials, "GET", "users/@me")).username

    async def register(self, outgoing: Outgoing, origin: str, credentials: DiscordCredentials, url: str) -> bool:
        """Also registers the command. Discord replaces a command of the same name."""
        path = f"applications/{credentials.application_id}/commands"
        await _as_bot(outgoing, origin, credentials, "POST", path, _ASK)
        body = {"interactions_endpoint_url": url}
        await _as_bot(outgoing, origin, credentials, "PATCH", "applications/@me", body)
        return True

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: DiscordCredentials, message: Outbound
    ) -> str | None:
        if message.part == 1 and message.answers:
            answer, response = await _change(outgoing, origin, credentials, message, "@original")
            if answer.status < 400:
                return response.id
            if response.code not in _EXPIRED and answer.status != 404:
                raise EffectFailed(f"{response.code}: {response.message}"[:200])
        nonce = hashlib.sha256(message.key.encode()).hexdigest()[:_NONCE_LENGTH]
        body = _body(message) | {"nonce": nonce, "enforce_nonce": True}
        path = f"channels/{message.conversation}/messages"
        return (await _as_bot(outgoing, origin, credentials, "POST", path, body, message.file)).id

    async def edit(
        self, outgoing: Outgoing, origin: str, credentials: DiscordCredentials, message: Outbound, shown: str
    ) -> None:
        """An interaction can change its own messages only, for fifteen minutes."""
        answer, response = await _change(outgoing, origin, credentials, message, shown)
        if answer.status >= 400:
            raise EffectFailed(f"{response.code}: {response.message}"[:200])

    async def retract(
        self, outgoing: Outgoing, origin: str, credentials: DiscordCredentials, message: Outbound, shown: str
    ) -> None:
        path = f"channels/{message.conversation}/messages/{shown}"
        await _as_bot(outgoing, origin, credentials, "DELETE", path)


def _body(message: Outbound) -> dict[str, Any]:
    # Without allowed_mentions, @everyone in an answer would notify everybody.
    text = "" if message.file else render(message.text, DIALECT)
    return {"content": text, "allowed_mentions": {"parse": []}}


async def _change(
    outgoing: Outgoing, origin: str, credentials: DiscordCredentials, message: Outbound, id_: str
) -> tuple[Answer, _Message]:
    """Edits a message of the interaction that the delivery answers."""
    path = f"/api/v10/webhooks/{credentials.application_id}/{message.answers}/messages/{id_}"
    template = "/api/v10/webhooks/{id}/{token}/messages/{id}"
    answer = await outgoing.request("PATCH", f"{origin}{path}", json=_body(message), template=template)
    return answer, _read(answer)


async def _as_bot(
    outgoing: Outgoing,
    origin: str,
    credentials: DiscordCredentials,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    file: OutboundFile | None = None,
) -> _Message:
    headers = {"authorization": f"Bot {credentials.bot_token}"}
    url = f"{origin}/api/v10/{path}"
    if file:
        fields = {"payload_json": msgspec.json.encode(body).decode()}
        header, content = multipart(fields, "files[0]", file.name, file.content_type, file.content)
        answer = await outgoing.request(method, url, headers=headers | header, content=content)
    else:
        answer = await outgoing.request(method, url, headers=headers, json=body)
    # A deletion is answered without a body.
    response = _Message() if answer.status == 204 else _read(answer)
    if answer.status == 401:
        raise AccountRefused("HTTP 401")
    if answer.status >= 400:
        raise EffectFailed(f"{response.code}: {response.message}"[:200])
    return response


def _is_admin(member: _Member | None) -> bool:
    bits = member.permissions if member else ""
    return bits.isascii() and bits.isdecimal() and len(bits) <= 30 and bool(int(bits) & _ADMINISTRATOR)


def _ack(answer: dict[str, Any]) -> Ack:
    return Ack(msgspec.json.encode(answer), "application/json")


def _strings(options: Sequence[Any] | None) -> Iterator[str]:
    """The values of string options, also those of subcommands."""
    for option in options or ():
        if isinstance(option, dict):
            if option.get("type") == _STRING_OPTION and isinstance(option.get("value"), str):
                yield option["value"]
            if isinstance(nested := option.get("options"), list):
                yield from _strings(nested)


def _read(answer: Answer) -> _Message:
    if answer.status == 429:
        try:
            asked = msgspec.json.decode(answer.body, type=_Message).retry_after
        except msgspec.DecodeError:
            asked = None
        # Rounded up, so that the next attempt is not too early.
        raise_for_transient(answer, None if asked is None else asked + 0.1)
    return read_json(answer, _Message)
