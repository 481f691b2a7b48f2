"""Adapter for DingTalk robots in HTTP mode: https://open.dingtalk.com/document/orgapp/receive-message"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, ClassVar
from urllib.parse import urlsplit

import msgspec

from infra.errors import EffectFailed, RetryLater, Transient, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Outgoing
from services.channel.vendors import dingtalk_messages
from services.channel.vendors.base import (
    DEFAULT_RETRY,
    AccountRefused,
    Limit,
    Outbound,
    Request,
    Tokens,
    Vendor,
    at_origin,
    constant_time_equals,
    download,
    read_json,
)
from services.channel.vendors.items import Ack, Received
from services.channel.vendors.markdown import MARKDOWN, broken_quote, render
from services.channel.vendors.splitting import split

# Bytes, as JSON.
MAX_TEXT = 15_000
# The signature's time is in milliseconds and valid for an hour.
_VALID_MS = 3_600_000
_API_ORIGIN = "https://api.dingtalk.com"
_TITLE = "Reply"
_LATER = frozenset((130101, 130102, 410100, 88, 90018))
_TRANSIENT = frozenset((-1,))
# The session of the webhook is over or unknown.
_EXPIRED = frozenset((300001, 310000, 310001, 400101, 400102, 400106))

# Of Markdown, DingTalk names headings, quotations, bold and italic text, links, images and lists; no tables, no struck
# text. Its programs show code too. They read HTML, also in code, and take a line break alone for a space:
# https://open.dingtalk.com/document/orgapp/robot-message-types-and-data-format
DIALECT = replace(
    MARKDOWN,
    strike=("", ""),
    quote=broken_quote,
    image=lambda label, url: f"![{label}]({url})",
    escape=lambda text: text.replace("<", "&lt;"),
    heading=("### ", ""),
    bullet="- ",
    line="  \n",
)


class DingTalkCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    app_key: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
    app_secret: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    robot_code: Annotated[str, msgspec.Meta(min_length=1, max_length=128)]


class _Token(msgspec.Struct):
    accessToken: str = ""
    expireIn: float = 7_200
    code: str = ""
    message: str = ""


class _Response(msgspec.Struct):
    errcode: int = 0
    errmsg: str = ""


class _Download(msgspec.Struct):
    downloadUrl: str = ""
    code: str = ""
    message: str = ""


class _Sent(msgspec.Struct):
    processQueryKey: str | None = None
    invalidStaffIdList: list[str] | None = None
    """The person, if DingTalk does not know the id. The status of this and the next two is 200."""
    filteredStaffIdList: list[str] | None = None
    """The person, if the robot may not write to them."""
    flowControlledStaffIdList: list[str] | None = None
    """The person, if a limit is used up."""
    code: str = ""
    message: str = ""


class DingTalk(Vendor[DingTalkCredentials]):
    """The signature does not cover the body; the secret in the webhook's path makes up for that. DingTalk accepts no
    idempotency key: an unanswered send stays unknown."""

    name: ClassVar[str] = "dingtalk"
    credentials: ClassVar[type[msgspec.Struct]] = DingTalkCredentials
    kinds: ClassVar[Mapping[str, str]] = dingtalk_messages.KINDS
    origin: ClassVar[str] = "https://oapi.dingtalk.com"
    addresses: ClassVar[tuple[str, ...]] = ()
    effect: ClassVar[Kind] = "once"
    steps: ClassVar[tuple[str, ...]] = (
        "Create an app with a robot in HTTP mode; copy the app key, the app secret and the robot code.",
        "Enter the webhook's public URL as message receiving URL.",
        "For buttons of your own cards, register the same URL as card callback, with the app secret as its API secret.",
    )

    def __init__(self) -> None:
        self._tokens = Tokens()

    def receive(self, request: Request, credentials: DingTalkCredentials, now: datetime) -> Received:
        is_card = "x-ddpaas-signature" in request.headers
        timestamp = request.headers.get("x-ddpaas-signature-timestamp" if is_card else "timestamp", "")
        digits = timestamp.isascii() and timestamp.isdecimal() and len(timestamp) <= 15
        if not digits or abs(now.timestamp() * 1_000 - int(timestamp)) > _VALID_MS:
            raise Unauthenticated("timestamp is missing or more than an hour from our clock")
        if is_card:
            # The API secret of the callback is the app secret.
            proof = _hmac(credentials, timestamp)
            if not constant_time_equals(request.headers["x-ddpaas-signature"], proof):
                raise Unauthenticated("x-ddpaas-signature does not match")
            return Received([dingtalk_messages.read_card(request.body, timestamp)], Ack(b"{}", "application/json"))
        if not constant_time_equals(request.headers.get("sign", ""), sign(credentials, timestamp)):
            raise Unauthenticated("sign does not match")
        return Received([dingtalk_messages.read(request.body, credentials.robot_code)])

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT, lambda part: len(msgspec.json.encode(render(part, DIALECT))))

    def limits(self, conversation: str) -> Sequence[Limit]:
        """https://open.dingtalk.com/document/orgapp/robot-message-types-and-data-format"""
        return [Limit(f"conversation {conversation}", 20, 60)]

    async def fetch(
        self, outgoing: Outgoing, origin: str, credentials: DingTalkCredentials, ref: str, most: int
    ) -> bytes:
        token = await self._token(outgoing, origin, credentials)
        answer = await outgoing.request(
            "POST",
            f"{self._api(origin)}/v1.0/robot/messageFiles/download",
            headers={"x-acs-dingtalk-access-token": token},
            json={"downloadCode": ref, "robotCode": credentials.robot_code},
        )
        found = read_json(answer, _Download)
        if not found.downloadUrl:
            raise EffectFailed(f"{found.code}: {found.message}"[:200])
        return await download(
            outgoing, at_origin(self, origin, found.downloadUrl, "dingtalk.com", "aliyuncs.com"), most
        )

    async def identify(self, outgoing: Outgoing, origin: str, credentials: DingTalkCredentials) -> str:
        # The login is the only call that needs no conversation. Its answer does not have the robot's name.
        await self._login(outgoing, origin, credentials)
        return credentials.robot_code

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: DingTalkCredentials, message: Outbound
    ) -> str | None:
        if message.answers and message.answers.startswith("/"):
            # Only path and query of the session's webhook are kept, so it cannot lead to another host.
            body = {"msgtype": "markdown", "markdown": {"title": _TITLE, "text": render(message.text, DIALECT)}}
            answer = await outgoing.request(
                "POST", f"{origin}{message.answers}", json=body, template=urlsplit(message.answers).path
            )
            response = read_json(answer, _Response)
            if not response.errcode:
                if answer.status >= 400:
                    raise EffectFailed(f"HTTP {answer.status}")
                return None
            if response.errcode not in _EXPIRED:
                _refuse(response.errcode, response.errmsg)
        return await self._send_proactively(outgoing, origin, credentials, message)

    async def _send_proactively(
        self, outgoing: Outgoing, origin: str, credentials: DingTalkCredentials, message: Outbound
    ) -> str | None:
        host = self._api(origin)
        kind, _, id_ = message.conversation.partition("/")
        body: dict[str, Any] = {
            "robotCode": credentials.robot_code,
            "msgKey": "sampleMarkdown",
            "msgParam": msgspec.json.encode({"title": _TITLE, "text": render(message.text, DIALECT)}).decode(),
        }
        if kind == "user":
            path, body["userIds"] = "/v1.0/robot/oToMessages/batchSend", [id_]
        else:
            path, body["openConversationId"] = "/v1.0/robot/groupMessages/send", id_
        for is_last in (False, True):
            token = await self._token(outgoing, origin, credentials)
            answer = await outgoing.request(
                "POST", f"{host}{path}", headers={"x-acs-dingtalk-access-token": token}, json=body
            )
            sent = read_json(answer, _Sent)
            if answer.status == 401 or sent.code == "InvalidAuthentication":
                self._tokens.drop((origin, credentials), token)
                if is_last:
                    raise AccountRefused(f"{sent.code}: {sent.message}"[:200])
                continue
            break
        # First: a limit of calls is Forbidden.AccessDenied.QpsLimitForApi.
        if "Throttling" in sent.code or "QpsLimit" in sent.code:
            raise RetryLater(DEFAULT_RETRY, sent.code[:200])
        if sent.code.startswith("Forbidden.AccessDenied"):
            raise AccountRefused(f"{sent.code}: {sent.message}"[:200])
        if answer.status >= 400:
            raise EffectFailed(f"{sent.code}: {sent.message}"[:200])
        if sent.invalidStaffIdList or sent.filteredStaffIdList:
            raise EffectFailed("the robot cannot write to this person")
        if sent.flowControlledStaffIdList:
            raise RetryLater(DEFAULT_RETRY, "a limit of messages to this person")
        return sent.processQueryKey

    def _api(self, origin: str) -> str:
        return _API_ORIGIN if origin == self.origin else origin

    async def _token(self, outgoing: Outgoing, origin: str, credentials: DingTalkCredentials) -> str:
        return await self._tokens.get((origin, credentials), lambda: self._login(outgoing, origin, credentials))

    async def _login(self, outgoing: Outgoing, origin: str, credentials: DingTalkCredentials) -> tuple[str, float]:
        secret = {"appKey": credentials.app_key, "appSecret": credentials.app_secret}
        answer = await outgoing.request("POST", f"{self._api(origin)}/v1.0/oauth2/accessToken", json=secret)
        token = read_json(answer, _Token)
        if not token.accessToken:
            raise AccountRefused(f"{token.code}: {token.message}"[:200])
        return token.accessToken, token.expireIn


def sign(credentials: DingTalkCredentials, timestamp: str) -> str:
    return _hmac(credentials, f"{timestamp}\n{credentials.app_secret}")


def _hmac(credentials: DingTalkCredentials, text: str) -> str:
    return base64.b64encode(hmac.digest(credentials.app_secret.encode(), text.encode(), hashlib.sha256)).decode()


def _refuse(code: int, message: str) -> None:
    reason = f"{code}: {message}"[:200]
    if code in _LATER:
        raise RetryLater(DEFAULT_RETRY, reason)
    if code in _TRANSIENT:
        raise Transient(reason)
    raise EffectFailed(reason)
