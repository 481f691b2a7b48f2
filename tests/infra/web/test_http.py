"""The HTTP base over real sockets: problems, limits, traces, metrics, start and drain."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import httpx
import msgspec
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket
from structlog.testing import capture_logs
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from infra.errors import (
    Conflict,
    Forbidden,
    InvalidMessage,
    NotFound,
    RetryLater,
    TooLarge,
    Transient,
    Unauthenticated,
)
from infra.observe import telemetry
from infra.observe.metrics import Metrics
from infra.observe.spans import encode
from infra.web import http
from infra.web import server as http_server
from infra.web.http import create_app, read_json
from infra.web.server import HttpServer, serve_http

TRACE = "0af7651916cd43dd8448eb211c80319c"


class Line(msgspec.Struct):
    price: int


class Order(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    lines: list[Line]
    note: str | None = None


ERRORS: dict[str, tuple[Exception, int]] = {
    "invalid": (InvalidMessage("lines[0].price", "negative"), 422),
    "unauthenticated": (Unauthenticated("no key"), 401),
    "forbidden": (Forbidden("not yours"), 403),
    "not-found": (NotFound("agent a1"), 404),
    "conflict": (Conflict("version 3, not 2"), 409),
    "too-large": (TooLarge("file: over 5 MB"), 413),
    "transient": (Transient("billing is away"), 503),
    "later": (RetryLater(timedelta(seconds=7)), 503),
    "teapot": (HTTPException(418, "short and stout"), 418),
    "database": (ConnectionRefusedError("postgresql://u:hunter2@h"), 503),
    "bug": (ValueError("hunter2"), 500),
}


class App:
    """A served application whose route can be made to wait."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        self.metrics = Metrics(CollectorRegistry())
        self.health = http.Health("front", "1")
        self.traceparent: dict[str, str] = {}
        self.now = 0.0

    def routes(self) -> list[Route | Mount | WebSocketRoute]:
        return [
            WebSocketRoute("/socket/{how}", self.echo),
            Route("/orders/{id}", self.order, methods=["POST"]),
            Route("/fail/{how}", self.fail),
            Route("/hooks/{type}/{token}", self.order, methods=["POST"]),
            Route("/slow", self.slow),
            Route("/broken-stream", self.broken_stream),
            Route("/events", self.events),
            Mount("/mounted", routes=[Route("/{x}", self.fail)]),
        ]

    async def order(self, request: Request) -> Response:
        self.traceparent = telemetry.carrier()
        order = await read_json(request, Order)
        return JSONResponse({"name": order.name}, 201)

    async def fail(self, request: Request) -> Response:
        raise ERRORS[request.path_params["how"]][0]

    async def slow(self, _: Request) -> Response:
        self.entered.set()
        await self.go.wait()
        return JSONResponse({"done": True})

    async def echo(self, websocket: WebSocket) -> None:
        if failure := ERRORS.get(websocket.path_params["how"]):
            raise failure[0]
        await websocket.accept()
        while (text := await websocket.receive_text()) != "fail":
            await websocket.send_text(text)
        raise ValueError("hunter2")

    async def events(self, _: Request) -> Response:
        """A stream of events that begins after 2 seconds and lasts for 98."""
        self.now = 2.0

        async def parts() -> AsyncIterator[str]:
            self.now = 100.0
            yield "data: x\n\n"

        return StreamingResponse(parts(), media_type="text/event-stream")

    async def broken_stream(self, _: Request) -> Response:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"first"
            raise ValueError("hunter2")

        return StreamingResponse(pieces())


class Exporter(InMemorySpanExporter):
    """An exporter that signals each span."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = asyncio.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.arrived.set()
        return super().export(spans)


@pytest.fixture
def exporter() -> Iterator[Exporter]:
    exporter = Exporter()
    running = telemetry.setup("front", "1", None, processor=SimpleSpanProcessor(exporter))
    yield exporter
    running.shutdown()


@pytest.fixture
async def app() -> App:
    return App()


@pytest.fixture
async def server(app: App) -> AsyncIterator[HttpServer]:
    server = await serve_http(create_app(app.routes(), app.health, app.metrics, max_body=1000), 0)
    yield server
    app.go.set()
    await server.stop()


@pytest.fixture
async def client(server: HttpServer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        yield client


@pytest.mark.parametrize("how", ERRORS)
async def test_errors_are_problems(client: httpx.AsyncClient, how: str) -> None:
    error, status = ERRORS[how]
    response = await client.get(f"/fail/{how}")
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert (problem["type"], problem["status"]) == ("about:blank", status)
    assert problem["title"]
    assert "hunter2" not in response.text
    assert ("retry-after" in response.headers) == (status == 503)
    if how not in ("database", "bug", "teapot"):
        assert problem["detail"] == str(error)


async def test_a_problem_names_the_field(client: httpx.AsyncClient) -> None:
    problem = (await client.get("/fail/invalid")).json()
    assert problem["errors"] == [{"field": "lines[0].price", "message": "negative"}]
    assert (await client.get("/fail/later")).headers["retry-after"] == "7"
    assert (await client.get("/fail/unauthenticated")).headers["www-authenticate"] == "Bearer"


async def test_an_inner_error_shows_its_trace_and_nothing_else(client: httpx.AsyncClient, exporter: Exporter) -> None:
    response = await client.get("/fail/bug", headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
    assert response.json()["trace_id"] == TRACE
    [span] = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR
    assert "trace_id" not in (await client.get("/fail/not-found")).json()


async def test_unknown_paths_and_methods_are_problems(client: httpx.AsyncClient) -> None:
    missing, wrong = await client.get("/nowhere"), await client.put("/orders/1")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert {r.headers["content-type"] for r in (missing, wrong)} == {"application/problem+json"}
    assert wrong.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("body", "field", "reason"),
    [
        (b'{"name": "x", "lines": [{"price": 1}, {"price": "2"}]}', "lines[1].price", "Expected `int`"),
        (b'{"lines": []}', "name", "missing"),
        (b'{"name": "x", "lines": [{}]}', "lines[0].price", "missing"),
        (b'{"name": "x", "lines": [], "nmae": 1}', "nmae", "unknown"),
        (b"[]", "body", "Expected `object`"),
        (b"{", "body", "truncated"),
        (b"", "body", "truncated"),
        (b'{"name": "\xff", "lines": []}', "body", "utf-8"),
    ],
)
async def test_a_body_that_does_not_fit_names_the_field(
    client: httpx.AsyncClient, body: bytes, field: str, reason: str
) -> None:
    response = await client.post("/orders/1", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 422
    [error] = response.json()["errors"]
    assert error["field"] == field
    assert reason in error["message"]


@pytest.mark.parametrize(
    ("content_type", "status"),
    [
        ("application/json", 201),
        ("Application/JSON; charset=utf-8", 201),
        ("application/cloudevents+json", 201),
        ("text/plain", 415),
        (None, 415),
    ],
)
async def test_only_json_is_taken(client: httpx.AsyncClient, content_type: str | None, status: int) -> None:
    headers = {"content-type": content_type} if content_type else {}
    response = await client.post("/orders/1", content=b'{"name": "x", "lines": []}', headers=headers)
    assert response.status_code == status


async def raw(server: HttpServer, request: bytes) -> tuple[int, bytes]:
    """Sends raw bytes, and reads the answer to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    await writer.drain()
    async with asyncio.timeout(10):
        head = await reader.readuntil(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), head


async def test_a_large_body_is_refused_with_and_without_its_length(
    server: HttpServer, client: httpx.AsyncClient
) -> None:
    said = await raw(
        server,
        b"POST /orders/1 HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 20000000\r\n\r\n",
    )
    assert said[0] == 413

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(11):
            yield b"x" * 100

    unsaid = await client.post("/orders/1", content=pieces(), headers={"content-type": "application/json"})
    assert unsaid.status_code == 413
    assert "1000 bytes" in unsaid.json()["detail"]
    just = json.dumps({"name": "x" * (1000 - 25), "lines": []}).encode()
    assert len(just) == 1000
    accepted = await client.post("/orders/1", content=just, headers={"content-type": "application/json"})
    assert accepted.status_code == 201


async def test_a_request_continues_the_callers_trace(client: httpx.AsyncClient, app: App, exporter: Exporter) -> None:
    await client.post("/orders/42", headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"})
    [span] = exporter.get_finished_spans()
    assert span.context is not None
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == "b7ad6b7169203331"
    assert app.traceparent["traceparent"] == f"00-{TRACE}-{span.context.span_id:016x}-01"
    assert (span.name, span.kind, span.status.status_code) == (
        "POST /orders/{id}",
        SpanKind.SERVER,
        StatusCode.UNSET,
    )
    assert span.attributes == {
        "http.request.method": "POST",
        "url.scheme": "http",
        "url.path": "/orders/42",
        "http.route": "/orders/{id}",
        "http.response.status_code": 415,
    }


async def test_names_and_labels_stay_few(client: httpx.AsyncClient, app: App, exporter: Exporter) -> None:
    for n in range(3):
        await client.get(f"/nowhere/{n}")
        await client.post(f"/orders/{n}")
    for method in ("PURGE", "LINK", "PROPFIND"):
        await client.request(method, "/slow")
    await client.get("/metrics")
    await client.get("/readyz")
    text = (await client.get("/metrics")).text
    assert 'claw_http_request_seconds_count{method="GET",route="unmatched",status="404"} 3.0' in text
    assert 'claw_http_request_seconds_count{method="POST",route="/orders/{id}",status="415"} 3.0' in text
    assert 'claw_http_request_seconds_count{method="_OTHER",route="/slow",status="405"} 3.0' in text
    assert "readyz" not in text
    assert {span.name for span in exporter.get_finished_spans()} == {
        "GET unmatched",
        "POST /orders/{id}",
        "_OTHER /slow",
    }


@pytest.mark.parametrize(
    ("path", "size", "shown"),
    [
        ("/hooks/slack/s3cret", 1, "/hooks/slack/***"),
        ("/hooks/slack/s3cret", 2000, "/hooks/slack/***"),
        ("/hooks/slack/s3cret/more", 1, "/hooks/***"),
        ("/hook/slack/s3cret", 1, "/hook/***"),
        ("/hooks", 1, "/hooks"),
    ],
)
async def test_a_token_in_a_path_is_neither_in_the_span_nor_in_the_log(
    client: httpx.AsyncClient, exporter: Exporter, path: str, size: int, shown: str
) -> None:
    with capture_logs() as lines:
        await client.post(path, content=b"x" * size)
    [span] = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["url.path"] == shown
    assert b"s3cret" not in encode(cast("Any", span))
    assert [line["path"] for line in lines] == [shown]


async def test_a_mounted_route_is_named_in_full(client: httpx.AsyncClient, exporter: Exporter) -> None:
    await client.get("/mounted/not-found")
    [span] = exporter.get_finished_spans()
    assert span.name == "GET /mounted/{x}"


async def test_a_broken_off_answer_is_not_taken_for_a_complete_one(
    client: httpx.AsyncClient, app: App, exporter: Exporter
) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await client.get("/broken-stream")
    labels = {"method": "GET", "route": "/broken-stream", "status": "200"}
    assert app.metrics.registry.get_sample_value("claw_http_request_seconds_count", labels) == 1
    [span] = exporter.get_finished_spans()
    assert span.status.status_code is StatusCode.ERROR


async def test_a_stream_of_events_is_measured_until_it_begins(
    client: httpx.AsyncClient, app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lasts as long as a run, and would make the P99 of a service useless."""
    monkeypatch.setattr(http, "time", SimpleNamespace(perf_counter=lambda: app.now))
    assert (await client.get("/events")).text == "data: x\n\n"
    labels = {"method": "GET", "route": "/events", "status": "200"}
    assert app.metrics.registry.get_sample_value("claw_http_request_seconds_sum", labels) == 2


async def test_a_client_that_leaves_is_not_an_error(server: HttpServer, app: App, exporter: Exporter) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /orders/1 HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")
    await writer.drain()
    writer.close()
    async with asyncio.timeout(10):
        await exporter.arrived.wait()
    [span] = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["http.response.status_code"] == 499
    assert span.status.status_code is StatusCode.UNSET


async def test_stopping_lets_requests_finish_and_takes_no_more(
    server: HttpServer, client: httpx.AsyncClient, app: App
) -> None:
    under_way = asyncio.create_task(client.get("/slow"))
    await app.entered.wait()
    stopping = asyncio.create_task(server.stop())
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.close()
                await asyncio.sleep(0.01)
            except ConnectionError:
                break
    assert not under_way.done()
    app.go.set()
    assert (await under_way).json() == {"done": True}
    await stopping


async def test_a_request_that_does_not_finish_is_cut_off(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "DRAIN_SECONDS", 0.1)
    server = await serve_http(create_app(app.routes(), app.health, app.metrics), 0)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}") as client:
        under_way = asyncio.create_task(client.get("/slow"))
        await app.entered.wait()
        await server.stop()
        result: Any = (await asyncio.gather(under_way, return_exceptions=True))[0]
    assert isinstance(result, httpx.TransportError) or result.status_code >= 500


async def test_processes_share_a_port_and_idle_clients_leave_first(app: App) -> None:
    """The second server answers after the first one has stopped. A client in between loses no connection."""
    web = create_app(app.routes(), app.health, app.metrics)
    first = await serve_http(web, 0, shared=True)
    second = await serve_http(web, first.port, shared=True)
    with pytest.raises(OSError, match=str(first.port)):
        await serve_http(web, first.port)
    idle = [await asyncio.open_connection("127.0.0.1", first.port) for _ in range(20)]
    stopping = asyncio.create_task(first.stop())
    for reader, writer in idle:
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
    async with asyncio.timeout(10):
        await stopping
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{first.port}") as client:
        ready = await client.get("/readyz")
    assert (ready.status_code, ready.headers["claw-process"]) == (200, str(os.getpid()))
    await second.stop()


async def test_a_taken_port_is_named(app: App) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"HTTP on 127.0.0.1:{port}: Address already in use"):
            await serve_http(create_app([], app.health, app.metrics), port)


async def test_signals_stay_with_the_process(server: HttpServer) -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@asynccontextmanager
async def opened(server: HttpServer, path: str = "/socket/echo") -> AsyncIterator[ClientConnection]:
    async with connect(f"ws://127.0.0.1:{server.port}{path}", proxy=None) as client:
        yield client


async def echoes(client: ClientConnection, text: str = "x") -> bool:
    async with asyncio.timeout(10):
        await client.send(text)
        return await client.recv() == text


async def closed(client: ClientConnection) -> int | None:
    """The code with which the server closes it; None: without one."""
    async with asyncio.timeout(10):
        with pytest.raises(ConnectionClosed) as end:
            while True:
                await client.recv()
    return end.value.rcvd.code if end.value.rcvd else None


@pytest.mark.parametrize("how", ERRORS)
async def test_errors_before_a_socket_is_accepted_are_problems(
    server: HttpServer, app: App, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    status = ERRORS[how][1]
    with pytest.raises(InvalidStatus) as refused:
        async with opened(server, f"/socket/{how}"):
            pass
    answer = refused.value.response
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, json.loads(answer.body or b"")["status"]) == (status, status)
    assert b"hunter2" not in (answer.body or b"")
    labels = {"method": "GET", "route": "/socket/{how}", "status": str(status)}
    assert app.metrics.registry.get_sample_value("claw_http_request_seconds_count", labels) == 1
    assert not [line for line in caplog.records if line.name == "uvicorn.error" and line.levelname == "ERROR"]


@pytest.mark.parametrize("path", ["/nowhere", "/slow", "/health"])
async def test_a_socket_on_an_unknown_path_is_not_found(server: HttpServer, path: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with opened(server, path):
            pass
    assert refused.value.response.status_code == 404
    assert refused.value.response.headers["content-type"] == "application/problem+json"


async def test_a_socket_is_counted_when_it_opens_has_no_span_and_may_end(
    server: HttpServer, app: App, exporter: Exporter, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(server) as client:
        assert await echoes(client)
        labels = {"method": "GET", "route": "/socket/{how}", "status": "101"}
        assert app.metrics.registry.get_sample_value("claw_http_request_seconds_count", labels) == 1
    await server.stop()
    assert exporter.get_finished_spans() == ()
    assert "Exception in ASGI application" not in caplog.text


async def test_a_socket_that_fails_ends_alone(server: HttpServer) -> None:
    async with opened(server) as failing, opened(server) as other:
        await failing.send("fail")
        assert await closed(failing) is None
        assert await echoes(other)


async def test_a_message_may_be_as_large_as_a_body_and_no_larger(server: HttpServer) -> None:
    async with opened(server) as client:
        assert await echoes(client, "x" * http.MAX_BODY_BYTES)
        await client.send("x" * (http.MAX_BODY_BYTES + 1))
        assert await closed(client) == 1009


async def test_a_socket_that_does_not_answer_pings_is_closed(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "PING_SECONDS", 0.1)
    monkeypatch.setattr(http_server, "PONG_SECONDS", 0.2)
    server = await serve_http(create_app(app.routes(), app.health, app.metrics), 0)
    async with opened(server) as other:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(
            b"GET /socket/echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
            b"sec-websocket-version: 13\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        async with asyncio.timeout(10):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")
            frames = await reader.read()
        # A ping with four bytes, then the close.
        assert frames[:2] == b"\x89\x04"
        assert frames[6] == 0x88
        assert int.from_bytes(frames[8:10]) == 1011
        writer.close()
        # The other one answers by itself.
        assert await echoes(other)
    await server.stop()


async def test_a_stop_closes_sockets_so_that_clients_reconnect(app: App) -> None:
    server = await serve_http(create_app(app.routes(), app.health, app.metrics), 0)
    async with opened(server) as client:
        assert await echoes(client)
        stopping = asyncio.create_task(server.stop())
        assert await closed(client) == 1012
        await stopping
