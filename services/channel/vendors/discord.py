"""Adapter for Discord apps, by interactions over HTTP.

https://discord.com/developers/docs/interactions/overview, https://discord.com/developers/docs/resources/webhook,
https://discord.com/developers/docs/resources/message, https://discord.com/developers/docs/topics/rate-limits
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Annotated, Any, ClassVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from infra.errors import EffectFailed, RetryLater, Transient, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Answer, Outgoing
from services.channel.vendors import discord_interactions
from services.channel.vendors.base import (
    DEFAULT_RETRY,
    MALFORMED,
    MAX_FILE,
    AccountRefused,
    Limit,
    Outbound,
    OutboundFile,
    Preview,
    Request,
    Vendor,
    at_origin,
    download,
    from_json,
    is_recent,
    raise_for_transient,
    read_json,
)
from services.channel.vendors.discord_interactions import FILE_OPTION, STRING_OPTION
from services.channel.vendors.items import Received
from services.channel.vendors.markdown import MARKDOWN, backslashed, render
from services.channel.vendors.multipart import multipart
from services.channel.vendors.splitting import split

# Characters.
MAX_TEXT = 2_000
_NONCE_LENGTH = 25
# The command that people use.
_ASK = {
    "name": "ask",
    "description": "Ask the assistant",
    "options": [
        {"type": STRING_OPTION, "name": "question", "description": "The question", "required": True},
        {"type": FILE_OPTION, "name": "file", "description": "A file for the question", "required": False},
    ],
}
# The token of the interaction is no longer valid: unknown webhook, invalid webhook token, unknown message.
_EXPIRED = (10008, 10015, 50027)

# The bot is not in the channel, or may not write or send files there: missing access, missing permissions.
_NO_ACCESS = ("50001: ", "50013: ")

# https://discord.com/developers/docs/topics/opcodes-and-status-codes#json: the account is unauthorized, or has to be
# verified; limits of one channel or resource; a feature that is off for a while, an overloaded resource.
_ACCOUNT = frozenset((40001, 40002))
_LATER = frozenset((20016, 20022, 20028, 20029, 40062))
_TRANSIENT = frozenset((40006, 130000))

# Discord shows Markdown itself, but no tables and no images.
DIALECT = replace(
    MARKDOWN,
    link=lambda label, url: url if label == url else f"[{label}]({url})",
    # Discord hides a text between two of them.
    literal=lambda text: backslashed(text).replace("||", r"\|\|"),
)


class DiscordCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    application_id: Annotated[str, msgspec.Meta(pattern="^[0-9]{1,32}$")]
    public_key: Annotated[str, msgspec.Meta(pattern="^[0-9a-fA-F]{64}$")]
    bot_token: Annotated[str, msgspec.Meta(pattern="^[!-~]{1,256}$")]


class _Message(msgspec.Struct):
    id: str | None = None
    code: int = 0
    message: str = ""
    retry_after: float | None = None
    username: str = ""


class Discord(Vendor[DiscordCredentials]):
    """The text is the string option of a command. It is answered at once with "is thinking"; the reply replaces that.

    Further parts, and replies after the fifteen minutes of the interaction, are messages of the bot with a nonce. In a
    channel that the bot has no access to, further parts are follow-ups of the interaction.
    """

    name: ClassVar[str] = "discord"
    credentials: ClassVar[type[msgspec.Struct]] = DiscordCredentials
    kinds: ClassVar[Mapping[str, str]] = discord_interactions.KINDS
    origin: ClassVar[str] = "https://discord.com"
    addresses: ClassVar[tuple[str, ...]] = ()
    # The first part replaces the same message again; the others carry a nonce.
    effect: ClassVar[Kind] = "keyed"
    # "The past few minutes": https://docs.discord.com/developers/resources/message#create-message
    key_known: ClassVar[timedelta | None] = timedelta(minutes=2)
    files: ClassVar[Mapping[str, int]] = {"": MAX_FILE}
    preview: ClassVar[Preview | None] = "edit"
    steps: ClassVar[tuple[str, ...]] = (
        "Create an application; copy its id, its public key and the token of its bot.",
        "Register a command with one string option, and enter the webhook's public URL as Interactions Endpoint URL.",
        "Add the app to the server with the scopes applications.commands and bot, and the permissions View Channels, "
        "Send Messages, Send Messages in Threads and Attach Files.",
    )

    def effect_of(self, message: Outbound) -> Kind:
        """A follow-up has no nonce."""
        return "once" if message.follows_up else self.effect

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
        return discord_interactions.read(request.body)

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
        if message.follows_up:
            answer, response = await _by_token(outgoing, origin, credentials, message, "POST", "", _body(message))
            return _accepted(answer, response).id
        if message.part == 1 and message.answers:
            path = "/messages/@original"
            answer, response = await _by_token(outgoing, origin, credentials, message, "PATCH", path, _body(message))
            if not _is_over(answer, response):
                return _accepted(answer, response).id
        nonce = hashlib.sha256(message.key.encode()).hexdigest()[:_NONCE_LENGTH]
        body = _body(message) | {"nonce": nonce, "enforce_nonce": True}
        path = f"channels/{message.conversation}/messages"
        return (await _as_bot(outgoing, origin, credentials, "POST", path, body, message.file)).id

    async def edit(
        self, outgoing: Outgoing, origin: str, credentials: DiscordCredentials, message: Outbound, shown: str
    ) -> None:
        """An interaction can change its own messages only, for fifteen minutes."""
        path = f"/messages/{shown}"
        _accepted(*await _by_token(outgoing, origin, credentials, message, "PATCH", path, _body(message)))

    async def retract(
        self, outgoing: Outgoing, origin: str, credentials: DiscordCredentials, message: Outbound, shown: str
    ) -> None:
        """By the interaction, which needs no access to the channel, or by the bot."""
        if message.answers:
            answer, response = await _by_token(outgoing, origin, credentials, message, "DELETE", f"/messages/{shown}")
            if not _is_over(answer, response):
                _accepted(answer, response)
                return
        path = f"channels/{message.conversation}/messages/{shown}"
        await _as_bot(outgoing, origin, credentials, "DELETE", path)

    def otherwise(self, message: Outbound, reason: str) -> Outbound | None:
        if message.part == 1 or not message.answers or not reason.startswith(_NO_ACCESS):
            return None
        return message._replace(key=f"{message.key}/follow-up", follows_up=True)


def _body(message: Outbound) -> dict[str, Any]:
    # Without allowed_mentions, @everyone in an answer would notify everybody.
    text = "" if message.file else render(message.text, DIALECT)
    return {"content": text, "allowed_mentions": {"parse": []}}


async def _by_token(
    outgoing: Outgoing,
    origin: str,
    credentials: DiscordCredentials,
    message: Outbound,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
) -> tuple[Answer, _Message]:
    """Sends, edits or deletes a message of the interaction that the delivery answers."""
    url = f"{origin}/api/v10/webhooks/{credentials.application_id}/{message.answers}{path}"
    template = "/api/v10/webhooks/{id}/{token}" + ("/messages/{id}" if path else "")
    return await _request(outgoing, method, url, {}, body, None if path else message.file, template)


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
    answer, response = await _request(outgoing, method, f"{origin}/api/v10/{path}", headers, body, file)
    if answer.status == 401:
        raise AccountRefused("HTTP 401")
    return _accepted(answer, response)


async def _request(
    outgoing: Outgoing,
    method: str,
    url: str,
    headers: dict[str, str],
    body: dict[str, Any] | None,
    file: OutboundFile | None = None,
    template: str | None = None,
) -> tuple[Answer, _Message]:
    if file:
        fields = {"payload_json": msgspec.json.encode(body).decode()}
        header, content = multipart(fields, "files[0]", file.name, file.content_type, file.content)
        answer = await outgoing.request(method, url, headers=headers | header, content=content, template=template)
    else:
        answer = await outgoing.request(method, url, headers=headers, json=body, template=template)
    # A deletion is answered without a body.
    return answer, _Message() if answer.status == 204 else _read(answer)


def _is_over(answer: Answer, response: _Message) -> bool:
    """True if the interaction can no longer change the message."""
    return response.code in _EXPIRED or answer.status == 404


def _accepted(answer: Answer, response: _Message) -> _Message:
    """Raises EffectFailed if the message was refused."""
    if answer.status >= 400:
        raise EffectFailed(f"{response.code}: {response.message}"[:200])
    return response


def _read(answer: Answer) -> _Message:
    if answer.status == 429:
        try:
            asked = from_json(answer.body, _Message).retry_after
        except MALFORMED:
            asked = None
        # Rounded up, so that the next attempt is not too early.
        raise_for_transient(answer, None if asked is None else asked + 0.1)
    response = read_json(answer, _Message)
    if answer.status >= 400:
        _refuse(response)
    return response


def _refuse(response: _Message) -> None:
    """Raises for the codes that say nothing about the message itself."""
    reason = f"{response.code}: {response.message}"[:200]
    if response.code in _ACCOUNT:
        raise AccountRefused(reason)
    if response.code in _LATER:
        raise RetryLater(DEFAULT_RETRY, reason)
    if response.code in _TRANSIENT:
        raise Transient(reason)
