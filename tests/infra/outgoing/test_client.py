"""Outgoing requests: allowed addresses, limits, spans and logs without secrets, and the meaning of a failure."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import httpx2
import openai
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from infra.clock import utcnow
from infra.errors import InvalidMessage, TooLarge, Transient, Unanswered
from infra.observe import telemetry
from infra.observe.spans import encode
from infra.outgoing.client import Outgoing, _Inflating

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Server:
    """A server that answers each request with `answer`, or by calling it, and keeps the heads of all requests."""

    def __init__(self, answer: bytes | Callable[[asyncio.StreamWriter], Awaitable[None]], host: str) -> None:
        self.answer = answer
        self.host = host
        self.heads: list[str] = []
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.heads.append(head.decode())
                if not isinstance(self.answer, bytes):
                    return await self.answer(writer)
                writer.write(self.answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            writer.close()


@asynccontextmanager
async def serving(
    answer: bytes | Callable[[asyncio.StreamWriter], Awaitable[None]] = OK,
    host: str = "127.0.0.1",
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Server]:
    server = Server(answer, host)
    listener = await asyncio.start_server(server.handle, host, 0, ssl=tls)
    server.port = listener.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listener.close()


@asynccontextmanager
async def outgoing(*, allow_private: bool = True) -> AsyncIterator[Outgoing]:
    made = Outgoing(allow_private)
    try:
        yield made
    finally:
        await made.close()


class Resolver:
    """A resolver that returns one list of addresses after the other, and then the last one again."""

    def __init__(self) -> None:
        self.answers: dict[str, list[list[str]]] = {}
        self.asked: list[str] = []

    def __call__(self, host: str, port: int, *arguments: Any, **options: Any) -> Any:
        if host not in self.answers:
            return _getaddrinfo(host, port, *arguments, **options)
        self.asked.append(host)
        answers = self.answers[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]


_getaddrinfo = socket.getaddrinfo


@pytest.fixture
def resolver(monkeypatch: pytest.MonkeyPatch) -> Resolver:
    resolver = Resolver()
    monkeypatch.setattr(socket, "getaddrinfo", resolver)
    return resolver


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    running = telemetry.setup("agent", "1", None, processor=SimpleSpanProcessor(exporter))
    yield exporter
    running.shutdown()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]"])
async def test_addresses_of_the_inner_network_are_refused(host: str) -> None:
    async with serving() as server, outgoing(allow_private=False) as http:
        url = f"http://{host}:{server.port}/"
        for call in (lambda: http.request("GET", url), lambda: http.check(url), lambda: http.client().get(url)):
            with pytest.raises(InvalidMessage) as refused:
                await call()
            assert refused.value.field == "url"
        assert server.heads == []


async def test_the_library_of_a_provider_cannot_reach_the_inner_network() -> None:
    async with serving() as server, outgoing(allow_private=False) as http:
        client = openai.AsyncOpenAI(api_key="k", base_url=f"{server.url}/v1", http_client=http.client(), max_retries=0)
        with pytest.raises(InvalidMessage):
            await client.models.list()
        assert server.heads == []


async def test_allowed_private_targets_do_not_include_the_clouds_metadata() -> None:
    async with serving() as server, outgoing(allow_private=True) as http:
        assert (await http.request("GET", server.url)).body == b"ok"
        with pytest.raises(InvalidMessage):
            await http.request("GET", "http://169.254.169.254/latest/meta-data")


async def test_a_name_is_resolved_once_and_the_checked_address_is_called(resolver: Resolver) -> None:
    async with serving() as server, serving(host="127.0.0.2") as other, outgoing() as http:
        resolver.answers["vendor.example"] = [["127.0.0.1"], ["127.0.0.2"]]
        answer = await http.request("GET", f"http://vendor.example:{server.port}/")
        assert answer.body == b"ok"
        assert resolver.asked == ["vendor.example"]
        assert f"host: vendor.example:{server.port}" in server.heads[0].lower()
        assert other.heads == []


async def test_a_name_with_one_private_address_among_public_ones_is_refused(resolver: Resolver) -> None:
    async with serving() as server, outgoing(allow_private=False) as http:
        resolver.answers["vendor.example"] = [["1.1.1.1", "127.0.0.1"]]
        with pytest.raises(InvalidMessage):
            await http.request("GET", f"http://vendor.example:{server.port}/")
        assert server.heads == []


async def test_the_next_address_is_tried_if_the_first_does_not_answer(resolver: Resolver) -> None:
    async with serving() as server, outgoing() as http:
        resolver.answers["vendor.example"] = [["127.0.0.3", "127.0.0.1"]]
        assert (await http.request("GET", f"http://vendor.example:{server.port}/")).status == 200


async def test_tls_is_verified_for_the_name_and_not_for_the_address(
    resolver: Resolver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    async with serving(tls=certified("vendor.example", tmp_path)) as server, outgoing() as http:
        resolver.answers = {"vendor.example": [["127.0.0.1"]], "other.example": [["127.0.0.1"]]}
        assert (await http.request("GET", f"https://vendor.example:{server.port}/")).body == b"ok"
        with pytest.raises(Transient):
            await http.request("GET", f"https://other.example:{server.port}/")
        assert len(server.heads) == 1


async def test_redirects_are_answers() -> None:
    async with serving() as inside, outgoing() as http:
        redirect = f"HTTP/1.1 302 Found\r\nlocation: {inside.url}\r\ncontent-length: 0\r\n\r\n".encode()
        async with serving(redirect) as server:
            answer = await http.request("GET", server.url)
            assert (answer.status, answer.headers["Location"]) == (302, inside.url)
            assert (await http.client().get(server.url)).status_code == 302
        assert inside.heads == []


async def test_the_environments_proxies_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server, serving() as proxy, outgoing() as http:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        await http.request("GET", server.url)
        await http.client().get(server.url)
        assert (len(server.heads), proxy.heads) == (2, [])


async def test_cookies_of_one_tenants_request_are_not_sent_with_anothers() -> None:
    cookie = b"HTTP/1.1 200 OK\r\nset-cookie: session=mine; Path=/\r\ncontent-length: 0\r\n\r\n"
    async with serving(cookie) as server, outgoing() as http:
        client = http.client()
        for _ in range(2):
            await http.request("GET", server.url)
            await client.get(server.url)
        assert not [head for head in server.heads if "cookie" in head.lower()]


@pytest.mark.parametrize("kind", ["long", "endless", "bomb"])
async def test_an_answer_beyond_the_limit_is_cut_off(kind: str) -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            await writer.drain()

    def whole(body: bytes, *headers: str) -> bytes:
        head = ["HTTP/1.1 200 OK", f"content-length: {len(body)}", *headers]
        return "\r\n".join([*head, "", ""]).encode() + body

    answers: dict[str, bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]] = {
        "long": whole(bytes(100_001)),
        "endless": endless,
        "bomb": whole(gzip.compress(bytes(50_000_000)), "content-encoding: gzip"),
    }
    async with serving(answers[kind]) as server, outgoing() as http:
        with pytest.raises(TooLarge, match="100000"):
            await http.request("GET", server.url, max_bytes=100_000)


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n"


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


EMPTY_GZIP = zlib.compressobj(wbits=31).flush(zlib.Z_SYNC_FLUSH)
FLOODS = {
    "interim answers": (b"", b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1_000, "more bytes"),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"a:\r\n" * 1_000, "more bytes"),
    "chunks of one byte": (CHUNKED + b"\r\n", b"1\r\na\r\n" * 1_000, "pieces"),
    "extensions of chunks": (CHUNKED + b"\r\n", b"1;" + b"a" * 60_000 + b"\r\na\r\n", "more bytes"),
    "gzip of nothing": (
        CHUNKED + b"content-encoding: gzip\r\n\r\n" + chunk(EMPTY_GZIP),
        chunk(b"\0\0\0\xff\xff" * 10_000),
        "more bytes",
    ),
    "bytes behind the end of gzip": (
        CHUNKED + b"content-encoding: gzip\r\n\r\n" + chunk(gzip.compress(b"x")),
        chunk(b"z" * 60_000),
        "more bytes",
    ),
}


@pytest.mark.parametrize("flood", FLOODS)
async def test_what_does_not_become_a_body_is_bounded_too(flood: str) -> None:
    begin, endless, reason = FLOODS[flood]
    sent = 0

    async def send(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(begin)
        while True:
            writer.write(endless)
            await writer.drain()
            sent += len(endless)

    async with serving(send) as server, outgoing() as http:
        with pytest.raises(TooLarge, match=reason):
            await http.request("GET", server.url, max_bytes=100_000)
        # The sockets hold some of it.
        assert sent < 8_000_000


async def test_what_follows_the_end_of_gzip_costs_linear_time() -> None:
    inflate = _Inflating(may_be_bare=False)
    assert b"".join(inflate(gzip.compress(b"x"))) == b"x"
    began = time.process_time()
    for _ in range(1_000):
        assert b"".join(inflate(bytes(16_384))) == b""
    assert time.process_time() - began < 0.5


async def test_a_coding_that_was_not_asked_for_is_not_decoded() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 2\r\n\r\nok"
    async with serving(answer) as server, outgoing() as http:
        assert (await http.request("GET", server.url)).body == b"ok"


@pytest.mark.parametrize("wbits", [31, 15, -15])
async def test_gzip_and_both_kinds_of_deflate_are_decoded(wbits: int) -> None:
    coder = zlib.compressobj(wbits=wbits)
    body = coder.compress(b"plain" * 200_000) + coder.flush()
    coding = "gzip" if wbits == 31 else "deflate"
    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: {coding}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    async with serving(head + body) as server, outgoing() as http:
        assert (await http.request("GET", server.url)).body == b"plain" * 200_000


@pytest.mark.parametrize(
    "codings", ["content-encoding: gzip, gzip", "content-encoding: gzip\r\ncontent-encoding: gzip"]
)
async def test_an_answer_in_two_codings_is_refused_before_it_is_unpacked(codings: str) -> None:
    body = gzip.compress(gzip.compress(b"plain"))
    head = f"HTTP/1.1 200 OK\r\n{codings}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    async with serving(head + body) as server, outgoing() as http:
        with pytest.raises(Unanswered, match="DecodingError"):
            await http.request("GET", server.url)
        with pytest.raises(httpx2.DecodingError):
            await http.client().get(server.url)


@pytest.mark.parametrize(
    "charset", ["charset=punycode", 'Charset="PunyCode"', "charset*=utf-8''%70unycode", "charset=idna"]
)
async def test_no_text_is_decoded_in_a_charset_that_takes_quadratic_time(charset: str) -> None:
    head = f"HTTP/1.1 200 OK\r\ncontent-type: text/html; {charset}\r\ncontent-length: 6\r\n\r\n".encode()
    async with serving(head + b"abc-1a") as server, outgoing() as http:
        assert (await http.client().get(server.url)).text == "abc-1a"
        assert (await http.request("GET", server.url)).headers["content-type"] == "text/html"


async def test_a_compressed_answer_comes_out_plain() -> None:
    body = gzip.compress(b"plain" * 1000)
    head = f"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    async with serving(head + body) as server, outgoing() as http:
        assert (await http.request("GET", server.url)).body == b"plain" * 1000
        assert (await http.client().get(server.url)).content == b"plain" * 1000


async def test_failures_say_whether_the_request_may_have_arrived() -> None:
    async def hang_up(writer: asyncio.StreamWriter) -> None:
        return

    async def say_nothing(writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(60)

    async def stop_half_way(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf")
        await writer.drain()

    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        async with outgoing() as http:
            with pytest.raises(Transient):
                await http.request("POST", f"http://127.0.0.1:{unused.getsockname()[1]}/")
            with pytest.raises(Transient):
                await http.request("POST", "http://no-such-name.invalid/")
            for answer in (hang_up, say_nothing, stop_half_way, b"no HTTP at all\r\n\r\n"):
                async with serving(answer) as server:
                    with pytest.raises(Unanswered):
                        await http.request("POST", server.url, content=b"x", timeout=0.5)
                    assert len(server.heads) == 1


@pytest.mark.parametrize(
    "url", ["", "vendor.example", "ftp://vendor.example/", "file:///etc/passwd", "http://", "http://[::1"]
)
async def test_a_text_that_is_not_a_web_address_is_refused(url: str) -> None:
    async with outgoing() as http:
        with pytest.raises(InvalidMessage) as refused:
            await http.request("GET", url)
        assert refused.value.field == "url"


@pytest.mark.parametrize("port", ["65536", "99999", "-1", "9" * 20])
async def test_a_port_that_no_host_has_is_refused_also_when_an_address_is_set_up(port: str) -> None:
    async with outgoing() as http:
        for call in (http.request("GET", f"http://127.0.0.1:{port}/"), http.check(f"http://127.0.0.1:{port}/")):
            with pytest.raises(InvalidMessage) as refused:
                await call
            assert (refused.value.field, refused.value.reason) == ("url", "its port must be from 1 to 65535")


async def test_credentials_in_a_url_are_refused_and_not_shown() -> None:
    async with outgoing() as http:
        with pytest.raises(InvalidMessage) as refused:
            await http.request("GET", "http://user:hunter2@vendor.example/")
        assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("value", ["Bearer hunter2\r\nx: y", "Bearer hunter2\x00", "Bearer hunter2 ünï 中"])
async def test_a_header_that_is_not_allowed_is_refused_and_not_shown(value: str) -> None:
    async with serving() as server, outgoing() as http:
        with pytest.raises(InvalidMessage) as refused:
            await http.request("GET", server.url, headers={"Authorization": value})
        assert "hunter2" not in str(refused.value)
        assert refused.value.__suppress_context__
        assert server.heads == []


async def test_a_span_describes_the_request_and_holds_no_secret(spans: InMemorySpanExporter) -> None:
    async with serving() as server, outgoing() as http:
        with telemetry.span("deliver"):
            await http.request(
                "POST",
                f"{server.url}/bot123:hunter2/sendMessage?access_token=hunter2",
                headers={"authorization": "hunter2"},
                json={"text": "hunter2"},
                template="/bot{token}/sendMessage",
            )
            await http.client().get(f"{server.url}/hunter2")
        named, plain, parent = spans.get_finished_spans()
        assert (named.name, plain.name) == ("POST /bot{token}/sendMessage", "GET")
        assert named.kind is SpanKind.CLIENT
        assert named.attributes == {
            "http.request.method": "POST",
            "server.address": "127.0.0.1",
            "server.port": server.port,
            "url.scheme": "http",
            "url.template": "/bot{token}/sendMessage",
            "http.response.status_code": 200,
        }
        assert named.parent is not None
        assert parent.context is not None
        assert named.parent.span_id == parent.context.span_id
        assert b"hunter2" not in encode(cast("Any", named)) + encode(cast("Any", plain))
        assert not [head for head in server.heads if "traceparent" in head.lower()]


async def test_a_failed_request_is_a_failed_span(spans: InMemorySpanExporter) -> None:
    refusal = b"HTTP/1.1 403 Forbidden\r\ncontent-length: 0\r\n\r\n"
    async with serving(refusal) as server, outgoing() as http:
        assert (await http.request("GET", server.url)).status == 403
    async with serving(b"nothing\r\n\r\n") as server, outgoing() as http:
        with pytest.raises(Unanswered):
            await http.request("GET", f"{server.url}/hunter2")
    refused, broken = spans.get_finished_spans()
    assert refused.attributes is not None
    assert broken.attributes is not None
    assert (refused.status.status_code, refused.attributes["error.type"]) == (StatusCode.ERROR, "403")
    assert (broken.status.status_code, broken.attributes["error.type"]) == (StatusCode.ERROR, "RemoteProtocolError")
    assert b"hunter2" not in encode(cast("Any", broken))


async def test_nothing_of_a_request_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        async with serving() as server, outgoing() as http:
            await http.request("GET", f"{server.url}/hunter2")
            await http.client().get(f"{server.url}/hunter2")
    assert "hunter2" not in caplog.text


async def test_a_library_that_closes_its_client_does_not_close_shared_connections() -> None:
    async with serving() as server, outgoing() as http:
        async with http.client() as client:
            await client.get(server.url)
        assert (await http.request("GET", server.url)).body == b"ok"


def certified(name: str, folder: Path) -> ssl.SSLContext:
    """TLS of a server for `name`, signed by an authority whose certificate is written to ``ca.pem``."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(utcnow() - timedelta(days=1))
        .not_valid_after(utcnow() + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")
    return context
