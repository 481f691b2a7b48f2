"""Adapter for Telegram bots: https://core.telegram.org/bots/api

See setWebhook, Update, sendMessage and ResponseParameters there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Annotated, ClassVar

import msgspec

from infra.errors import EffectFailed, Unanswered, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Answer, Outgoing
from infra.web.http import decode_json
from services.channel.vendors.base import (
    AccountRefused,
    Ignored,
    Inbound,
    Limit,
    Outbound,
    Received,
    Request,
    Vendor,
    constant_time_equals,
    raise_for_transient,
)
from services.channel.vendors.splitting import split, utf16_length

_TEMPLATE = "/bot{token}/sendMessage"
# UTF-16 units.
MAX_TEXT = 4096


class TelegramCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bot_token: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9:_-]{1,256}$")]
    """``<bot id>:<secret>`` from BotFather. It is part of the path of each call, hence the pattern."""
    secret_token: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_-]{1,256}$")]
    """The ``secret_token`` that was passed to setWebhook."""


class _User(msgspec.Struct):
    id: int
    is_bot: bool = False


class _Chat(msgspec.Struct):
    id: int


class _Message(msgspec.Struct):
    message_id: int
    chat: _Chat
    from_: _User | None = msgspec.field(name="from", default=None)
    text: str | None = None
    message_thread_id: int | None = None
    is_topic_message: bool = False


class _Update(msgspec.Struct):
    update_id: int
    message: _Message | None = None


class _Parameters(msgspec.Struct, frozen=True):
    retry_after: float | None = None
    migrate_to_chat_id: int | None = None


class _Sent(msgspec.Struct):
    message_id: int


class _Response(msgspec.Struct):
    """`error_code` repeats the HTTP status. `result` stays raw: `ok` alone says that the message was accepted."""

    ok: bool
    error_code: int | None = None
    description: str = ""
    parameters: _Parameters = _Parameters()
    result: msgspec.Raw = msgspec.Raw(b"null")


class Telegram(Vendor[TelegramCredentials]):
    """Updates carry a shared token and no signature. Telegram accepts no idempotency key: an unanswered send stays
    unknown."""

    name: ClassVar[str] = "telegram"
    credentials: ClassVar[type[msgspec.Struct]] = TelegramCredentials
    origin: ClassVar[str] = "https://api.telegram.org"
    addresses: ClassVar[tuple[str, ...]] = ()
    effect: ClassVar[Kind] = "once"

    def receive(self, request: Request, credentials: TelegramCredentials, now: datetime) -> Received:
        given = request.headers.get("x-telegram-bot-api-secret-token", "")
        if not constant_time_equals(given, credentials.secret_token):
            raise Unauthenticated("X-Telegram-Bot-Api-Secret-Token is not this channel's secret_token")
        update = decode_json(request.body, _Update)
        ids = (f"update/{update.update_id}",)
        message = update.message
        if message is None:
            return Received([Ignored(ids, "not a message")])
        if message.from_ is None or message.from_.is_bot:
            return Received([Ignored(ids, "a bot's message")])
        if message.text is None:
            return Received([Ignored(ids, "a message without text")])
        topic = f"/{message.message_thread_id}" if message.is_topic_message else ""
        return Received(
            [
                Inbound(
                    ids=ids,
                    conversation=f"{message.chat.id}{topic}",
                    person=str(message.from_.id),
                    message=str(message.message_id),
                    text=message.text,
                )
            ]
        )

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT, utf16_length)

    def limits(self, conversation: str) -> Sequence[Limit]:
        """https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this"""
        chat = conversation.partition("/")[0]
        # Groups have negative ids.
        group = [Limit(f"group {chat}", 20, 60)] if chat.startswith("-") else []
        return [Limit("bot", 30, 1), Limit(f"chat {chat}", 1, 1), *group]

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: TelegramCredentials, message: Outbound
    ) -> str | None:
        chat, _, topic = message.conversation.partition("/")
        # No parse_mode: the text is shown as it is, even if it contains markup.
        body: dict[str, object] = {"chat_id": _chat_id(chat), "text": message.text}
        if topic:
            body["message_thread_id"] = int(topic)
        if message.reply_to is not None and message.reply_to.isdecimal():
            # The message may have been deleted meanwhile; the reply is sent anyway.
            body["reply_parameters"] = {"message_id": int(message.reply_to), "allow_sending_without_reply": True}
        url = f"{origin}/bot{credentials.bot_token}/sendMessage"
        response = _read(await outgoing.request("POST", url, json=body, template=_TEMPLATE))
        if response.parameters.migrate_to_chat_id is not None:
            # The group became a supergroup and nothing was sent. Its new id is used at once.
            body["chat_id"] = response.parameters.migrate_to_chat_id
            body.pop("reply_parameters", None)
            response = _read(await outgoing.request("POST", url, json=body, template=_TEMPLATE))
        if not response.ok:
            raise EffectFailed(response.description[:200])
        try:
            return str(msgspec.json.decode(response.result, type=_Sent).message_id)
        except msgspec.DecodeError:
            return None


def _chat_id(chat: str) -> int | str:
    return int(chat) if chat.removeprefix("-").isdecimal() else chat


def _read(answer: Answer) -> _Response:
    """Parses the answer to one message. Raises if it is about the account or about all messages."""
    try:
        response = msgspec.json.decode(answer.body, type=_Response)
    except (msgspec.DecodeError, UnicodeDecodeError):
        # The body is not Telegram's: only the status counts, and 200 alone does not prove that it was accepted.
        raise_for_transient(answer)
        if answer.status < 400:
            raise Unanswered(f"HTTP {answer.status} with a malformed body") from None
        response = _Response(ok=False, description=f"HTTP {answer.status}")
    status = answer.status if response.ok or response.error_code is None else response.error_code
    raise_for_transient(replace(answer, status=status), response.parameters.retry_after)
    if status in (401, 404):
        # 404: the token never existed.
        raise AccountRefused(f"HTTP {status}")
    return response
