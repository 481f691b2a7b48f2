"""Adapter for Telegram bots: https://core.telegram.org/bots/api

See setWebhook, Update, sendMessage, ResponseParameters and the section on HTML style there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from html import escape
from typing import Annotated, Any, ClassVar, TypeVar
from urllib.parse import quote
from zlib import crc32

import msgspec

from infra.errors import EffectFailed, Unanswered, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Answer, Outgoing
from services.channel.vendors import telegram_kinds, telegram_updates
from services.channel.vendors.base import (
    MALFORMED,
    MAX_FILE,
    AccountRefused,
    Groups,
    Limit,
    Outbound,
    OutboundFile,
    Preview,
    Request,
    Vendor,
    constant_time_equals,
    download,
    from_json,
    raise_for_transient,
)
from services.channel.vendors.items import Received
from services.channel.vendors.markdown import PLAIN, Dialect, render
from services.channel.vendors.multipart import multipart
from services.channel.vendors.splitting import split, utf16_length

T = TypeVar("T")
# The types that are shown as photos. All other files are documents.
_PHOTOS = ("image/jpeg", "image/png", "image/webp")
# UTF-16 units.
MAX_TEXT = 4096
_NO_PHOTO = re.compile("PHOTO_|IMAGE_PROCESS_FAILED")
# An answer is sent again at most this often with something corrected: chat, topic, markup.
_CORRECTIONS = 3


def _tag(name: str) -> tuple[str, str]:
    return f"<{name}>", f"</{name}>"


def _fence(text: str, language: str) -> str:
    if not language:
        return f"<pre>{text}</pre>"
    return f'<pre><code class="language-{escape(language)}">{text}</code></pre>'


def _quote(text: str) -> str:
    # A quotation in a quotation is not allowed.
    return f"<blockquote>{text.replace('<blockquote>', '').replace('</blockquote>', '')}</blockquote>"


HTML = Dialect(
    bold=_tag("b"),
    italic=_tag("i"),
    strike=_tag("s"),
    code=_tag("code"),
    fence=_fence,
    quote=_quote,
    link=lambda label, url: f'<a href="{escape(url)}">{label}</a>',
    escape=lambda text: escape(text, quote=False),
)


class TelegramCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    bot_token: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9:_-]{1,256}$")]
    """``<bot id>:<secret>`` from BotFather. The pattern keeps it one part of a path."""
    secret_token: Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9_-]{1,256}$")]
    """The ``secret_token`` that was passed to setWebhook."""


class _Parameters(msgspec.Struct, frozen=True):
    retry_after: float | None = None
    migrate_to_chat_id: int | None = None


class _Sent(msgspec.Struct):
    message_id: int


class _Path(msgspec.Struct):
    file_path: str


class _Bot(msgspec.Struct):
    username: str


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
    kinds: ClassVar[Mapping[str, str]] = telegram_kinds.KINDS
    origin: ClassVar[str] = "https://api.telegram.org"
    addresses: ClassVar[tuple[str, ...]] = ()
    effect: ClassVar[Kind] = "once"
    groups: ClassVar[tuple[Groups, ...]] = ("all", "mentions", "replies")
    files: ClassVar[Mapping[str, int]] = {"": MAX_FILE}
    preview: ClassVar[Preview | None] = "draft"
    sign_seconds: ClassVar[int] = 5
    steps: ClassVar[tuple[str, ...]] = (
        "Create a bot with BotFather and copy its token into bot_token.",
        "Choose a secret_token of letters, digits, _ and -.",
        "Call setWebhook with the webhook's public URL and the same secret_token.",
    )

    def needs_identity(self, body: bytes) -> bool:
        """Only a mention and a command name a bot, and updates do not have the bot's own name."""
        return b'"mention"' in body or b'"bot_command"' in body

    def receive(self, request: Request, credentials: TelegramCredentials, now: datetime) -> Received:
        given = request.headers.get("x-telegram-bot-api-secret-token", "")
        if not constant_time_equals(given, credentials.secret_token):
            raise Unauthenticated("X-Telegram-Bot-Api-Secret-Token is not this channel's secret_token")
        bot = telegram_updates.Bot(credentials.bot_token.partition(":")[0], request.identity)
        return telegram_updates.read(request.body, bot)

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT, lambda part: utf16_length(render(part, HTML)))

    def limits(self, conversation: str) -> Sequence[Limit]:
        """https://core.telegram.org/bots/faq#my-bot-is-hitting-limits-how-do-i-avoid-this"""
        chat = conversation.partition("/")[0]
        # Groups have negative ids.
        group = [Limit(f"group {chat}", 20, 60)] if chat.startswith("-") else []
        return [Limit("bot", 30, 1), Limit(f"chat {chat}", 1, 1), *group]

    async def identify(self, outgoing: Outgoing, origin: str, credentials: TelegramCredentials) -> str:
        return f"@{_result(await _call(outgoing, origin, credentials, 'getMe', {}), _Bot).username}"

    async def fetch(
        self, outgoing: Outgoing, origin: str, credentials: TelegramCredentials, ref: str, most: int
    ) -> bytes:
        """Telegram gives a bot files of up to 20 MB."""
        response = await _call(outgoing, origin, credentials, "getFile", {"file_id": ref})
        url = f"{origin}/file/bot{credentials.bot_token}/{quote(_result(response, _Path).file_path)}"
        return await download(outgoing, url, most, template="/file/bot{token}/{path}")

    async def register(self, outgoing: Outgoing, origin: str, credentials: TelegramCredentials, url: str) -> bool:
        body = {"url": url, "secret_token": credentials.secret_token, "allowed_updates": telegram_updates.ASKED}
        await _call(outgoing, origin, credentials, "setWebhook", body)
        return True

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: TelegramCredentials, message: Outbound
    ) -> str | None:
        if message.file:
            return _id(await _send_file(outgoing, origin, credentials, message, message.file))
        body = _place(message) | _marked(message.text)
        if message.reply_to is not None and _is_number(message.reply_to):
            # The message may have been deleted meanwhile; the reply is sent anyway.
            body["reply_parameters"] = {"message_id": int(message.reply_to), "allow_sending_without_reply": True}
        url = f"{origin}/bot{credentials.bot_token}/sendMessage"
        for _ in range(_CORRECTIONS):
            response = _read(await outgoing.request("POST", url, json=body, template="/bot{token}/sendMessage"))
            if response.ok or not _correct(body, message.text, response):
                break
        return _id(response)

    async def show_typing(
        self, outgoing: Outgoing, origin: str, credentials: TelegramCredentials, message: Outbound
    ) -> None:
        await _call(outgoing, origin, credentials, "sendChatAction", _place(message) | {"action": "typing"})

    async def draft(self, outgoing: Outgoing, origin: str, credentials: TelegramCredentials, message: Outbound) -> None:
        """Telegram shows a draft for half a minute, or until the bot's message comes. Only private chats show it."""
        if message.conversation.startswith("-") or "business_connection_id" in _place(message):
            raise EffectFailed("only a private chat with the bot shows drafts")
        id_ = crc32(message.key.encode()) % 2**31 or 1
        body = _place(message) | {"draft_id": id_, **_marked(message.text)}
        await _call(outgoing, origin, credentials, "sendMessageDraft", body)


def _place(message: Outbound) -> dict[str, Any]:
    chat, _, topic = message.conversation.partition("/")
    number, at, connection = chat.partition("@")
    if (direct := topic.removeprefix("direct-")) != topic and _is_number(direct):
        return {"chat_id": _chat_id(chat), "direct_messages_topic_id": int(direct)}
    if not _is_number(topic or "0"):
        raise EffectFailed("the conversation is not a topic of Telegram")
    if number and at:
        return {"chat_id": _chat_id(number), "business_connection_id": connection}
    return {"chat_id": _chat_id(chat), **({"message_thread_id": int(topic)} if topic else {})}


def _id(response: _Response) -> str | None:
    """The id of the message that was sent. Raises EffectFailed if it was refused."""
    if not response.ok:
        raise EffectFailed(response.description[:200])
    try:
        return str(from_json(response.result, _Sent).message_id)
    except MALFORMED:
        return None


async def _send_file(
    outgoing: Outgoing, origin: str, credentials: TelegramCredentials, message: Outbound, file: OutboundFile
) -> _Response:
    body = _place(message)
    field = "photo" if file.content_type in _PHOTOS else "document"
    for _ in range(_CORRECTIONS):
        method = f"send{field.title()}"
        fields = {name: str(value) for name, value in body.items()}
        headers, content = multipart(fields, field, file.name, file.content_type, file.content)
        answer = await outgoing.request(
            "POST",
            f"{origin}/bot{credentials.bot_token}/{method}",
            headers=headers,
            content=content,
            template=f"/bot{{token}}/{method}",
        )
        response = _read(answer)
        if not response.ok and field == "photo" and _NO_PHOTO.search(response.description):
            # Such as one that is too long and narrow.
            field = "document"
        elif response.ok or not _correct(body, "", response):
            break
    return response


async def _call(
    outgoing: Outgoing, origin: str, credentials: TelegramCredentials, method: str, body: dict[str, Any]
) -> _Response:
    url = f"{origin}/bot{credentials.bot_token}/{method}"
    response = _read(await outgoing.request("POST", url, json=body, template=f"/bot{{token}}/{method}"))
    if not response.ok:
        raise EffectFailed(response.description[:200])
    return response


def _marked(text: str) -> dict[str, str]:
    """The text as HTML, or as it is if it has no marks."""
    marked = render(text, HTML)
    if marked == escape(text, quote=False):
        return {"text": text}
    return {"text": marked, "parse_mode": "HTML"}


def _correct(body: dict[str, Any], text: str, response: _Response) -> bool:
    """Corrects the request if Telegram refused it for a reason other than its content. Nothing was sent."""
    description = response.description.lower()
    if (chat := response.parameters.migrate_to_chat_id) is not None and body["chat_id"] != chat:
        # The group became a supergroup. Its new id works at once; the ids of topics and messages do not.
        body["chat_id"] = chat
        body.pop("reply_parameters", None)
        body.pop("message_thread_id", None)
        return True
    if "message_thread_id" in body and ("thread not found" in description or "topic" in description):
        # The topic was closed or deleted. The person finds the answer in the group.
        del body["message_thread_id"]
        return True
    if "parse_mode" in body and "parse entities" in description:
        del body["parse_mode"]
        body["text"] = render(text, PLAIN)
        return True
    return False


def _chat_id(chat: str) -> int | str:
    return int(chat) if _is_number(chat.removeprefix("-")) else chat


def _is_number(text: str) -> bool:
    """True for an id. Longer numbers are none, and Python refuses very long ones."""
    return text.isascii() and text.isdecimal() and len(text) < 20


def _result(response: _Response, type_: type[T]) -> T:
    try:
        return from_json(response.result, type_)
    except MALFORMED as error:
        raise EffectFailed("the answer is not Telegram's") from error


def _read(answer: Answer) -> _Response:
    """Parses the answer to one message. Raises if it is about the account or about all messages."""
    try:
        response = from_json(answer.body, _Response)
    except MALFORMED:
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
