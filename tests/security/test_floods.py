"""Requests that cost their sender little: bombs and floods below the level of operations, to the real services.

Each is refused or answered, no service fails, and the services answer the next request.
"""

from __future__ import annotations

import asyncio
import gzip
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import grpc
import httpx
import pytest
from websockets.asyncio.client import connect

from protos.plugin.v1 import plugin_pb2, plugin_pb2_grpc
from tests.security.furnished import CANARY, Furnished, asked
from tooling.stack.home import SERVICES
from tooling.testing import keys
from tooling.testing.platform import Platform

pytestmark = pytest.mark.asyncio(loop_scope="package")

BOMB = gzip.compress(b" " * 50_000_000)
JSON = {"content-type": "application/json"}


async def endless() -> AsyncIterator[bytes]:
    for _ in range(64):
        yield b" " * 2**16


HEADERS: dict[str, list[tuple[str, str]]] = {
    "many headers": [(f"x-{n}", "y") for n in range(5_000)],
    "a large header": [("x-large", "y" * 900_000)],
    "many cookies": [("cookie", f"a{n}=b;" * 50) for n in range(200)],
    "many ranges": [("range", "bytes=" + ",".join(f"{n}-{n}" for n in range(5_000)))],
    "many encodings": [("accept-encoding", ",".join(f"gzip;q=0.{n}" for n in range(5_000)))],
    "a large key": [("idempotency-key", "k" * 60_000)],
    "a large traceparent": [("traceparent", "00-" + "0" * 60_000), ("tracestate", "a=b," * 10_000)],
    "many forwarded": [("forwarded", "for=127.0.0.1," * 3_000), ("x-forwarded-for", "1.1.1.1," * 5_000)],
}


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("kind", HEADERS)
async def test_headers_are_refused_or_ignored(
    system: Platform, http: dict[str, httpx.AsyncClient], service: str, kind: str
) -> None:
    headers = [*system.headers("no-such-tenant").items(), *HEADERS[kind]]
    for path in ("/api/v1/nothing", "/readyz"):
        try:
            answer = await http[service].get(path, headers=headers)
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError):
            # The server closes a connection whose head is too large.
            continue
        assert answer.status_code < 500, answer.text
    assert (await http[service].get("/readyz")).status_code == 200


@pytest.mark.parametrize(
    ("service", "path"),
    [
        ("agent", "/api/v1/agents"),
        ("channel", "/api/v1/channels"),
        ("memory", "/api/v1/memories"),
        ("plugin", "/api/v1/plugins"),
        ("notification", "/api/v1/webhook-endpoints"),
        ("user", "/api/v1/api-keys"),
        ("ws_gateway", "/v1/chat/completions"),
        ("billing", "/api/v1/budgets"),
    ],
)
async def test_bodies_are_not_unpacked_and_end_at_their_limit(
    system: Platform, http: dict[str, httpx.AsyncClient], service: str, path: str
) -> None:
    who = system.headers("no-such-tenant")
    packed = await http[service].post(path, headers={**who, **JSON, "content-encoding": "gzip"}, content=BOMB)
    assert 400 <= packed.status_code < 500
    length = {**who, **JSON, "transfer-encoding": "chunked"}
    with suppress(httpx.ReadError, httpx.WriteError):
        # The server may close the connection before it has read all.
        large = await http[service].post(path, headers=length, content=endless())
        assert 400 <= large.status_code < 500
    assert (await http[service].get("/readyz")).status_code == 200


def forms() -> Iterator[tuple[str, bytes]]:
    part = b'--x\r\ncontent-disposition: form-data; name="a%d"\r\n\r\nb\r\n'
    yield "many parts", b"".join(part % n for n in range(20_000)) + b"--x--"
    yield "a large head", b'--x\r\ncontent-disposition: form-data; name="' + b"n" * 900_000 + b'"\r\n\r\nb\r\n--x--'
    yield "many heads", b"--x\r\n" + b"a: b\r\n" * 100_000 + b"\r\nb\r\n--x--"
    yield (
        "no end",
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.txt"\r\n\r\n' + b"\r\n--" * 200_000,
    )
    yield "a part in a part", b"--x\r\ncontent-type: multipart/mixed; boundary=x\r\n" * 20_000 + b"--x--"


FORMS = dict(forms())


@pytest.mark.parametrize("kind", FORMS)
async def test_forms_are_refused(
    system: Platform, http: dict[str, httpx.AsyncClient], other: Furnished, kind: str
) -> None:
    headers = {**system.headers(other.id), "content-type": "multipart/form-data; boundary=x"}
    answer = await http["memory"].post("/api/v1/documents", headers=headers, content=FORMS[kind])
    assert 400 <= answer.status_code < 500, answer.text


async def test_the_charset_of_a_form_is_utf_8(
    system: Platform, http: dict[str, httpx.AsyncClient], other: Furnished
) -> None:
    """Python decodes punycode in quadratic time: a field of a megabyte would stop the service for a minute."""
    body = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.txt"\r\n\r\nabc\r\n--x--\r\n'
    for charset in ("punycode", "PunyCode.", "utf-16", '"idna"'):
        headers = {**system.headers(other.id), "content-type": f"multipart/form-data; boundary=x; charset={charset}"}
        answer = await http["memory"].post("/api/v1/documents", headers=headers, content=body)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (415, "content-type"), answer.text


async def test_a_search_of_log_lines_stays_within_its_tenant(system: Platform, other: Furnished) -> None:
    stranger = (await asked(system, "user", "", "POST", "/api/v1/tenants", {"name": "Searcher"}))["id"]
    for q in (
        *("*", "**", "?", f"tenant:{other.id}", f'text:"{CANARY}"', f"(a OR b) | {CANARY}", f"-x | tenant:{other.id}"),
        *(
            "_exists_:tenant",
            "/.*/",
            "a~100",
            f"{CANARY[:6]}*",
            '"' * 499,
            "(" * 499,
            "+" * 499,
            "a " * 249,
            "\\" * 499,
        ),
    ):
        found = await asked(system, "log_aggregator", stranger, "GET", "/api/v1/logs", params={"q": q})
        assert other.id not in str(found)
        assert CANARY not in str(found)


async def test_a_service_outlives_floods_of_metadata_and_large_messages(system: Platform) -> None:
    token = keys.callers("agent").token("plugin", "no-such-tenant")
    own = ("authorization", f"Bearer {token}")
    request = plugin_pb2.ToolsRequest(names=["a"])
    floods: list[tuple[Any, list[tuple[str, str | bytes]]]] = [
        (request, [own, *((f"x-{n}", "y" * 100) for n in range(500))]),
        (request, [own, ("x-large", "y" * 500_000)]),
        (request, [own, ("traceparent", "0" * 5_000), ("x-bin", os.urandom(5_000))]),
        (request, [("authorization", "Bearer " + "a." * 3_000)]),
        (plugin_pb2.ToolsRequest(names=["a" * 100] * 100_000), [own]),
    ]
    async with grpc.aio.insecure_channel(system.grpc("plugin")) as channel:
        stub = plugin_pb2_grpc.PluginStub(channel)

        async def code(message: Any, metadata: list[tuple[str, str | bytes]]) -> grpc.StatusCode:
            try:
                await stub.Tools(message, metadata=metadata, timeout=60)
            except grpc.aio.AioRpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        codes = await asyncio.gather(*(code(*flood) for flood in floods for _ in range(5)))
        assert not {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN} & {*codes}
        await stub.Tools(request, metadata=[own], timeout=60)


async def test_a_socket_does_not_compress(system: Platform, other: Furnished) -> None:
    url = f"{system.url('ws_gateway').replace('http', 'ws', 1)}/ws"
    async with connect(url, additional_headers=system.headers(other.id), proxy=None, compression="deflate") as socket:
        assert socket.protocol.extensions == []
