"""The route ``ANY /webhooks/<type>/<token>``, which vendors call.

It stands in front of the framework, so that a call costs little more than its verification and acceptance.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence

from opentelemetry.trace import SpanKind
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute
from starlette.types import Receive, Scope, Send

from infra.clock import utcnow
from infra.errors import InvalidMessage, NotFound, TooLarge
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.outgoing.client import Outgoing
from infra.service.service import Runtime
from infra.web.http import METHODS, RawRoute
from infra.web.problems import problem
from services.channel.accounts import Accounts
from services.channel.ingest import Ingest, ingest
from services.channel.vendors.base import Ack, Ignored, Received, Request, Unreadable

PREFIX = "/webhooks"
PATH = PREFIX + "/{type}/{token}"

_log = get_logger("channel.webhooks")
_EMPTY = Ack()


class _Disconnected(Exception):
    """The vendor closed the connection before its call was complete."""


class Webhooks:
    """Answers 200 once the messages are stored or known to be repeats; 401 if the call does not verify; 400 if it
    verifies but is malformed; 503 while the database is unavailable, so that the vendor sends it again."""

    def __init__(
        self, accounts: Accounts, ingest: Ingest, metrics: Metrics, outgoing: Outgoing, public_url: str
    ) -> None:
        self._accounts = accounts
        self._ingest = ingest
        self._metrics = metrics
        self._outgoing = outgoing
        self._public_url = public_url.rstrip("/")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.perf_counter()
        method = scope["method"] if scope["method"] in METHODS else "_OTHER"
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        attributes = {"http.request.method": method, "url.scheme": scope["scheme"], "http.route": PATH}
        parent = telemetry.extract(headers) if "traceparent" in headers else None
        with telemetry.span(f"{method} {PATH}", SpanKind.SERVER, parent=parent, attributes=attributes) as span:
            try:
                ack = await self._answer(scope, headers, receive)
                response = None if ack == _EMPTY else Response(ack.body, ack.status, media_type=ack.media_type)
                status = ack.status
            except _Disconnected:
                return
            except Exception as error:
                response = problem(error)
                status = response.status_code
                if status >= 500:
                    telemetry.fail(span, error)
                    _log.error("request failed", method=method, path=PATH, status=status, exc_info=True)
            span.set_attribute("http.response.status_code", status)
            if status >= 400:
                _log.info("webhook call refused", method=method, path=PATH, status=status)
        if response is None:
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})
        else:
            await response(scope, receive, send)
        self._metrics.http_seconds.labels(method, PATH, str(status)).observe(time.perf_counter() - began)

    async def _answer(self, scope: Scope, headers: dict[str, str], receive: Receive) -> Ack:
        type_, _, token = scope["path"].removeprefix(f"{PREFIX}/").partition("/")
        account = await self._accounts.by_token(type_, token)
        if account is None:
            raise NotFound("no channel has this webhook path")
        body = await _body(headers, receive, account.vendor.max_body)
        query = scope["query_string"].decode("latin-1")
        url = f"{self._public_url}{scope['path']}{f'?{query}' if query else ''}"
        request = Request(scope["method"], query, headers, body, url)
        keys = await account.vendor.keys(self._outgoing, account.origin, account.credentials, request)
        request = request._replace(keys=keys)
        try:
            received = account.receive(request, utcnow())
        except InvalidMessage as error:
            raise HTTPException(400, str(error)) from error
        except Unreadable as error:
            _log.warning("webhook event ignored: unexpected shape", channel_id=str(account.id), error=str(error))
            digest = hashlib.sha256(request.body).hexdigest()
            received = Received([Ignored((f"body/{digest}",), f"unexpected shape: {error}"[:200])])
        if received.items:
            await self._ingest.accept(account, received.items)
        return received.ack


def routes(runtime: Runtime, accounts: Accounts) -> Sequence[BaseRoute]:
    return [
        RawRoute(
            PREFIX, Webhooks(accounts, ingest(runtime), runtime.metrics, runtime.outgoing, runtime.settings.public_url)
        )
    ]


async def _body(headers: dict[str, str], receive: Receive, most: int) -> bytes:
    """Raises TooLarge, if the length is declared before anything is read."""
    if int(headers.get("content-length", 0)) > most:
        raise _too_large(most)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body"):
        body: bytes = message.get("body", b"")
        return body
    parts = []
    length = 0
    while True:
        if message["type"] == "http.disconnect":
            raise _Disconnected
        part = message.get("body", b"")
        length += len(part)
        if length > most:
            raise _too_large(most)
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)
        message = await receive()


def _too_large(most: int) -> TooLarge:
    return TooLarge(f"body: must have at most {most} bytes")
