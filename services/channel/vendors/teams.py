"""Adapter for Microsoft Teams bots, by the Bot Framework's connector.

https://learn.microsoft.com/azure/bot-service/rest-api/bot-framework-rest-connector-authentication
https://learn.microsoft.com/azure/bot-service/rest-api/bot-framework-rest-connector-api-reference
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextvars import Context, copy_context
from dataclasses import replace
from datetime import datetime
from typing import Annotated, Any, ClassVar
from urllib.parse import quote, urlencode, urlsplit

import jwt
import msgspec

from infra.errors import EffectFailed, TooLarge, Transient, Unauthenticated
from infra.lanes.effects import Kind
from infra.outgoing.client import Outgoing
from infra.recent import Recent
from services.channel.vendors import teams_activities
from services.channel.vendors.base import (
    MALFORMED,
    MAX_CLOCK_DIFFERENCE,
    AccountRefused,
    Groups,
    Limit,
    Outbound,
    Preview,
    Request,
    Tokens,
    Vendor,
    at_origin,
    decode,
    download,
    raise_for_transient,
    read_json,
)
from services.channel.vendors.items import Ack, Received
from services.channel.vendors.markdown import MARKDOWN, backslashed, broken_quote, render
from services.channel.vendors.splitting import split, utf8_length

# Bytes. A message may have about 100 KB with everything around its text.
MAX_TEXT = 28_000
ISSUER = "https://api.botframework.com"
# A published key is read again after a day; for an unknown key after five minutes, so that forged ids cost nothing.
_KEYS_SECONDS = 86_400.0
_UNKNOWN_SECONDS = 300.0
# The Bot Framework's have 20 KB. Each tenant may name an address of its own.
_MAX_KEYS_BYTES = 256 * 1024
_KEPT_ADDRESSES = 256
_METADATA_PATH = "/v1/.well-known/openidconfiguration"
_TOKEN_ORIGIN = "https://login.microsoftonline.com"
_SCOPE = "https://api.botframework.com/.default"
_DEFAULT_SERVICE = "https://smba.trafficmanager.net/teams/"

# Teams shows most of Markdown, but no tables. It drops a line break alone, and tags of HTML that it does not know:
# https://learn.microsoft.com/microsoftteams/platform/bots/how-to/format-your-bot-messages
DIALECT = replace(
    MARKDOWN,
    italic=("_", "_"),
    quote=broken_quote,
    literal=lambda text: backslashed(text).replace("<", "&lt;"),
    bullet="- ",
    line="  \n",
)


# https://learn.microsoft.com/microsoftteams/platform/task-modules-and-cards/cards/universal-actions-for-adaptive-cards
_DONE = {"statusCode": 200, "type": "application/vnd.microsoft.activity.message", "value": "✓"}


class TeamsCredentials(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    app_id: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z-]{1,64}$")]
    app_password: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    tenant_id: Annotated[str, msgspec.Meta(pattern="^[0-9A-Za-z.-]{0,64}$")] = ""
    """Only messages of this tenant are accepted; empty: of every tenant."""
    openid_metadata_url: Annotated[str, msgspec.Meta(max_length=500)] = ""
    """The address of the keys' metadata; empty: the Bot Framework's."""


class _Metadata(msgspec.Struct):
    jwks_uri: str


class _Key(msgspec.Struct):
    kid: str = ""
    kty: str = ""
    n: str = ""
    e: str = ""
    endorsements: tuple[str, ...] | None = None


class _Keys(msgspec.Struct):
    keys: list[_Key]


class _Token(msgspec.Struct):
    access_token: str = ""
    expires_in: float = 3_600
    error: str = ""


class _Problem(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Sent(msgspec.Struct):
    id: str | None = None
    error: _Problem | None = None


class _Published(msgspec.Struct):
    """The keys of one metadata address, by key id."""

    keys: dict[str, _Key]
    read_at: float


class Teams(Vendor[TeamsCredentials]):
    """A call carries a token of the Bot Framework, which is verified with the keys that it publishes. The connector
    accepts no idempotency key: an unanswered send stays unknown."""

    name: ClassVar[str] = "teams"
    credentials: ClassVar[type[msgspec.Struct]] = TeamsCredentials
    kinds: ClassVar[Mapping[str, str]] = teams_activities.KINDS
    origin: ClassVar[str] = "https://login.botframework.com"
    addresses: ClassVar[tuple[str, ...]] = ("openid_metadata_url",)
    effect: ClassVar[Kind] = "once"
    groups: ClassVar[tuple[Groups, ...]] = ("all", "mentions")
    preview: ClassVar[Preview | None] = "edit"
    sign_seconds: ClassVar[int] = 3
    steps: ClassVar[tuple[str, ...]] = (
        "Create an Azure Bot; copy its app id and a client secret.",
        "Enter the webhook's public URL as messaging endpoint.",
        "Enable the channel Microsoft Teams and install the app; for receipts of reading its manifest asks for "
        "ChatMessageReadReceipt.Read.Chat.",
    )

    def __init__(self) -> None:
        self._tokens = Tokens()
        self._published: Recent[str, _Published] = Recent(_KEPT_ADDRESSES)
        self._reading: dict[str, asyncio.Task[_Published]] = {}

    def needs_keys(self, body: bytes) -> bool:
        return True

    async def keys(
        self, outgoing: Outgoing, origin: str, credentials: TeamsCredentials, request: Request
    ) -> Mapping[str, Any]:
        """The published keys by id. They are read again if the key of this call's token is not among them."""
        url = credentials.openid_metadata_url or f"{origin}{_METADATA_PATH}"
        known, now = self._published.get(url), time.monotonic()
        key_id = _header(_bearer(request)).get("kid")
        age = now - known.read_at if known else _KEYS_SECONDS
        if known and (age < _UNKNOWN_SECONDS or (age < _KEYS_SECONDS and key_id in known.keys)):
            return known.keys
        if (reading := self._reading.get(url)) is None:
            # The Bot Framework's keys are read for all tenants, and so not with the connections of this one.
            context = copy_context() if credentials.openid_metadata_url else Context()
            reading = asyncio.create_task(self._read(outgoing, origin, url), context=context)
            self._reading[url] = reading
            reading.add_done_callback(lambda _: self._reading.pop(url))
        # One for all calls of the moment. A call that goes away must not cancel it for the others.
        return (await asyncio.shield(reading)).keys

    async def _read(self, outgoing: Outgoing, origin: str, url: str) -> _Published:
        metadata = await _get(outgoing, url, _Metadata)
        jwks = metadata.jwks_uri
        if origin != self.origin:
            jwks = _at(origin, jwks)
        keys = (await _get(outgoing, jwks, _Keys)).keys
        self._published[url] = found = _Published({key.kid: key for key in keys}, time.monotonic())
        return found

    def receive(self, request: Request, credentials: TeamsCredentials, now: datetime) -> Received:
        token = _bearer(request)
        key = request.keys.get(str(_header(token).get("kid")))
        if key is None:
            raise Unauthenticated("the bearer token is signed with an unknown key")
        claims = _verified(token, key, credentials.app_id)
        activity = decode(request.body, teams_activities.Activity)
        if not activity.serviceUrl or claims.get("serviceurl", claims.get("serviceUrl")) != activity.serviceUrl:
            raise Unauthenticated("the token is for another serviceUrl")
        ack = Ack(msgspec.json.encode(_DONE), "application/json") if activity.type == "invoke" else Ack()
        return Received(teams_activities.read(activity, credentials.tenant_id), ack)

    def split(self, text: str) -> Sequence[str]:
        return split(text, MAX_TEXT, lambda part: utf8_length(render(part, DIALECT)))

    def limits(self, conversation: str) -> Sequence[Limit]:
        """https://learn.microsoft.com/microsoftteams/platform/bots/how-to/rate-limit"""
        return [Limit(f"conversation {conversation}", 7, 1), Limit(f"conversation {conversation} minute", 60, 30)]

    async def fetch(self, outgoing: Outgoing, origin: str, credentials: TeamsCredentials, ref: str, most: int) -> bytes:
        access, _, url = ref.partition(" ")
        if access == "open":
            return await download(outgoing, at_origin(self, origin, url, "sharepoint.com", "microsoft.com"), most)
        address = at_origin(self, origin, url, "trafficmanager.net", "botframework.com", "microsoft.com")
        token = await self._token(outgoing, origin, credentials)
        return await download(outgoing, address, most, {"authorization": f"Bearer {token}"})

    async def identify(self, outgoing: Outgoing, origin: str, credentials: TeamsCredentials) -> str:
        # The login is the only call that needs no conversation. Its answer does not have the bot's name.
        await self._login(outgoing, origin, credentials)
        return credentials.app_id

    async def send(
        self, outgoing: Outgoing, origin: str, credentials: TeamsCredentials, message: Outbound
    ) -> str | None:
        activity = (message.answers or "").partition(" ")[0]
        body = _text(message)
        quoted = activity if message.reply_to else ""
        if quoted:
            body["replyToId"] = quoted
        return (await self._call(outgoing, origin, credentials, "POST", message, quoted, body)).id

    async def show_typing(
        self, outgoing: Outgoing, origin: str, credentials: TeamsCredentials, message: Outbound
    ) -> None:
        await self._call(outgoing, origin, credentials, "POST", message, "", {"type": "typing"})

    async def edit(
        self, outgoing: Outgoing, origin: str, credentials: TeamsCredentials, message: Outbound, shown: str
    ) -> None:
        await self._call(outgoing, origin, credentials, "PUT", message, shown, _text(message))

    async def retract(
        self, outgoing: Outgoing, origin: str, credentials: TeamsCredentials, message: Outbound, shown: str
    ) -> None:
        await self._call(outgoing, origin, credentials, "DELETE", message, shown)

    async def _call(
        self,
        outgoing: Outgoing,
        origin: str,
        credentials: TeamsCredentials,
        method: str,
        message: Outbound,
        activity: str,
        body: dict[str, Any] | None = None,
    ) -> _Sent:
        """A call about one activity of the message's conversation, or (with an empty one) about a new one."""
        service = (message.answers or "").partition(" ")[2] or _DEFAULT_SERVICE
        if origin != self.origin:
            service = _at(origin, service)
        path = f"v3/conversations/{quote(message.conversation, safe='')}/activities"
        if activity:
            path += f"/{quote(activity, safe='')}"
        url = f"{service.removesuffix('/')}/{path}"
        for is_last in (False, True):
            token = await self._token(outgoing, origin, credentials)
            headers = {"authorization": f"Bearer {token}"}
            answer = await outgoing.request(
                method, url, headers=headers, json=body, template="/v3/conversations/{id}/activities"
            )
            if answer.status != 401:
                break
            self._tokens.drop((origin, credentials), token)
            if is_last:
                raise AccountRefused("HTTP 401")
        if answer.status == 412:
            raise Transient("HTTP 412")
        # An edit or a deletion may be answered without a body.
        sent = read_json(answer, _Sent) if answer.body or answer.status >= 400 or method == "POST" else _Sent()
        if answer.status >= 400:
            problem = sent.error or _Problem()
            raise EffectFailed(f"{problem.code or f'HTTP {answer.status}'}: {problem.message}"[:200])
        return sent

    async def _token(self, outgoing: Outgoing, origin: str, credentials: TeamsCredentials) -> str:
        return await self._tokens.get((origin, credentials), lambda: self._login(outgoing, origin, credentials))

    async def _login(self, outgoing: Outgoing, origin: str, credentials: TeamsCredentials) -> tuple[str, float]:
        host = _TOKEN_ORIGIN if origin == self.origin else origin
        form = {
            "grant_type": "client_credentials",
            "client_id": credentials.app_id,
            "client_secret": credentials.app_password,
            "scope": _SCOPE,
        }
        answer = await outgoing.request(
            "POST",
            f"{host}/{credentials.tenant_id or 'botframework.com'}/oauth2/v2.0/token",
            headers={"content-type": "application/x-www-form-urlencoded"},
            content=urlencode(form).encode(),
        )
        token = read_json(answer, _Token)
        if not token.access_token:
            raise AccountRefused(f"{token.error or f'HTTP {answer.status}'}"[:200])
        return token.access_token, token.expires_in


def _text(message: Outbound) -> dict[str, Any]:
    return {"type": "message", "text": render(message.text, DIALECT), "textFormat": "markdown"}


def _at(origin: str, url: str) -> str:
    """The URL at another origin: its path and query are kept."""
    parts = urlsplit(url)
    return f"{origin}{parts.path}{f'?{parts.query}' if parts.query else ''}"


async def _get(outgoing: Outgoing, url: str, type_: type[Any]) -> Any:
    """Raises Transient if the document cannot be read now: the vendor sends the call again."""
    try:
        answer = await outgoing.request("GET", url, max_bytes=_MAX_KEYS_BYTES)
        raise_for_transient(answer)
        return msgspec.json.decode(answer.body, type=type_)
    except (*MALFORMED, TooLarge) as error:
        raise Transient(f"the keys of the Bot Framework: {type(error).__name__}") from error


def _bearer(request: Request) -> str:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("the authorization has no bearer token")
    return token


def _header(token: str) -> dict[str, Any]:
    try:
        return jwt.get_unverified_header(token)
    except jwt.PyJWTError as error:
        raise Unauthenticated("the bearer token is malformed") from error


def _verified(token: str, key: _Key, app_id: str) -> dict[str, Any]:
    """The claims of the token. Raises Unauthenticated if any part of it does not hold."""
    try:
        claims: dict[str, Any] = jwt.decode(
            token,
            jwt.PyJWK({"kty": key.kty, "n": key.n, "e": key.e}, algorithm="RS256").key,
            algorithms=["RS256"],
            audience=app_id,
            issuer=ISSUER,
            leeway=MAX_CLOCK_DIFFERENCE,
            options={"require": ["exp", "iss", "aud"]},
        )
    except jwt.PyJWTError as error:
        raise Unauthenticated(f"the bearer token does not verify: {type(error).__name__}") from error
    if key.endorsements is not None and "msteams" not in key.endorsements:
        raise Unauthenticated("the key of the bearer token is not endorsed for Teams")
    return claims
