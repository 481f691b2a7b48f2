"""The route ``ANY /webhooks/<type>/<token>``, which vendors call: verify, parse, accept, answer.

It is a raw route, so that a call costs little more than its verification and acceptance. A call whose account is cached
runs from its last byte to the queue of `Ingest` without a task, and from the commit of its group to its answer.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Mapping, Sequence
from functools import cache, partial
from typing import Any

from opentelemetry.trace import Span
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import BaseRoute

from infra.clock import utcnow
from infra.errors import InvalidMessage, NotFound, TooLarge, Transient
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.observe.metrics import Metrics
from infra.outgoing import shares
from infra.outgoing.client import Outgoing
from infra.service.service import Runtime
from infra.web.http import METHODS
from infra.web.problems import problem
from infra.web.raw import RawRequest, RawRoute
from services.channel.accounts.store import WEBHOOK_PATH, WEBHOOKS, Accounts, ChannelAccount
from services.channel.intake.ingest import Ingest, ingest
from services.channel.vendors import VENDORS
from services.channel.vendors.base import Request, UnreadableCall
from services.channel.vendors.items import Ack, Ignored, Moved, Received

_log = get_logger("channel.webhooks")
_EMPTY = Ack()


class _Call:
    """A call that is being answered."""

    __slots__ = ("began", "headers", "method", "path", "request", "span")

    def __init__(self, request: RawRequest, began: float) -> None:
        self.began = began
        self.request = request
        self.path = request.path
        self.headers = request.headers
        self.method = method = request.method if request.method in METHODS else "_OTHER"
        self.span: Span = telemetry.start_server_span(
            f"{method} {WEBHOOK_PATH}",
            self.headers,
            {"http.request.method": method, "url.scheme": request.scheme, "http.route": WEBHOOK_PATH},
        )


class Webhooks:
    """Answers 200 once the messages are stored or known to be repeats; 401 if the call does not verify; 400 if it
    verifies but is malformed; 503 while the database is unavailable or too much waits, so that the vendor sends it
    again."""

    def __init__(
        self, accounts: Accounts, ingest: Ingest, metrics: Metrics, outgoing: Outgoing, public_url: str
    ) -> None:
        self._accounts = accounts
        self._ingest = ingest
        # By method and status.
        self._seconds = cache(lambda method, status: metrics.http_seconds.labels(method, WEBHOOK_PATH, str(status)))
        self._outgoing = outgoing
        self._public_url = public_url.rstrip("/")
        self._tasks: set[asyncio.Task[None]] = set()
        # Those that came, and those that were answered, in this turn of the event loop.
        self._came: list[tuple[RawRequest, float]] = []
        self._answered: list[tuple[_Call, int]] = []

    def __call__(self, request: RawRequest) -> None:
        if not self._came:
            asyncio.get_running_loop().call_soon(self._take)
        self._came.append((request, time.perf_counter()))

    def _take(self) -> None:
        """Takes the calls that came, step by step for all of them: that costs a third less than call by call, because
        the code of one step stays in the caches of the processor."""
        came, self._came = self._came, []
        calls = [_Call(*one) for one in came]
        known = []
        for call in calls:
            type_, _, token = call.path.removeprefix(f"{WEBHOOKS}/").partition("/")
            account = self._accounts.cached(type_, token)
            if account and not account.vendor.needs_keys(call.request.body):
                known.append((call, account))
            else:
                task = asyncio.create_task(self._look_up(call, type_, token))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        received = [(call, account, self._received(call, account)) for call, account in known]
        for one in received:
            self._accept(*one)

    async def _look_up(self, call: _Call, type_: str, token: str) -> None:
        """Reads the account, and the vendor's keys, and goes on."""
        with telemetry.current(call.span):
            try:
                account = await self._accounts.by_token(type_, token)
                if account is None:
                    raise NotFound("no channel has this webhook path")
                shares.work_for(account.tenant_id)
                request = self._request(call, account)
                vendor = account.vendor
                keys = (
                    await vendor.keys(self._outgoing, account.origin, account.credentials, request)
                    if vendor.needs_keys(request.body)
                    else {}
                )
            except Exception as error:
                self._refuse(call, error)
                return
        self._accept(call, account, self._received(call, account, keys))

    def _received(self, call: _Call, account: ChannelAccount, keys: Mapping[str, Any] = {}) -> Received | None:
        """Verifies and parses the call. Returns None if it was refused."""
        try:
            request = self._request(call, account)
            return account.receive(request._replace(keys=keys) if keys else request, utcnow())
        except InvalidMessage as error:
            self._refuse(call, HTTPException(400, str(error)))
        except (UnreadableCall, RecursionError) as error:
            # RecursionError: parts within parts, a thousand deep.
            with telemetry.current(call.span):
                _log.warning(
                    "webhook event ignored: unexpected shape",
                    tenant=account.tenant_id,
                    channel_id=str(account.id),
                    error=str(error),
                )
            digest = hashlib.sha256(call.request.body).hexdigest()
            return Received([Ignored((f"body/{digest}",), f"unexpected shape: {error}"[:200])])
        except Exception as error:
            self._refuse(call, error)
        return None

    def _accept(self, call: _Call, account: ChannelAccount, received: Received | None) -> None:
        if received is None:
            return
        if account.vendor.needs_identity(call.request.body):
            self._accounts.refresh_identity(account, self._outgoing)
        if not received.items:
            self._answer(call, received.ack)
            return
        try:
            traceparent, size = telemetry.traceparent(call.span), len(call.request.body)
            accepted = self._ingest.accept(account, received.items, traceparent, size)
        except Exception as error:
            self._refuse(call, error)
            return
        if any(isinstance(item, Moved) for item in received.items):
            # Its routes have changed.
            accepted.add_done_callback(lambda _: self._accounts.forget(account.id))
        accepted.add_done_callback(partial(self._end, call, received.ack))

    def _request(self, call: _Call, account: ChannelAccount) -> Request:
        """Raises TooLarge if the vendor sends no such bodies."""
        request = call.request
        body = request.body
        if len(body) > account.vendor.max_body:
            raise TooLarge(f"body: must have at most {account.vendor.max_body} bytes")
        query = request.query
        url = f"{self._public_url}{call.path}{f'?{query}' if query else ''}"
        return Request(request.method, query, call.headers, body, url, identity=account.identity)

    def _end(self, call: _Call, ack: Ack, accepted: asyncio.Future[None]) -> None:
        """The items are committed, or they are not."""
        try:
            accepted.result()
        except asyncio.CancelledError:
            self._refuse(call, Transient("this process stops"))
        except Exception as error:
            self._refuse(call, error)
        else:
            self._answer(call, ack)

    def _answer(self, call: _Call, ack: Ack) -> None:
        response = None if ack == _EMPTY else Response(ack.body, ack.status, media_type=ack.media_type)
        self._finish(call, response, ack.status)

    def _refuse(self, call: _Call, error: Exception) -> None:
        with telemetry.current(call.span):
            response = problem(error)
            status = response.status_code
            if status >= 500:
                telemetry.fail(call.span, error)
                _log.error("request failed", method=call.method, path=WEBHOOK_PATH, status=status, exc_info=error)
            _log.info("webhook call refused", method=call.method, path=WEBHOOK_PATH, status=status)
        self._finish(call, response, status)

    def _finish(self, call: _Call, response: Response | None, status: int) -> None:
        call.request.answer(response)
        if not self._answered:
            asyncio.get_running_loop().call_soon(self._record)
        self._answered.append((call, status))

    def _record(self) -> None:
        """Ends the spans of the answered calls, and counts the calls."""
        answered, self._answered = self._answered, []
        ended = time.perf_counter()
        for call, status in answered:
            call.span.set_attribute("http.response.status_code", status)
            call.span.end()
        for call, status in answered:
            self._seconds(call.method, status).observe(ended - call.began)


def route(webhooks: Webhooks) -> RawRoute:
    return RawRoute(WEBHOOKS, webhooks, max_body=max(vendor.max_body for vendor in VENDORS.values()))


def routes(runtime: Runtime, accounts: Accounts) -> Sequence[BaseRoute]:
    settings = runtime.settings
    return [route(Webhooks(accounts, ingest(runtime), runtime.metrics, runtime.outgoing, settings.public_url))]
