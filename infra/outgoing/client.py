"""HTTP to the outside world: to vendors, models, tools, any address that a tenant has set up.

Every connection passes the guard against requests into the inner network (SSRF): a name is resolved once, all of its
addresses are checked, and the connection goes to one of these. So a name cannot change its address after the check.
Redirects are not followed, the environment's proxies are not used, and our trace context is not sent to strangers.
Headers, bodies and URLs are never logged, and a span shows only the origin of a URL: paths and queries hold secrets.

The other side may be a tenant's server that wants to harm. Its bytes and their pieces are bounded, whether or not they
become a body, and tenants share connections and look-ups of names (`infra.outgoing.shares`).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import httpcore2
import httpx2
from opentelemetry.trace import Span, SpanKind, StatusCode

from infra import VERSION
from infra.errors import InvalidMessage, TooLarge, Transient, Unanswered
from infra.observe import telemetry
from infra.outgoing.addresses import is_private, is_public
from infra.outgoing.shares import Shares, tenant

DEFAULT_TIMEOUT = 30.0
CONNECT_TIMEOUT = 10.0
DEFAULT_MAX_BYTES = 4 * 1024 * 1024
MAX_CLIENT_BYTES = 64 * 1024 * 1024
"""Of one answer to a provider's library, streams included."""
MAX_HEAD_BYTES = 64 * 1024
"""Of all that comes before an answer's body, interim answers (1xx) included."""
MIN_PIECE_BYTES = 256
"""A piece of a body costs as much as this many bytes, however small it is."""
# One turn of the event loop parses so many bytes.
_READ_BYTES = 16 * 1024
CONNECTIONS = 1000
# Threads that wait for the name servers of tenants. A name server that says nothing holds one for half a minute.
LOOKUPS = 64
# Charsets of host names that Python decodes in quadratic time: a few hundred kilobytes would take minutes.
_QUADRATIC_CODECS = ("punycode", "idna")
# At a time.
_INFLATED_BYTES = 256 * 1024
_OF_THE_CODED_BODY = (b"content-encoding", b"content-length")
KEEPALIVE_SECONDS = 3.0
"""Servers close an idle connection after five seconds or more. A request on a connection that the server is closing may
or may not be handled, so this side closes idle connections first."""


@dataclass(frozen=True)
class Answer:
    """The answer of the other side, errors included."""

    status: int
    headers: httpx2.Headers
    """Found by names in upper or lower case."""
    body: bytes
    """Decompressed."""


class Outgoing:
    """The outgoing HTTP of this process. `allow_private`: private and loopback addresses may be called too."""

    def __init__(self, allow_private: bool) -> None:
        # It logs a line per request at info, with the whole URL in it.
        logging.getLogger("httpx2").setLevel(logging.WARNING)
        self._guard = _Guard(allow_private)
        self._connections = _Connections(self._guard)
        self._places = Shares(CONNECTIONS)

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        json: Any = None,
        content: bytes | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        max_bytes: int = DEFAULT_MAX_BYTES,
        template: str | None = None,
        body_matters: bool = True,
    ) -> Answer:
        """Sends one request and reads its answer, of any status.

        body_matters: if False, an answer whose body is too large, too slow or broken is one with an empty body.
        timeout: seconds, from name resolution to the end of the body. max_bytes: limit of the decompressed body.
        template: the path as a trace may show it, such as ``/bot{token}/sendMessage``.

        Raises InvalidMessage (field ``url``) for a malformed or forbidden address, (field ``headers``) for headers that
        HTTP does not allow; TooLarge; Transient if nothing was sent; Unanswered if the request may have arrived and no
        whole answer came back.
        """
        target = _parse(url)
        progress = _Progress()
        response = None
        # An httpx2 client would keep cookies, so the transport is called directly.
        defaults = {"user-agent": f"clawbus/{VERSION}", "accept": "*/*", "accept-encoding": "gzip, deflate"}
        extensions = {
            "timeout": httpx2.Timeout(timeout, connect=min(CONNECT_TIMEOUT, timeout)).as_dict(),
            "trace": progress,
            "max_bytes": max_bytes,
            "template": template,
        }
        try:
            all_headers = defaults | {name.lower(): value for name, value in (headers or {}).items()}
            request = httpx2.Request(
                method, target, headers=all_headers, json=json, content=content, extensions=extensions
            )
            async with asyncio.timeout(timeout):
                response = await self.transport().handle_async_request(request)
                try:
                    body = b"".join([part async for part in response.aiter_bytes()])
                finally:
                    await response.aclose()
        except (httpx2.LocalProtocolError, UnicodeEncodeError):
            # The error's text would show the header, which may be a secret.
            raise InvalidMessage("headers", "a name or value has characters that HTTP does not allow") from None
        except (httpx2.TransportError, httpx2.DecodingError, TimeoutError, TooLarge) as error:
            if response is not None and not body_matters:
                return Answer(response.status_code, response.headers, b"")
            if isinstance(error, TooLarge):
                raise
            reason = f"{target.host}: {type(error).__name__}"
            raise (Unanswered if progress.sent else Transient)(reason) from error
        return Answer(response.status_code, response.headers, body)

    async def check(self, url: str) -> None:
        """Checks an address when a tenant sets it up. Raises InvalidMessage and Transient as `request` does before it
        connects."""
        parsed = _parse(url)
        host = parsed.raw_host.decode()
        try:
            await self._guard.addresses(host, 443 if parsed.port is None else parsed.port)
        except httpcore2.ConnectError as error:
            raise Transient(f"{host}: {error}") from error

    def transport(self) -> httpx2.AsyncBaseTransport:
        """The transport for a library's own httpx2 client: the same guard, limits and spans.

        It raises httpx2's errors, and InvalidMessage and TooLarge as `request` does; a library may wrap them.
        """
        return _Transport(self._connections, self._places)

    def client(self, timeout: float = DEFAULT_TIMEOUT) -> httpx2.AsyncClient:
        """A client for a provider's library, which may close it. `timeout`: seconds between two received parts."""
        return httpx2.AsyncClient(
            transport=self.transport(),
            timeout=httpx2.Timeout(timeout, connect=CONNECT_TIMEOUT),
            # No cookies are kept, because tenants share the client.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        )

    async def close(self) -> None:
        """Closes all connections."""
        await self._connections.aclose()


def _parse(url: str) -> httpx2.URL:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise InvalidMessage("url", str(error)) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise InvalidMessage("url", "must begin with http:// or https:// and a host")
    if parsed.userinfo:
        raise InvalidMessage("url", "must not hold a user or password; they belong in a header")
    return parsed


class _Progress:
    """Learns from httpcore whether a request was sent."""

    def __init__(self) -> None:
        self.sent = False

    async def __call__(self, event: str, _: object) -> None:
        if event == "http11.send_request_headers.started":
            self.sent = True


class _Guard(httpcore2.AsyncNetworkBackend):
    """Connects to checked addresses only. TLS is still verified for the name, by the caller, on the stream returned."""

    def __init__(self, allow_private: bool) -> None:
        self._allow_private = allow_private
        self._backend = httpcore2.AnyIOBackend()
        self._lookups = Shares(LOOKUPS)
        # Of its own: in the event loop's few threads, slow name servers would stop all other work there.
        self._threads = ThreadPoolExecutor(LOOKUPS, "lookup")

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        deadline = time.monotonic() + (CONNECT_TIMEOUT if timeout is None else timeout)
        addresses = await self.addresses(host, port)
        for n, address in enumerate(addresses):
            # The rest of the time is divided among the remaining addresses.
            share = max(0.0, deadline - time.monotonic()) / (len(addresses) - n)
            try:
                stream = await self._backend.connect_tcp(address, port, share, local_address, socket_options)
                return _Stream(stream)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if n + 1 == len(addresses):
                    raise
        raise AssertionError("unreachable")

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def addresses(self, host: str, port: int) -> list[str]:
        """The addresses of `host`. Raises InvalidMessage if one of them may not be called or `port` is none,
        ConnectError if the name does not resolve."""
        if not 1 <= port <= 65_535:
            raise InvalidMessage("url", "its port must be from 1 to 65535")
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                found = await self._look_up(host, port)
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(f"the name does not resolve ({error})") from error
        addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
        if not all(self._allowed(ip_address(address)) for address in addresses):
            # The text does not show the address: it would reveal the inner network.
            raise InvalidMessage("url", "the host is not on the public internet")
        return addresses

    async def _look_up(self, host: str, port: int) -> list[Any]:
        whose, loop = tenant.get(), asyncio.get_running_loop()
        await self._lookups.take(whose)
        lookup = self._threads.submit(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)

        def give_back(_: object) -> None:
            # A thread cannot be cancelled: it holds its place until the resolver gives up.
            with suppress(RuntimeError):  # the process ends
                loop.call_soon_threadsafe(self._lookups.give, whose)

        lookup.add_done_callback(give_back)
        return await asyncio.wrap_future(lookup)

    def _allowed(self, address: IPv4Address | IPv6Address) -> bool:
        return is_public(address) or (self._allow_private and is_private(address))


class _Stream(httpcore2.AsyncNetworkStream):
    """A connection on which a server cannot send without end: interim answers, chunk extensions, coded emptiness."""

    def __init__(self, inner: httpcore2.AsyncNetworkStream) -> None:
        self._inner = inner
        self.left = MAX_HEAD_BYTES
        """The bytes that may still come for this request."""

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        data = await self._inner.read(min(max_bytes, _READ_BYTES), timeout)
        self.left -= len(data)
        if self.left < 0:
            raise TooLarge("answer: more bytes than its content can have")
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.left = MAX_HEAD_BYTES
        await self._inner.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._inner.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.AsyncNetworkStream:
        return _Stream(await self._inner.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _Connections(httpx2.AsyncHTTPTransport):
    """httpx2's transport over a pool that connects through the guard; its own constructor does not take a backend."""

    def __init__(self, guard: _Guard) -> None:
        # SSL_CERT_FILE is honoured, so that a company can add its own certificate authority.
        tls = httpx2.create_ssl_context()
        super().__init__(verify=tls)
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls,
            max_connections=CONNECTIONS,
            max_keepalive_connections=100,
            keepalive_expiry=KEEPALIVE_SECONDS,
            network_backend=guard,
        )


class _Transport(httpx2.AsyncBaseTransport):
    """A span, limits and the tenant's place around each request. Closing it does not close the shared connections."""

    def __init__(self, connections: _Connections, places: Shares) -> None:
        self._connections = connections
        self._places = places

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        whose = tenant.get()
        async with AsyncExitStack() as opened:
            try:
                async with asyncio.timeout(request.extensions.get("timeout", {}).get("pool")):
                    await self._places.take(whose)
            except TimeoutError as error:
                raise httpx2.PoolTimeout("the tenant's other requests have all its connections") from error
            opened.callback(self._places.give, whose)
            span = _span(request)
            opened.callback(span.end)
            try:
                response = await self._connections.handle_async_request(request)
                opened.push_async_callback(response.aclose)
                codings = response.headers.get_list("content-encoding", split_commas=True)
                if len(codings) > 1:
                    # Each coding may multiply its input by a thousand, and the last one may have no output: a few
                    # kilobytes would stop the event loop for minutes, and no limit of size or time would end it.
                    raise httpx2.DecodingError("more than one content coding")
            except BaseException as error:
                _fail(span, error)
                raise
            span.set_attribute("http.response.status_code", response.status_code)
            if response.status_code >= 400:
                span.set_attribute("error.type", str(response.status_code))
                span.set_status(StatusCode.ERROR)
            max_bytes = request.extensions.get("max_bytes", MAX_CLIENT_BYTES)
            # Chunks of a few bytes have as many bytes of framing, and a coding may be longer than its content.
            response.extensions["network_stream"].left = 2 * max_bytes + MAX_HEAD_BYTES
            # The body is passed on decompressed, so these headers no longer describe it.
            headers = httpx2.Headers(
                [(name, value) for name, value in response.headers.raw if name.lower() not in _OF_THE_CODED_BODY]
            )
            type_ = headers.get("content-type", "")
            # With the star of RFC 2231 the name may be written in other signs.
            if "*" in type_ or any(codec in type_.lower() for codec in _QUADRATIC_CODECS):
                headers["content-type"] = type_.partition(";")[0]
            body = _Body(response.stream, span, max_bytes, opened.pop_all(), codings[0].lower() if codings else "")
            return httpx2.Response(response.status_code, headers=headers, stream=body, extensions=response.extensions)


class _Body(httpx2.AsyncByteStream):
    """The body, decompressed, with its limits. Closes everything that was `opened` for it."""

    def __init__(self, stream: Any, span: Span, max_bytes: int, opened: AsyncExitStack, coding: str) -> None:
        self._stream = stream
        self._span = span
        self._max_bytes = max_bytes
        self._opened = opened
        self._decode: Callable[[bytes], Iterable[bytes]] = (
            _Inflating(may_be_bare=coding == "deflate")
            if coding in ("gzip", "x-gzip", "deflate")
            else lambda piece: (piece,)
        )

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = pieces = 0
        most = 1000 + self._max_bytes // MIN_PIECE_BYTES
        try:
            async with aclosing(aiter(self._stream)) as sent:
                async for piece in sent:
                    pieces += 1
                    if pieces > most:
                        raise TooLarge(f"answer: in more than {most} pieces")
                    for part in self._decode(piece):
                        size += len(part)
                        if size > self._max_bytes:
                            raise TooLarge(f"answer: larger than the limit of {self._max_bytes} bytes")
                        yield part
        except Exception as error:
            _fail(self._span, error)
            raise

    async def aclose(self) -> None:
        await self._opened.aclose()


class _Inflating:
    """Decodes gzip and deflate in linear time. httpx2 collects all bytes behind the end, in quadratic time."""

    def __init__(self, *, may_be_bare: bool) -> None:
        """may_be_bare: some servers send deflate without zlib's frame."""
        self._inflate = zlib.decompressobj(zlib.MAX_WBITS | 32)
        self._may_be_bare = may_be_bare

    def __call__(self, piece: bytes) -> Iterator[bytes]:
        may_be_bare, self._may_be_bare = self._may_be_bare, False
        try:
            while not self._inflate.eof and (part := self._inflate.decompress(piece, _INFLATED_BYTES)):
                yield part
                piece = self._inflate.unconsumed_tail
        except zlib.error as error:
            if not may_be_bare:
                raise httpx2.DecodingError(str(error)) from error
            self._inflate = zlib.decompressobj(-zlib.MAX_WBITS)
            yield from self(piece)


def _span(request: httpx2.Request) -> Span:
    """A CLIENT span by the semantic conventions for HTTP, without the URL."""
    template = request.extensions.get("template")
    attributes: dict[str, telemetry.Value] = {
        "http.request.method": request.method,
        "server.address": request.url.host,
        "server.port": request.url.port or (443 if request.url.scheme == "https" else 80),
        "url.scheme": request.url.scheme,
    }
    if template:
        attributes["url.template"] = template
    name = f"{request.method} {template}" if template else request.method
    return telemetry.start_span(name, SpanKind.CLIENT, attributes=attributes)


def _fail(span: Span, error: BaseException) -> None:
    # Only the error's type: its text may hold the URL or a header.
    span.set_attribute("error.type", type(error).__qualname__)
    span.set_status(StatusCode.ERROR)
