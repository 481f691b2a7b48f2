"""The client of the agent's HTTP routes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from itertools import chain, repeat
from ssl import SSLContext
from urllib.parse import quote
from uuid import UUID

import httpx
import msgspec
from opentelemetry.trace import SpanKind, StatusCode

from infra.errors import NotFound, Transient
from infra.observe import telemetry
from infra.observe.logs import get_logger
from infra.outgoing.shares import Shares
from infra.security.auth import IDENTITY_HEADER, Identities, Identity
from infra.web.clients import service_client
from services.ws_gateway.domain import Fact
from services.ws_gateway.protocol import Message

TIMEOUT_SECONDS = 10.0
# After a gap in the tail all streams read at the same time. One tenant's get at most a half of them.
CONCURRENT_READS = 50
# As many connections as the HTTP client has. Requests of a tenant that wait in agent would keep all of them.
CONCURRENT_CALLS = 100

_RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0)
_log = get_logger("ws_gateway.agent")

Read = Callable[[int], Awaitable[list[Fact]]]
"""Reads a run's facts after an n. Raises NotFound, Transient."""


async def read_until_available(read: Read, after: int) -> list[Fact]:
    """The run's facts after an n. Retries until the agent answers. Raises NotFound."""
    for pause in chain(_RETRY_SECONDS, repeat(_RETRY_SECONDS[-1])):
        try:
            return await read(after)
        except Transient as error:
            _log.warning(f"could not read a run's facts; will retry in {pause:g} s", error=str(error))
            await asyncio.sleep(pause)
    raise AssertionError("unreachable: the loop has no end")


class _Facts(msgspec.Struct):
    items: list[Fact]


class _Accepted(msgspec.Struct):
    run_id: UUID


def accepted_run(answer: httpx.Response) -> UUID:
    """The run that will answer an accepted message."""
    return msgspec.json.decode(answer.content, type=_Accepted).run_id


class AgentRefused(Exception):
    """The agent answered with a problem. `body` is the problem as JSON."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"agent: HTTP {status}")
        self.status = status
        self.body = body


class Agent:
    """`url` is the agent's base URL. `tls`: for ``https``."""

    def __init__(self, url: str, identities: Identities, tls: SSLContext | None = None) -> None:
        self._identities = identities
        self._http = service_client("agent", url, tls, TIMEOUT_SECONDS)
        self._reading = Shares(CONCURRENT_READS)
        self._calling = Shares(CONCURRENT_CALLS)

    async def facts(self, run_id: UUID, after: int, who: Identity) -> list[Fact]:
        """The run's facts with an n above `after`, in order. Raises NotFound, also for another tenant's run, and
        Transient."""
        async with self._reading.place(who.tenant_id):
            answer = await self.ask(
                who, "GET", f"/internal/runs/{run_id}/events?after={after}", "/internal/runs/{run_id}/events"
            )
        if answer.status_code == 404:
            raise NotFound(f"run {run_id}: does not exist")
        if answer.status_code != 200:
            raise Transient(f"agent: HTTP {answer.status_code}")
        return msgspec.json.decode(answer.content, type=_Facts).items

    async def ask(
        self,
        who: Identity,
        method: str,
        path: str,
        template: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        """The agent's answer to a request in the client's name. `protos.calls` gives the scope of each request.
        `template` is the path's template for traces. Raises Transient."""
        # Not the client's own token: it is for this service only and lasts one minute, and a stream may last longer.
        token = self._identities.on_behalf(who, "agent")
        try:
            await asyncio.wait_for(self._calling.take(who.tenant_id), TIMEOUT_SECONDS)
        except TimeoutError:
            raise Transient("agent: the tenant has too many requests under way") from None
        try:
            return await self._ask(method, path, template, {**(headers or {}), IDENTITY_HEADER: token}, body)
        finally:
            self._calling.give(who.tenant_id)

    async def post_message(self, who: Identity, path: str, headers: Mapping[str, str], body: bytes) -> httpx.Response:
        """Forwards a posted message unchanged. Raises Transient."""
        template = "/api/v1/agents/{agent_id}/sessions/{key}/messages"
        return await self.ask(who, "POST", path, template, body=body, headers=headers)

    async def write(self, message: Message, who: Identity) -> UUID:
        """Sends a message to an agent. Returns the run that will answer. Raises AgentRefused and Transient."""
        # Dots are escaped too: two dots would lead to the parent path.
        session = quote(message.session, safe="").replace(".", "%2E")
        path = f"/api/v1/agents/{message.agent_id}/sessions/{session}/messages"
        template = "/api/v1/agents/{agent_id}/sessions/{key}/messages"
        body = msgspec.json.encode({"text": message.text, "idempotency_key": message.idempotency_key})
        headers = {"content-type": "application/json"}
        return accepted_run(_accepted(await self.ask(who, "POST", path, template, body=body, headers=headers)))

    async def cancel(self, run_id: UUID, who: Identity) -> None:
        """Requests the cancellation of a run. Raises AgentRefused and Transient."""
        template = "/api/v1/runs/{run_id}/cancel"
        _accepted(await self.ask(who, "POST", f"/api/v1/runs/{run_id}/cancel", template))

    async def _ask(
        self, method: str, path: str, template: str, headers: Mapping[str, str], body: bytes
    ) -> httpx.Response:
        attributes: dict[str, telemetry.Value] = {"http.request.method": method, "url.template": template}
        with telemetry.span(f"{method} {template}", SpanKind.CLIENT, attributes=attributes) as span:
            try:
                # As the client has sent them: the agent refuses a wrong one, and names it.
                sent = httpx.Headers({**headers, **telemetry.carrier()}, encoding="latin-1")
                answer = await self._http.request(method, path, headers=sent, content=body)
            except httpx.TransportError as error:
                raise Transient(f"agent: {type(error).__name__}") from error
            span.set_attribute("http.response.status_code", answer.status_code)
            if answer.status_code >= 400:
                span.set_attribute("error.type", str(answer.status_code))
                span.set_status(StatusCode.ERROR)
            return answer


def _accepted(answer: httpx.Response) -> httpx.Response:
    if answer.status_code == 202:
        return answer
    if "json" not in answer.headers.get("content-type", ""):
        # The answer of a proxy, or of the agent's HTTP server.
        raise Transient(f"agent: HTTP {answer.status_code}")
    raise AgentRefused(answer.status_code, answer.content)
