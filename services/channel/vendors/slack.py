"""Adapter for Slack apps: Events API and chat.postMessage.

https://docs.slack.dev/authentication/verifying-requests-from-slack, https://docs.slack.dev/apis/events-api,
https://docs.slack.dev/reference/methods/chat.postMessage, https://docs.slack.dev/apis/web-api/rate-limits
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, ClassVar
from urllib.parse import parse_qsl, urlencode

import msgspec

from infra.errors import EffectFailed, RetryLater, Transient, Unanswered, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Answer, Outgoing
from services.channel.events import Attachment
from services.channel.vendors.base import (
    DEFAULT_RETRY,
    MAX_FILE,
    AccountRefused,
    Ack,
    Groups,
    Ignored,
    Inbound,
    Limit,
    Outbound,
    OutboundFile,
    Preview,
    Received,
    Request,
    Vendor,
    at_origin,
    constant_time_equals,
    decode,
    download,
    is_recent,
    kind_of,
    placeholder,
    raise_for_transient,
)
from services.channel.vendors.markdown import Dialect, fenced, quoted_lines, render
from services.channel.vendors.splitting import split

# Characters. Slack truncates at 40,000 and recommends at most this many.
MAX_TEXT = 4_000
# The subtypes of a message that a person wrote. Others report changes to a message or a channel.
_SPOKEN = (None, "file_share", "thread_broadcast", "me_message")
_ACCOUNT = frozenset(
    (
        "invalid_auth",
        "not_authed",
        "account_inactive",
        "token_revoked",
        "token_expired",
        "no_permission",
        "missing_scope",
        "org_login_required",
        "ekm_access_denied",
        "not_allowed_token_type",
    )
)
_TRANSIENT = frozenset(("internal_error", "fatal_error", "service_unavailable", "request_timeout"))


class SlackCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    signing_secret: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    bot_token: Annotated[str, msgspec.Meta(pattern="^[!-~]{1,256}$")]
    """``xoxb-…``, sent as a header, hence the pattern."""


class _Authorization(msgspec.Struct):
    user_id: str | None = None
    is_bot: bool = False


class _Payload(msgspec.Struct):
    type: str
    challenge: str | None = None
    team_id: str | None = None
    event_id: str | None = None
    event: msgspec.Raw = msgspec.Raw(b"{}")
    authorizations: list[_Authorization] | None = None


class _Kind(msgspec.Struct):
    type: str = ""
    subtype: str | None = None
    bot_id: str | None = None
    user: str | msgspec.Raw | None = None


class _File(msgspec.Struct):
    name: str | None = None
    title: str | None = None
    mimetype: str | None = None
    url_private: str | None = None


class _Attachment(msgspec.Struct):
    """A forwarded message, or a preview."""

    text: str | None = None
    fallback: str | None = None


class _Event(msgspec.Struct):
    """A message event. In `text`, ``& < >`` are entities."""

    channel: str
    ts: str
    user: str
    text: str | None = None
    thread_ts: str | None = None
    channel_type: str | None = None
    parent_user_id: str | None = None
    """Who began the thread."""
    files: list[_File] | None = None
    attachments: list[_Attachment] | None = None
    blocks: list[Any] | None = None


class _Named(msgspec.Struct):
    id: str


class _Label(msgspec.Struct):
    text: str = ""


class _Action(msgspec.Struct):
    action_id: str = ""
    action_ts: str = ""
    value: str | None = None
    text: _Label | None = None


class _Pressed(msgspec.Struct):
    """The message with the button."""

    ts: str = ""
    thread_ts: str | None = None


class _Press(msgspec.Struct):
    """An interaction, as the form's field ``payload``."""

    type: str
    user: _Named | None = None
    channel: _Named | None = None
    message: _Pressed | None = None
    actions: list[_Action] | None = None


class _Response(msgspec.Struct):
    ok: bool
    ts: str | None = None
    error: str = ""
    user: str = ""
    team: str = ""
    upload_url: str = ""
    file_id: str = ""


class Slack(Vendor[SlackCredentials]):
    """Slack accepts no idempotency key: an unanswered send stays unknown."""

    name: ClassVar[str] = "slack"
    credentials: ClassVar[type[msgspec.Struct]] = SlackCredentials
    origin: ClassVar[str] = "https://slack.com"
    addresses: ClassVar[tuple[str, ...]] = ()
    effect: ClassVar[Kind] = "once"
    groups: ClassVar[tuple[Groups, ...]] = ("all", "mentions", "replies")
    files: ClassVar[Mapping[str, int]] = {"": MAX_FILE}
    preview: ClassVar[Preview | None] = "edit"
    # chat.update may be called about fifty times a minute.
    preview_seconds: ClassVar[int] = 2
    steps: ClassVar[tuple[str, ...]] = (
        "Create an app; copy the Signing Secret and the bot token (xoxb-…).",
        "Give the bot the scopes chat:write, im:history, app_mentions:read, files:read and files:write; install it.",
        "Enable Event Subscriptions with the webhook's public URL, and subscribe to message.im and app_mention.",
    )

    def receive(self, request: Request, credentials: SlackCredentials, now: datetime) -> Received:
        timestamp = request.headers.get("x-slack-request-timestamp", "")
        if not is_recent(timestamp, now):
            raise Unauthenticated("X-Slack-Request-Timestamp is missing or more than 5 minutes from our clock")
        if not constant_time_equals(
            request.headers.get("x-slack-signature", ""), sign(credentials, timestamp, request.body)
        ):
            raise Unauthenticated("X-Slack-Signature does not match")
        unnamed = (f"body/{hashlib.sha256(request.body).hexdigest()}",)
        if request.headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            return Received([_pressed(request.body) or Ignored(unnamed, "a command or an interaction")])
        payload = decode(request.body, _Payload)
        if payload.type == "url_verification":
            return Received([], Ack((payload.challenge or "").encode()))
        if payload.type != "event_callback":
            return Received([Ignored(unnamed, f"of type {payload.type[:40]}")])
        return Received([_event(payload)])

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT, lambda part: len(render(part, MRKDWN)))

    def limits(self, conversation: str) -> Sequence[Limit]:
        return [Limit(f"channel {conversation.partition('/')[0]}", 1, 1)]

    async def fetch(self, outgoing: Outgoing, origin: str, credentials: SlackCredentials, ref: str, most: int) -> bytes:
        """The bot needs the scope files:read; without it Slack answers with its login page."""
        url = at_origin(self, origin, ref, "slack.com")
        content = await download(outgoing, url, most, {"authorization": f"Bearer {credentials.bot_token}"})
        if content.lstrip()[:15].lower() == b"<!doctype html>" and not ref.endswith((".html", ".htm")):
            raise EffectFailed("the bot lacks the scope files:read")
        return content

    async def identify(self, outgoing: Outgoing, origin: str, credentials: SlackCredentials) -> str:
        answer = await outgoing.request(
            "POST", f"{origin}/api/auth.test", headers={"authorization": f"Bearer {credentials.bot_token}"}
        )
        response = _read(answer)
        return f"{response.user} in {response.team}"

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: SlackCredentials, message: Outbound
    ) -> str | None:
        channel, _, thread = message.conversation.partition("/")
        if message.file:
            await _share(self, outgoing, origin, credentials, message.file, channel, thread)
            return None
        body = {"channel": channel, "text": render(message.text, MRKDWN)}
        if thread:
            body["thread_ts"] = thread
        return (await _call(outgoing, origin, credentials, "chat.postMessage", body)).ts

    async def edit(
        self, outgoing: Outgoing, origin: str, credentials: SlackCredentials, message: Outbound, shown: str
    ) -> None:
        channel = message.conversation.partition("/")[0]
        body = {"channel": channel, "ts": shown, "text": render(message.text, MRKDWN)}
        await _call(outgoing, origin, credentials, "chat.update", body)

    async def retract(
        self, outgoing: Outgoing, origin: str, credentials: SlackCredentials, message: Outbound, shown: str
    ) -> None:
        channel = message.conversation.partition("/")[0]
        await _call(outgoing, origin, credentials, "chat.delete", {"channel": channel, "ts": shown})


async def _share(
    vendor: Slack,
    outgoing: Outgoing,
    origin: str,
    credentials: SlackCredentials,
    file: OutboundFile,
    channel: str,
    thread: str,
) -> None:
    """https://docs.slack.dev/messaging/working-with-files#upload. No person sees the file before the last call."""
    try:
        given = {"filename": file.name, "length": len(file.content)}
        place = await _form(outgoing, origin, credentials, "files.getUploadURLExternal", given)
        url = at_origin(vendor, origin, place.upload_url, "slack.com")
        answer = await outgoing.request("POST", url, content=file.content, template="/upload/{ticket}")
        raise_for_transient(answer)
    except Unanswered as error:
        raise Transient(str(error)) from error
    if answer.status != 200:
        raise EffectFailed(f"the upload was refused: HTTP {answer.status}")
    files = msgspec.json.encode([{"id": place.file_id, "title": file.name}]).decode()
    shared = {"files": files, "channel_id": channel, **({"thread_ts": thread} if thread else {})}
    await _form(outgoing, origin, credentials, "files.completeUploadExternal", shared)


async def _form(
    outgoing: Outgoing, origin: str, credentials: SlackCredentials, method: str, fields: dict[str, Any]
) -> _Response:
    """The methods for files take forms."""
    headers = {
        "authorization": f"Bearer {credentials.bot_token}",
        "content-type": "application/x-www-form-urlencoded",
    }
    body = urlencode(fields).encode()
    return _read(await outgoing.request("POST", f"{origin}/api/{method}", headers=headers, content=body))


async def _call(
    outgoing: Outgoing, origin: str, credentials: SlackCredentials, method: str, body: dict[str, str]
) -> _Response:
    headers = {"authorization": f"Bearer {credentials.bot_token}"}
    answer = await outgoing.request("POST", f"{origin}/api/{method}", headers=headers, json=body)
    return _read(answer)


def sign(credentials: SlackCredentials, timestamp: str, body: bytes) -> str:
    base = b"v0:" + timestamp.encode() + b":" + body
    return "v0=" + hmac.new(credentials.signing_secret.encode(), base, hashlib.sha256).hexdigest()


def _pressed(body: bytes) -> Inbound | None:
    """The button that was pressed, as a message with its value; None for any other command or interaction."""
    given = dict(parse_qsl(body.decode("utf-8", "replace"))).get("payload")
    if given is None:
        return None
    press = decode(given.encode(), _Press)
    if press.type != "block_actions" or not press.actions or not press.user or not press.channel:
        return None
    action, message = press.actions[0], press.message or _Pressed()
    thread = f"/{message.thread_ts}" if message.thread_ts else ""
    return Inbound(
        (f"action/{press.channel.id}/{press.user.id}/{action.action_ts}",),
        f"{press.channel.id}{thread}",
        press.user.id,
        message.ts,
        action.value or (action.text.text if action.text else "") or action.action_id,
        press.channel.id if thread else None,
        in_group=not press.channel.id.startswith("D"),
        mentions_bot=True,
        replies_to_bot=True,
    )


def _event(payload: _Payload) -> Inbound | Ignored:
    kind = decode(payload.event, _Kind)
    ids = (f"event/{payload.event_id}",)
    if kind.type not in ("message", "app_mention"):
        return Ignored(ids, f"an event {kind.type[:40]}")
    if kind.bot_id is not None or kind.subtype == "bot_message":
        return Ignored(ids, "a bot's message")
    if kind.subtype not in _SPOKEN:
        return Ignored(ids, f"a message of subtype {str(kind.subtype)[:40]}")
    if not kind.user:
        return Ignored(ids, "a message without an author")
    event = decode(payload.event, _Event)
    bots = {bot.user_id for bot in payload.authorizations or () if bot.is_bot and bot.user_id}
    if event.user in bots:
        return Ignored(ids, "a bot's message")
    thread = f"/{event.thread_ts}" if event.thread_ts else ""
    return Inbound(
        # A mention in a channel arrives as two events, app_mention and message, with one text.
        ids=(*ids, f"message/{payload.team_id}/{event.channel}/{event.ts}"),
        conversation=f"{event.channel}{thread}",
        person=event.user,
        message=event.ts,
        text=_text(event).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"),
        # A thread begins with a message of the channel, or with the bot's answer there.
        parent=event.channel if thread else None,
        attachments=_attachments(event),
        # An app_mention does not tell the type of its channel. The id of a direct message begins with D.
        in_group=event.channel_type != "im" and not event.channel.startswith("D"),
        mentions_bot=kind.type == "app_mention" or any(f"<@{bot}>" in (event.text or "") for bot in bots),
        replies_to_bot=event.parent_user_id in bots,
    )


def _text(event: _Event) -> str:
    """The text of the message. It may stand in attachments or blocks instead, or there are only files."""
    if event.text and event.text.strip():
        return event.text
    quoted = [attachment.text or attachment.fallback or "" for attachment in event.attachments or ()]
    if text := "\n".join(filter(None, quoted)) or "".join(_block_texts(event.blocks)).strip():
        return text
    if event.files and not _attachments(event):
        return placeholder("a file", *(file.name or file.title or "" for file in event.files))
    return ""


def _attachments(event: _Event) -> tuple[Attachment, ...]:
    return tuple(
        Attachment(kind_of(file.mimetype or ""), file.url_private, file.name or file.title or "")
        for file in event.files or ()
        if file.url_private
    )


def _block_texts(node: Any) -> Iterator[str]:
    """The texts in blocks, in their order."""
    if isinstance(node, list):
        for child in node:
            yield from _block_texts(child)
    elif isinstance(node, dict):
        if isinstance(text := node.get("text"), str):
            yield text
        else:
            yield from _block_texts(text)
        yield from _block_texts(node.get("elements"))
        yield "\n" if node.get("type") in ("section", "rich_text_section", "header") else ""


def _link(label: str, url: str) -> str:
    url = _escape(url).replace("|", "%7C")
    return f"<{url}>" if label in (url, _escape(url)) else f"<{url}|{label}>"


def _escape(text: str) -> str:
    """Escapes the text so that nothing in it is a mention or a link: ``<!channel>`` would notify everybody."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# https://docs.slack.dev/messaging/formatting-message-text
MRKDWN = Dialect(
    bold=("*", "*"),
    italic=("_", "_"),
    strike=("~", "~"),
    code=("`", "`"),
    fence=fenced,
    quote=quoted_lines,
    link=_link,
    escape=_escape,
)


def _read(answer: Answer) -> _Response:
    raise_for_transient(answer)
    if answer.status >= 400:
        raise EffectFailed(f"HTTP {answer.status}")
    try:
        response = msgspec.json.decode(answer.body, type=_Response)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Unanswered(f"HTTP {answer.status} with a malformed body") from error
    if response.ok:
        return response
    if response.error in _ACCOUNT:
        raise AccountRefused(response.error)
    if response.error == "ratelimited":
        raise RetryLater(DEFAULT_RETRY, response.error)
    if response.error in _TRANSIENT:
        raise Transient(response.error)
    raise EffectFailed(response.error[:200])
