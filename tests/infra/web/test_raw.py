"""Raw routes over real sockets: one connection for all routes, pipelining, limits, clients that leave, the stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from infra.errors import TooLarge
from infra.observe.metrics import Metrics
from infra.web import http, raw
from infra.web.http import create_app
from infra.web.problems import problem
from infra.web.raw import RawRequest, RawRoute
from infra.web.server import HttpServer, serve_http


class Served:
    """A server with a raw route below ``/raw`` and a usual route ``/usual``."""

    def __init__(self) -> None:
        self.seen: list[RawRequest] = []
        self.came = asyncio.Event()
        self.server: HttpServer
        self.draining = False

    def handle(self, request: RawRequest) -> None:
        self.seen.append(request)
        self.came.set()
        match request.path.split("/")[2]:
            case "now":
                request.answer()
            case "echo":
                try:
                    body = request.body
                except TooLarge as error:
                    request.answer(problem(error))
                else:
                    request.answer(Response(body, 202, {"x-query": request.query}, media_type="text/plain"))

    async def usual(self, request: Request) -> Response:
        return JSONResponse({"length": len(await request.body())})

    async def later(self) -> RawRequest:
        """The request that waits for its answer."""
        async with asyncio.timeout(10):
            await self.came.wait()
        self.came.clear()
        return self.seen[-1]


class Client:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, target: str, body: bytes | None = b"", method: str = "POST", **headers: str) -> None:
        lines = [f"{method} {target} HTTP/1.1", "host: x", *(f"{name}: {value}" for name, value in headers.items())]
        if body is not None:
            lines.append(f"content-length: {len(body)}")
        self.writer.write("\r\n".join([*lines, "", ""]).encode() + (body or b""))

    async def answer(self, *, with_body: bool = True) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(10):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
            headers = dict(line.split(": ", 1) for line in lines if line)
            body = await self.reader.readexactly(int(headers.get("content-length", 0)) if with_body else 0)
        return int(first.split()[1]), headers, body

    async def closed(self) -> bytes:
        """The rest that the server sends before it closes the connection."""
        async with asyncio.timeout(10):
            return await self.reader.read()


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    served = Served()
    app = create_app(
        [Route("/usual", served.usual, methods=["POST"])],
        http.Health("raw", "1"),
        Metrics(CollectorRegistry()),
    )
    served.server = await serve_http(
        app, 0, raw=[RawRoute("/raw", served.handle, max_body=1_000)], draining=lambda: served.draining
    )
    yield served
    for request in served.seen:
        if not request.response_complete:
            request.answer()
    await served.server.stop()


@asynccontextmanager
async def connected(served: Served) -> AsyncIterator[Client]:
    client = Client(*await asyncio.open_connection("127.0.0.1", served.server.port))
    yield client
    client.writer.close()


async def test_one_connection_carries_requests_for_raw_and_for_other_routes(served: Served) -> None:
    async with connected(served) as client:
        for _ in range(2):
            client.send("/raw/echo/a%20b?c=%20d", b"body", "PUT", **{"X-Name": "value"})
            status, headers, body = await client.answer()
            assert (status, headers["x-query"], body) == (202, "c=%20d", b"body")
            assert {"date", "server"} <= headers.keys()
            client.send("/usual", b"12345")
            status, _, body = await client.answer()
            assert (status, body) == (200, b'{"length":5}')
    assert [(one.method, one.path, one.headers["x-name"]) for one in served.seen] == [
        ("PUT", "/raw/echo/a b", "value")
    ] * 2


async def test_pipelined_requests_are_answered_in_their_order(served: Served) -> None:
    async with connected(served) as client:
        client.send("/raw/later")
        client.send("/usual", b"1")
        client.send("/raw/echo", b"2")
        client.send("/raw/echo", b"x" * 1_001)
        client.send("/usual", b"33")
        (await served.later()).answer(Response(b"0", 201))
        answers = [await client.answer() for _ in range(5)]
    assert [(status, body) for status, _, body in answers[:3]] == [(201, b"0"), (200, b'{"length":1}'), (202, b"2")]
    assert [status for status, _, _ in answers[3:]] == [413, 200]


async def test_many_pipelined_requests_are_no_deep_recursion(served: Served) -> None:
    async with connected(served) as client:
        for target in ("/raw/later", *["/raw/now"] * 3_000):
            client.send(target)
        (await served.later()).answer()
        for _ in range(3_001):
            assert (await client.answer())[0] == 200


async def test_a_large_body_is_refused_with_and_without_its_length_and_the_connection_goes_on(served: Served) -> None:
    async with connected(served) as client:
        client.send("/raw/echo", None, **{"content-length": "1001"})
        # It is refused before its body comes.
        status, _, body = await client.answer()
        assert (status, b"body: must have at most 1000 bytes" in body) == (413, True)
        client.writer.write(b"x" * 1_001)
        for sizes, expected in (([1, 998], 202), ([600, 401, 5], 413)):
            client.send("/raw/echo", None, **{"transfer-encoding": "chunked"})
            for size in sizes:
                client.writer.write(b"%x\r\n%b\r\n" % (size, b"y" * size))
            client.writer.write(b"0\r\n\r\n")
            assert (await client.answer())[0] == expected
    # Each request is handled once, also those that are answered before their end.
    assert [request.method for request in served.seen] == ["POST"] * 3


async def test_a_client_that_waits_for_100_continue_gets_it_unless_its_body_is_too_large(served: Served) -> None:
    async with connected(served) as client:
        client.send("/raw/echo", None, **{"content-length": "4", "expect": "100-continue"})
        assert (await client.answer())[0] == 100
        client.writer.write(b"body")
        assert (await client.answer())[2] == b"body"
        client.send("/raw/echo", None, **{"content-length": "1001", "expect": "100-continue"})
        assert (await client.answer())[0] == 413


async def test_head_has_no_body_and_close_closes(served: Served) -> None:
    async with connected(served) as client:
        client.send("/raw/echo", b"body", "HEAD")
        assert (await client.answer(with_body=False))[1]["content-length"] == "4"
        client.send("/raw/echo", b"body", connection="close")
        _, headers, body = await client.answer()
        assert (headers["connection"], body, await client.closed()) == ("close", b"body", b"")


async def test_an_endless_head_is_refused(served: Served) -> None:
    for target in ("/raw/now", "/usual"):
        async with connected(served) as client:
            client.send(target, b"", "POST", **{f"x-{n}": "y" * 1_000 for n in range(40)})
            await client.answer()
            client.writer.write(f"POST {target} HTTP/1.1\r\n".encode())
            for n in range(64):
                client.writer.write(b"x-%d: %b\r\n" % (n, b"y" * raw.MAX_HEAD_BYTES))
            try:
                rest = await client.closed()
            except ConnectionError:
                rest = b""  # the server closed with unread bytes in its socket
            assert not rest or rest.startswith(b"HTTP/1.1 431 ")


async def test_the_answer_to_a_client_that_has_left_goes_nowhere(served: Served) -> None:
    async with connected(served) as client:
        client.send("/raw/later")
        request = await served.later()
    while not request.disconnected:
        await asyncio.sleep(0)
    request.answer()
    async with connected(served) as client:
        client.send("/raw/echo", b"x")
        assert (await client.answer())[2] == b"x"


async def test_a_client_that_does_not_read_its_answers_is_cut_off(served: Served) -> None:
    async with connected(served) as client:
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(30):
                while True:
                    client.send("/raw/echo", b"x" * 1_000)
                    await client.writer.drain()


async def test_stopping_lets_a_request_finish(served: Served) -> None:
    async with connected(served) as client:
        client.send("/raw/later")
        request = await served.later()
        stopping = asyncio.create_task(served.server.stop())
        while request.keep_alive:
            await asyncio.sleep(0)
        request.answer()
        assert (await client.answer())[1]["connection"] == "close"
        await stopping


@pytest.mark.parametrize("path", ["/raw/echo", "/usual"])
async def test_before_a_stop_each_answer_closes_its_connection(served: Served, path: str) -> None:
    async with connected(served) as client:
        client.send(path)
        assert "connection" not in (await client.answer())[1]
        served.draining = True
        client.send(path)
        assert (await client.answer())[1]["connection"] == "close"
        assert await client.closed() == b""
