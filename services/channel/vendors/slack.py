"""Adapter for Slack apps: Events API and chat.postMessage.

https://docs.slack.dev/authentication/verifying-requests-from-slack, https://docs.slack.dev/apis/events-api,
https://docs.slack.dev/reference/methods/chat.postMessage, https://docs.slack.dev/apis/web-api/rate-limits
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence, Set
from datetime import datetime
from typing import Annotated, Any, ClassVar
from urllib.parse import urlencode

import msgspec

from infra.errors import EffectFailed, RetryLater, Transient, Unanswered, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Answer, Outgoing
from services.channel.vendors import slack_events, slack_forms, slack_kinds
from services.channel.vendors.base import (
    DEFAULT_RETRY,
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
    at_origin,
    constant_time_equals,
    decode,
    download,
    from_json,
    is_recent,
    raise_for_transient,
)
from services.channel.vendors.items import Ack, Ignored, Received
from services.channel.vendors.markdown import Dialect, fenced, quoted_lines, render
from services.channel.vendors.splitting import split

# Characters. Slack truncates at 40,000 and recommends at most this many.
MAX_TEXT = 4_000
# https://docs.slack.dev/reference/methods/chat.postMessage#errors
_ACCOUNT = frozenset(
    (
        "team_access_not_granted",
        "two_factor_setup_required",
        "invalid_auth",
        "not_authed",
        "account_inactive",
        "token_revoked",
        "token_expired",
        "org_login_required",
        "ekm_access_denied",
    )
)
# About the method that was called. Without the methods for files, an account still sends texts.
_METHOD = frozenset(
    (
        "accesslimited",
        "deprecated_endpoint",
        "enterprise_is_restricted",
        "method_deprecated",
        "missing_scope",
        "not_allowed_token_type",
    )
)
_LATER = frozenset(("ratelimited", "rate_limited", "message_limit_exceeded"))
_TRANSIENT = frozenset(("service_unavailable", "request_timeout", "team_added_to_org"))
# "It's possible some aspect of the operation succeeded before the error was raised." Slack documents no key.
_UNKNOWN = frozenset(("internal_error", "fatal_error"))


class SlackCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    signing_secret: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    bot_token: Annotated[str, msgspec.Meta(pattern="^[!-~]{1,256}$")]
    """``xoxb-…``. The pattern allows only characters that a header may have."""


class _Response(msgspec.Struct):
    ok: bool
    ts: str | None = None
    error: str = ""
    user: str = ""
    team: str = ""
    upload_url: str = ""
    file_id: str = ""
    file: slack_events.SlackFile | None = None


class Slack(Vendor[SlackCredentials]):
    """Slack accepts no idempotency key: an unanswered send stays unknown."""

    name: ClassVar[str] = "slack"
    credentials: ClassVar[type[msgspec.Struct]] = SlackCredentials
    kinds: ClassVar[Mapping[str, str]] = slack_kinds.KINDS
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
        "Enable Event Subscriptions with the webhook's public URL, and subscribe to message.im and app_mention; for "
        "reactions also to reaction_added and reaction_removed, with the scope reactions:read. In private channels "
        "also to channel_id_changed, with the scope groups:read: a shared channel gets another id.",
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
            return Received([slack_forms.read(request.body)])
        payload = decode(request.body, slack_events.Payload)
        if payload.type == "url_verification":
            return Received([], Ack((payload.challenge or "").encode()))
        if payload.type != "event_callback":
            return Received([Ignored(unnamed, f"of type {payload.type[:40]}")])
        return Received([slack_events.event(payload)])

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT, lambda part: len(render(part, MRKDWN)))

    def limits(self, conversation: str) -> Sequence[Limit]:
        return [Limit(f"channel {conversation.partition('/')[0]}", 1, 1)]

    async def fetch(self, outgoing: Outgoing, origin: str, credentials: SlackCredentials, ref: str, most: int) -> bytes:
        """The bot needs the scope files:read; without it Slack answers with its login page."""
        if ref.startswith(slack_events.BY_ID):
            about = {"file": ref.removeprefix(slack_events.BY_ID)}
            found = (await _form(outgoing, origin, credentials, "files.info", about)).file
            ref = (found and found.url_private) or ""
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
    """The methods for files take forms. Raises as `_read`, and EffectFailed if the bot may not use the method."""
    headers = {
        "authorization": f"Bearer {credentials.bot_token}",
        "content-type": "application/x-www-form-urlencoded",
    }
    body = urlencode(fields).encode()
    answer = await outgoing.request("POST", f"{origin}/api/{method}", headers=headers, content=body)
    return _read(answer, account=_ACCOUNT)


async def _call(
    outgoing: Outgoing, origin: str, credentials: SlackCredentials, method: str, body: dict[str, str]
) -> _Response:
    headers = {"authorization": f"Bearer {credentials.bot_token}"}
    answer = await outgoing.request("POST", f"{origin}/api/{method}", headers=headers, json=body)
    return _read(answer)


def sign(credentials: SlackCredentials, timestamp: str, body: bytes) -> str:
    base = b"v0:" + timestamp.encode() + b":" + body
    return "v0=" + hmac.new(credentials.signing_secret.encode(), base, hashlib.sha256).hexdigest()


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
    joint="\u200b",
)


def _read(answer: Answer, *, account: Set[str] = _ACCOUNT | _METHOD) -> _Response:
    """account: the errors that are about the account."""
    raise_for_transient(answer)
    if answer.status >= 400:
        raise EffectFailed(f"HTTP {answer.status}")
    try:
        response = from_json(answer.body, _Response)
    except MALFORMED as error:
        raise Unanswered(f"HTTP {answer.status} with a malformed body") from error
    if response.ok:
        return response
    if response.error in account:
        raise AccountRefused(response.error)
    if response.error in _LATER:
        raise RetryLater(DEFAULT_RETRY, response.error)
    if response.error in _TRANSIENT:
        raise Transient(response.error)
    if response.error in _UNKNOWN:
        raise Unanswered(response.error)
    raise EffectFailed(response.error[:200])
