"""Tests of a real nginx in front of stand-ins of the services: authentication, routes, limits and headers."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import psutil
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.web.server import serve_http
from protos.catalog import SERVICES
from tooling.cli.rolling_restart import _reload_gateway
from tooling.stack.engines import nginx
from tooling.stack.engines.base import EngineError, Place, Secrets
from tooling.stack.engines.nginx import LOCAL_LIMITS, Limits
from tooling.stack.home import Home
from tooling.stack.supervisor import Supervisor
from tooling.testing.gateway import running_gateway
from tooling.testing.stack import free_port

KEY = "claw_good"
WAIT_SECONDS = 20.0
METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]


class StandIns:
    """Each service answers with the request that it received. The user service accepts the keys in `keys`."""

    def __init__(self) -> None:
        self.keys = {KEY}
        self.asked: Counter[str] = Counter()
        self.auth_headers: list[dict[str, str]] = []
        self.more = asyncio.Event()
        self.body_begun = asyncio.Event()
        self.ports: dict[str, int] = {}

    def app(self, name: str) -> Starlette:
        async def echo(request: Request) -> Response:
            size = 0
            async for chunk in request.stream():
                size += len(chunk)
                self.body_begun.set()
            if request.query_params.get("answer") == "503":
                return JSONResponse({"from": name}, 503, {"Retry-After": "7"})
            return JSONResponse(
                {
                    "service": name,
                    "path": request.url.path,
                    "query": request.url.query,
                    "headers": dict(request.headers),
                    "bytes": size,
                },
                200 if request.query_params.get("answer") is None else 404,
            )

        async def auth(request: Request) -> Response:
            key = request.headers.get("authorization", "").removeprefix("Bearer ")
            self.asked[key] += 1
            self.auth_headers.append(dict(request.headers))
            if key in self.keys:
                service = request.headers["x-claw-service"]
                return Response(headers={"X-Claw-Identity": f"identity of {key} for {service}"})
            return Response("{}", 401, {"WWW-Authenticate": "Bearer"}, media_type="application/problem+json")

        return Starlette(routes=[Route("/internal/auth", auth), Route("/{path:path}", echo, methods=METHODS)])

    async def stream(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The ws gateway: one connection; a WebSocket that echoes bytes, or two events with a pause. The body of
        ``/v1/body`` is counted, and ``/v1/away`` gets no answer."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        if head.startswith("POST /v1/body"):
            [size] = [
                line.partition(" ")[2] for line in head.splitlines() if line.lower().startswith("content-length:")
            ]
            await reader.readexactly(int(size))
            body = json.dumps({"bytes": int(size)})
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode())
        elif head.startswith("POST /v1/away"):
            pass
        elif "upgrade: websocket" in head.lower():
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n")
            while data := await reader.read(100):
                writer.write(data)
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
            path = head.split()[1]
            writer.write(f"data: {path}\n\n".encode())
            await self.more.wait()
            writer.write(b"data: the rest\n\n")
        writer.close()


@pytest.fixture(scope="module")
async def services() -> AsyncIterator[StandIns]:
    """All services except billing, which does not run."""
    standins = StandIns()
    servers = []
    for name in SERVICES:
        if name not in ("ws_gateway", "billing"):
            server = await serve_http(standins.app(name), 0)
            servers.append(server)
            standins.ports[name] = server.port
    raw = await asyncio.start_server(standins.stream, "127.0.0.1", 0)
    standins.ports |= {"ws_gateway": raw.sockets[0].getsockname()[1], "billing": free_port()}
    yield standins
    raw.close()
    for server in servers:
        await server.stop()


@asynccontextmanager
async def running(services: StandIns, limits: Limits = LOCAL_LIMITS) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a valid key, and a gateway of its own."""
    headers = {"Authorization": f"Bearer {KEY}"}
    async with (
        running_gateway(services.ports, limits) as url,
        httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=WAIT_SECONDS) as client,
    ):
        yield client


async def until(ask: Callable[[], Awaitable[bool]], what: str) -> None:
    async with asyncio.timeout(WAIT_SECONDS):
        while not await ask():
            await asyncio.sleep(0.05)


async def test_a_connection_that_was_just_used_stays_while_the_configuration_is_read_again(services: StandIns) -> None:
    """Its client may be sending the next request, which would get no answer."""
    others = psutil.Process().children()
    async with running(services) as client:
        [gateway] = [process for process in psutil.Process().children() if process not in others]
        reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)

        async def ask() -> bool:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(re.search(rb"Content-Length: (\d+)", head)[1])  # type: ignore[index]
            return bool(await reader.readexactly(size))

        async def old_workers_end() -> bool:
            return all(ends(process) for process in before)

        def ends(process: psutil.Process) -> bool:
            try:
                return "is shutting down" in " ".join(process.cmdline())
            except psutil.Error:
                return True

        assert await ask()
        used, before = time.monotonic(), gateway.children()
        gateway.send_signal(signal.SIGHUP)
        await until(old_workers_end, "the end of the old workers")
        # The server's limit, in which a busy machine may not come this far.
        with suppress(EOFError) if time.monotonic() - used > 4 else nullcontext():
            assert await ask()
        writer.close()


@pytest.fixture(scope="module")
async def client(services: StandIns) -> AsyncIterator[httpx.AsyncClient]:
    async with running(services) as started:
        yield started


async def raw(client: httpx.AsyncClient, *lines: str) -> str:
    """The answer to a request with a valid key that the client library would not send."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    head = (*lines, "Host: x", f"Authorization: Bearer {KEY}", "Connection: close", "", "")
    writer.write("\r\n".join(head).encode())
    answer = (await reader.read()).decode()
    writer.close()
    return answer


def problem(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert (body["type"], body["status"], body["errors"]) == ("about:blank", status, [])
    assert body["title"]
    assert body["detail"]
    return body


@pytest.mark.parametrize(
    ("method", "path", "service"),
    [
        ("POST", "/api/v1/tenants", "user"),
        ("GET", "/api/v1/tenant", "user"),
        ("DELETE", "/api/v1/api-keys/1", "user"),
        ("PATCH", "/api/v1/members/1", "user"),
        ("POST", "/api/v1/subjects/1/erase", "user"),
        ("POST", "/api/v1/agents", "agent"),
        ("GET", "/api/v1/sessions", "agent"),
        ("GET", "/api/v1/runs/1", "agent"),
        ("GET", "/api/v1/runs/1/timeline", "agent"),
        ("POST", "/api/v1/agents/1/sessions/s/messages", "agent"),
        ("GET", "/api/v1/channels", "channel"),
        ("GET", "/api/v1/deliveries/1", "channel"),
        ("POST", "/api/v1/documents", "memory"),
        ("POST", "/api/v1/memory/search", "memory"),
        ("GET", "/api/v1/memories", "memory"),
        ("POST", "/api/v1/plugins", "plugin"),
        ("GET", "/api/v1/tools", "plugin"),
        ("GET", "/api/v1/audit/verify", "log_aggregator"),
        ("GET", "/api/v1/logs", "log_aggregator"),
        ("POST", "/api/v1/deadletters/1/redrive", "log_aggregator"),
        ("GET", "/api/v1/traces/1", "log_aggregator"),
        ("GET", "/api/v1/status", "log_aggregator"),
        ("GET", "/api/v1/notifications", "notification"),
    ],
)
async def test_a_path_leads_to_its_service_unchanged(
    client: httpx.AsyncClient, method: str, path: str, service: str
) -> None:
    answer = (await client.request(method, f"{path}?q=a%20b%26c&cursor=x")).json()
    assert (answer["service"], answer["path"], answer["query"]) == (service, path, "q=a%20b%26c&cursor=x")
    assert answer["headers"]["x-claw-identity"] == f"identity of {KEY} for {service}"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/api/v1/unknown",
        "/api/v1/tenantsandmore",
        "/internal/auth",
        "/_auth",
        "/api/v1/tenants/../../../internal/auth",
        "/api/v1/tenants/%2e%2e/%2e%2e/%2e%2e/internal/auth",
        "/docs/user/../../internal/auth",
        "/docs/user/metrics",
        "/docs/user/static/..%2f..%2fmetrics",
        "/metrics",
    ],
)
async def test_an_unknown_path_is_not_found(client: httpx.AsyncClient, path: str) -> None:
    # Sent as raw bytes: the client library would normalise the path.
    answer = await raw(client, f"GET {path} HTTP/1.1")
    assert answer.startswith("HTTP/1.1 404 "), answer
    assert '"status": 404' in answer


async def test_an_answer_is_cached_for_its_own_tenant_only(client: httpx.AsyncClient, services: StandIns) -> None:
    for tenant in ("t1", "t2"):
        headers = {"Authorization": f"Bearer {KEY}", "X-Claw-Tenant": tenant}
        assert (await client.get("/api/v1/agents", headers=headers)).status_code == 200
    assert {headers.get("x-claw-tenant") for headers in services.auth_headers} >= {"t1", "t2"}


async def test_a_request_without_a_valid_key_is_refused(client: httpx.AsyncClient) -> None:
    for authorization in ("", "Bearer claw_bad", f"Basic {KEY}"):
        answer = await client.get("/api/v1/agents", headers={"Authorization": authorization})
        problem(answer, 401)
        assert answer.headers.get_list("www-authenticate") == ["Bearer"]


async def test_the_openai_client_reports_a_refused_key(client: httpx.AsyncClient) -> None:
    url = str(client.base_url.join("/v1"))
    http = httpx2.AsyncClient(trust_env=False)
    async with openai.AsyncOpenAI(base_url=url, api_key="claw_bad", http_client=http) as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()


async def test_only_the_gateway_tells_the_service_the_callers_identity(client: httpx.AsyncClient) -> None:
    forged = {
        "X-Claw-Identity": "forged",
        "traceparent": "00-11111111111111111111111111111111-2222222222222222-01",
        "tracestate": "a=b",
        "baggage": "a=b",
        "X-Request-ID": "mine",
        "X-Forwarded-For": "8.8.8.8",
        "Forwarded": "for=8.8.8.8",
    }
    answer = await client.get("/api/v1/agents", headers=forged)
    headers = answer.json()["headers"]
    assert headers["x-claw-identity"] == f"identity of {KEY} for agent"
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-request-id"] == answer.headers["x-request-id"] != "mine"
    assert not headers.keys() & {"authorization", "traceparent", "tracestate", "baggage", "forwarded"}
    open_ = (await client.post("/webhooks/telegram/1", headers=forged)).json()["headers"]
    assert not open_.keys() & {"x-claw-identity", "authorization", "traceparent", "tracestate"}


async def test_the_callers_identity_is_cached_and_a_revoked_key_expires_soon(
    client: httpx.AsyncClient, services: StandIns
) -> None:
    services.keys.add("claw_short")
    bearer = {"Authorization": "Bearer claw_short", "X-Claw-Identity": "forged", "Cookie": "a=b"}
    for _ in range(50):
        answer = await client.post("/api/v1/agents", headers=bearer, content=b"x" * 1000)
        assert answer.json()["headers"]["x-claw-identity"] == "identity of claw_short for agent"
    assert 1 <= services.asked["claw_short"] < 50
    for headers in services.auth_headers:
        assert not headers.keys() & {"x-claw-identity", "cookie", "content-length", "transfer-encoding"}
    services.keys.remove("claw_short")

    async def refused() -> bool:
        return (await client.get("/api/v1/agents", headers=bearer)).status_code == 401

    await until(refused, "the refusal")
    services.keys.add("claw_short")

    async def let_in() -> bool:
        return (await client.get("/api/v1/agents", headers=bearer)).status_code == 200

    await until(let_in, "the key to work again")


async def test_webhooks_and_health_need_no_key(client: httpx.AsyncClient) -> None:
    nobody = {"Authorization": ""}
    hook = await client.post("/webhooks/telegram/1?x=1", headers=nobody)
    assert hook.json()["path"] == "/webhooks/telegram/1"
    for path in ("/readyz", "/api/health", "/api/health/dependencies"):
        assert (await client.get(path, headers=nobody)).json()["service"] == "user"
    for path in ("/health", "/healthz"):
        assert (await client.get(path, headers=nobody)).json() == {"status": "ok"}


async def test_a_service_that_is_down_is_a_503_and_its_own_answers_pass(client: httpx.AsyncClient) -> None:
    down = await client.get("/api/v1/billing/usage")
    problem(down, 503)
    assert down.headers.get_list("retry-after") == ["1"]
    own = await client.get("/api/v1/agents", params={"answer": "503"})
    assert (own.status_code, own.json()) == (503, {"from": "agent"})
    assert own.headers.get_list("retry-after") == ["7"]
    missing = await client.get("/api/v1/agents/1", params={"answer": "404"})
    assert (missing.status_code, missing.json()["service"]) == (404, "agent")


async def test_the_largest_body_depends_on_the_path(client: httpx.AsyncClient) -> None:
    async def post(path: str, size: int) -> httpx.Response:
        return await client.post(path, content=b"x" * size)

    mib = 1024 * 1024
    assert (await post("/api/v1/agents", mib)).json()["bytes"] == mib
    problem(await post("/api/v1/agents", mib + 1), 413)
    assert (await post("/webhooks/slack/1", 3 * mib)).json()["bytes"] == 3 * mib
    problem(await post("/webhooks/slack/1", 3 * mib + 1), 413)
    for path in ("/readyz", "/api/health", "/api/health/dependencies", "/docs/user/", "/docs/agent/openapi.json"):
        problem(await post(path, 1025), 413)
    assert (await post("/v1/body", 20 * mib)).json()["bytes"] == 20 * mib
    problem(await post("/v1/body", 20 * mib + 1), 413)
    # The service is away: that is the error, and not the size of the body.
    problem(await post("/v1/away", 2 * mib), 503)
    assert (await post("/api/v1/documents", 101 * mib)).json()["bytes"] == 101 * mib
    too_large = await raw(client, "POST /api/v1/documents HTTP/1.1", f"Content-Length: {111 * mib}")
    assert too_large.startswith("HTTP/1.1 413 ")


async def test_a_document_is_forwarded_while_it_arrives(client: httpx.AsyncClient, services: StandIns) -> None:
    services.body_begun.clear()

    async def document() -> AsyncIterator[bytes]:
        yield b"x" * 1000
        async with asyncio.timeout(WAIT_SECONDS):
            await services.body_begun.wait()
        yield b"x" * 1000

    assert (await client.post("/api/v1/documents", content=document())).json()["bytes"] == 2000


async def test_events_are_forwarded_at_once(client: httpx.AsyncClient, services: StandIns) -> None:
    event_stream = {"Accept": "text/event-stream"}
    for method, path, headers in (
        ("GET", "/api/v1/runs/1/events", {}),
        ("POST", "/api/v1/agents/1/sessions/a%2Fb/messages", event_stream),
        ("POST", "/v1/chat/completions", {}),
        ("GET", "/v1/models", {}),
    ):
        services.more.clear()
        async with client.stream(method, path, headers=headers) as answer:
            assert answer.headers["content-type"] == "text/event-stream"
            lines = answer.aiter_lines()
            assert await anext(lines) == f"data: {path}"
            services.more.set()
            assert [line async for line in lines if line] == ["data: the rest"]


async def test_a_websocket_goes_through(client: httpx.AsyncClient) -> None:
    url = client.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    head = f"GET /ws HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: Upgrade\r\nUpgrade: websocket"
    writer.write(f"{head}\r\n\r\n".encode())
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
    for text in (b"one", b"two"):
        writer.write(text)
        assert await reader.readexactly(3) == text
    writer.close()


async def test_the_index_lists_each_services_page_and_leads_there(client: httpx.AsyncClient) -> None:
    index = await client.get("/docs", follow_redirects=True, headers={"Authorization": ""})
    assert index.headers["content-type"] == "text/html; charset=utf-8"
    for name in SERVICES:
        assert f'<a href="{name}/">' in index.text
    moved = await client.get("/docs/user")
    assert (moved.status_code, moved.headers["location"]) == (301, "/docs/user/")
    for page in ("", "openapi.json", "ws-schema.json", "static/swagger-ui.css"):
        answer = (await client.get(f"/docs/memory/{page}", headers={"Authorization": ""})).json()
        assert (answer["service"], answer["path"]) == ("memory", f"/docs/{page}")


async def test_every_answer_has_the_security_headers_once(client: httpx.AsyncClient) -> None:
    for path in ("/api/v1/agents", "/nothing", "/docs/", "/healthz", "/api/v1/billing/x"):
        headers = (await client.get(path)).headers
        assert headers.get_list("x-frame-options") == ["DENY"]
        assert headers.get_list("x-content-type-options") == ["nosniff"]
        assert headers.get_list("referrer-policy") == ["no-referrer"]
        assert headers["server"] == "nginx"
        assert "strict-transport-security" not in headers
    tls = (await client.get("/healthz", headers={"X-Forwarded-Proto": "https"})).headers
    assert tls["strict-transport-security"] == "max-age=31536000; includeSubDomains"


async def test_a_flood_from_one_key_address_or_channel_is_refused_and_others_are_not(services: StandIns) -> None:
    services.keys |= {"claw_first", "claw_second"}
    # Refilled that slowly, the burst is all there is.
    limits = Limits(rate=1, burst=20, channel_rate=1, channel_burst=20, webhook_rate=1, webhook_burst=50)
    async with running(services, limits) as client:

        async def post(count: int, path: str, key: str, address: str) -> set[int]:
            """The statuses of this number of requests."""
            transport = httpx.AsyncHTTPTransport(local_address=address)
            headers = {"Authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(transport=transport, base_url=client.base_url, headers=headers) as caller:
                answers = [await caller.post(path.format(n)) for n in range(count)]
            for answer in answers:
                if answer.status_code == 429:
                    problem(answer, 429)
                    assert answer.headers.get_list("retry-after") == ["1"]
            return {answer.status_code for answer in answers}

        here, elsewhere = "127.0.0.1", "127.0.0.2"
        assert await post(60, "/api/v1/agents", "claw_first", here) == {200, 429}
        assert 429 in await post(10, "/api/v1/agents", "claw_first", elsewhere)
        assert await post(5, "/api/v1/agents", "claw_second", elsewhere) == {200}
        assert 429 in await post(10, "/api/v1/agents", "claw_second", here)
        # Vendors have few addresses: for webhooks an address has a higher limit.
        assert await post(60, "/webhooks/slack/1", "x", here) == {200, 429}
        assert await post(5, "/webhooks/slack/2", "x", here) == {200}
        # Invented tokens, each of them once.
        assert 429 in await post(60, "/webhooks/slack/invented-{}", "x", here)


async def test_one_key_or_address_cannot_take_all_connections(services: StandIns) -> None:
    services.keys |= {"claw_first", "claw_second"}
    services.more.clear()
    async with running(services, replace(LOCAL_LIMITS, connections=3)) as client, AsyncExitStack() as all_:

        async def follow(key: str, address: str) -> int:
            transport = httpx.AsyncHTTPTransport(local_address=address)
            caller = await all_.enter_async_context(httpx.AsyncClient(transport=transport, base_url=client.base_url))
            headers = {"Authorization": f"Bearer {key}"}
            answer = await all_.enter_async_context(caller.stream("GET", "/api/v1/runs/1/events", headers=headers))
            return answer.status_code

        here, elsewhere = "127.0.0.1", "127.0.0.2"
        assert [await follow("claw_first", here) for _ in range(4)] == [200, 200, 200, 429]
        assert [await follow("claw_first", elsewhere), await follow("claw_second", here)] == [429, 429]
        assert await follow("claw_second", elsewhere) == 200
        services.more.set()


async def test_one_address_cannot_fill_the_disk_with_bodies_of_webhooks(services: StandIns) -> None:
    async with running(services, replace(LOCAL_LIMITS, large_webhooks=4)) as client, AsyncExitStack() as all_:

        async def begin(path: str, length: str) -> str:
            """The first line of the answer to a request whose body does not come."""
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            all_.callback(writer.close)
            head = f"POST /webhooks/{path} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n{length}\r\n\r\n"
            writer.write(head.encode())
            return (await reader.readline()).decode().strip()

        large, unknown = "Content-Length: 10000", "Transfer-Encoding: chunked"
        begun = [await begin("slack/1", large), await begin("slack/2", unknown), await begin("payments/stripe", large)]
        assert {*begun, await begin("slack/1", large)} == {"HTTP/1.1 100 Continue"}
        for path in ("slack/1", "slack/3", "payments/stripe"):
            assert "429" in await begin(path, large)
        assert "429" in await begin("slack/1", unknown)
        assert "100" in await begin("slack/1", "Content-Length: 9999")
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(local_address="127.0.0.2")) as elsewhere:
            assert (await elsewhere.post(f"{client.base_url}/webhooks/slack/1", content=bytes(10_000))).is_success


async def test_one_address_cannot_fill_the_disk_with_bodies_of_v1(services: StandIns) -> None:
    """A key alone does not bound it: a tenant has hundreds."""
    services.keys |= {"claw_first", "claw_second"}
    async with running(services, replace(LOCAL_LIMITS, large_requests=3)) as client, AsyncExitStack() as all_:

        async def begin(key: str, length: str) -> str:
            reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
            all_.callback(writer.close)
            head = (
                f"POST /v1/body HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nExpect: 100-continue\r\n{length}"
            )
            writer.write(f"{head}\r\n\r\n".encode())
            return (await reader.readline()).decode().strip()

        large, unknown = "Content-Length: 1000000", "Transfer-Encoding: chunked"
        begun = [
            await begin("claw_first", large),
            await begin("claw_second", large),
            await begin("claw_first", unknown),
        ]
        assert {*begun} == {"HTTP/1.1 100 Continue"}
        assert "429" in await begin("claw_first", large)
        assert "429" in await begin("claw_second", unknown)
        # These have no images, or no body.
        services.more.set()
        assert "100" in await begin("claw_first", "Content-Length: 999999")
        assert (await client.get("/v1/models")).is_success
        async with httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(local_address="127.0.0.2"), headers=client.headers
        ) as elsewhere:
            assert (await elsewhere.post(f"{client.base_url}/v1/body", content=bytes(1_000_000))).is_success


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /api/v1/agents/%00 HTTP/1.1", 400),
        ("GET /../etc/passwd HTTP/1.1", 400),
        ("GET /api/v1/%zz HTTP/1.1", 400),
        ("GET /api/v1/agents?q=" + "x" * 100_000 + " HTTP/1.1", 414),
        ("GET / HTTP/9.9", 400),
        ("NONSENSE", 400),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: gzip", 400),
        ("GET / HTTP/1.1\r\nTransfer-Encoding: chunked, chunked", 400),
        ("GET / HTTP/1.1\r\nContent-Length: x", 400),
        ("GET / HTTP/1.1\r\nX-Long: " + "x" * 100_000, 431),
    ],
)
async def test_a_request_that_nginx_refuses_itself_gets_a_problem(
    client: httpx.AsyncClient, request_line: str, status: int
) -> None:
    head, _, body = (await raw(client, request_line)).partition("\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} "), head
    assert "Content-Type: application/problem+json" in head
    assert json.loads(body)["status"] == status


async def test_the_error_log_holds_no_webhook_token(services: StandIns, capfd: pytest.CaptureFixture[str]) -> None:
    async with running(services) as client:
        too_large = await raw(client, "POST /webhooks/slack/my-token HTTP/1.1", f"Content-Length: {2**30}")
        assert too_large.startswith("HTTP/1.1 413 ")
        elsewhere = await raw(client, "POST /api/v1/agents HTTP/1.1", f"Content-Length: {2**30}")
        assert elsewhere.startswith("HTTP/1.1 413 ")
    log = capfd.readouterr().err
    assert "/api/v1/agents" in log
    assert "my-token" not in log


def test_a_configuration_that_nginx_refuses_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next restart of nginx would fail."""
    place = Place(tmp_path, Home(tmp_path).place().ports, Secrets(tmp_path / "secrets.json"))
    nginx.prepare(place)
    served = (tmp_path / "nginx" / "nginx.conf").read_text()
    (tmp_path / "broken.conf").write_text("events {")
    monkeypatch.setattr(nginx, "_TEMPLATE", tmp_path / "broken.conf")
    with pytest.raises(EngineError, match="goes on with its old configuration"):
        _reload_gateway(Supervisor(tmp_path), place)
    assert (tmp_path / "nginx" / "nginx.conf").read_text() == served
