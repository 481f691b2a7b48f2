"""Raw routes: path prefixes that the server's HTTP protocol hands to a plain function, for a hot path.

The function gets a complete request and answers it when it likes. No ASGI message, task or middleware is in between.
Keep-alive, pipelining and the graceful stop stay uvicorn's, and one connection may carry requests for raw routes and
for others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, cast
from urllib.parse import unquote

from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from infra.errors import TooLarge

MAX_HEAD_BYTES = 64 * 1024
"""Of the request line and the headers, counted in whole reads from the socket after the one in which they begin."""


class RawRoute(BaseRoute):
    """All paths below `prefix`. `handler` answers each request once, at once or later, and must not raise.

    It gets a request when its body is complete, or as soon as the body is known to have more than `max_body` bytes.
    """

    def __init__(self, prefix: str, handler: Callable[[RawRequest], None], *, max_body: int) -> None:
        self.start = f"{prefix}/".encode()
        self.handler = handler
        self.max_body = max_body

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        # Not a route of the ASGI application.
        return Match.NONE, {}


class RawRequest:
    """A request of a raw route. uvicorn's protocol has it in the place of its `RequestResponseCycle`."""

    message_event: ClassVar[asyncio.Event] = asyncio.Event()
    """uvicorn sets it. Nothing waits for it."""
    # uvicorn's protocol reads and writes these two.
    disconnected = False
    response_complete = False
    _body: bytes | bytearray = b""
    _is_whole = False
    _is_handled = False
    _is_too_large = False

    def __init__(self, protocol: RawProtocol, route: RawRoute, *, is_first: bool) -> None:
        """is_first: no earlier request of the connection waits for its answer."""
        parser = protocol.parser
        self.method: str = parser.get_method().decode()
        self.scheme: str = protocol.scheme or "http"
        """``http`` or ``https``."""
        self.keep_alive: bool = parser.should_keep_alive() and parser.get_http_version() != "1.0"
        self.is_first = is_first
        self._protocol = protocol
        self._route = route
        self._url = protocol.url
        self._headers: Sequence[tuple[bytes, bytes]] = protocol.headers

    @property
    def path(self) -> str:
        """Decoded."""
        path = self._url.partition(b"?")[0].decode("latin-1")
        return unquote(path) if "%" in path else path

    @property
    def query(self) -> str:
        """Not decoded."""
        return self._url.partition(b"?")[2].decode("latin-1")

    @property
    def headers(self) -> dict[str, str]:
        """Names in lower case. The values of a repeated header are joined, as RFC 9110 §5.3 says: so a second signature
        makes the first one wrong."""
        found = {name.decode("latin-1"): value.decode("latin-1") for name, value in self._headers}
        if len(found) < len(self._headers):
            values: dict[str, list[str]] = {}
            for name, value in self._headers:
                values.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
            found = {name: ", ".join(given) for name, given in values.items()}
        return found

    @property
    def body(self) -> bytes:
        """Raises TooLarge if it has more bytes than the route takes."""
        if self._is_too_large:
            raise TooLarge(f"body: must have at most {self._route.max_body} bytes")
        return bytes(self._body)

    def answer(self, response: Response | None = None) -> None:
        """Sends the answer; None is an empty 200. Does nothing if the client has left."""
        self.response_complete = True
        if not self.disconnected:
            self._protocol.send(response, with_body=self.method != "HEAD", keep_alive=self.keep_alive)

    def expect(self, size: int) -> None:
        """The body has, or is declared to have, so many bytes."""
        if size > self._route.max_body:
            self._is_too_large = True
            self._body = b""
            self._go_on()

    def add(self, part: bytes) -> None:
        if self._is_too_large:
            return
        if not self._body:
            self._body = part
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += part
        if len(self._body) > self._route.max_body:
            self.expect(len(self._body))

    def complete(self) -> None:
        self._is_whole = True
        self._go_on()

    def begin(self) -> None:
        """The earlier requests of the connection are answered."""
        self.is_first = True
        self._go_on()

    def _go_on(self) -> None:
        if self.is_first and not self._is_handled and (self._is_whole or self._is_too_large):
            self._is_handled = True
            self._route.handler(self)


class RawProtocol(HttpToolsProtocol):
    """uvicorn's protocol. It hands the requests of `routes` to their handlers, and all others to the application."""

    def __init__(self, *args: Any, routes: Sequence[RawRoute], draining: Callable[[], bool], **kwargs: Any) -> None:
        """draining: true when the server is about to stop. Each answer then closes its connection."""
        super().__init__(*args, **kwargs)
        self._routes = routes
        self._draining = draining
        self._common: Sequence[tuple[bytes, bytes]] = ()
        self._common_lines = self._empty_answer = b""
        self._head_bytes = 0
        self._in_head = False

    def data_received(self, data: bytes) -> None:
        head = self.headers
        super().data_received(data)
        # The same head as before: all of this read belongs to it.
        if self._in_head and self.headers is head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                # Without the limit one client could fill the memory.
                self.transport.write(STATUS_LINE[431] + b"content-length: 0\r\nconnection: close\r\n\r\n")
                self.transport.close()

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self._in_head = True
        self._head_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._in_head = False
        for route in self._routes:
            if self.url.startswith(route.start) and not self.parser.should_upgrade():
                self._receive(route)
                break
        else:
            self._pass_on()
        if self._draining():
            self.cycle.keep_alive = False

    def _pass_on(self) -> None:
        """Gives the request to uvicorn, which makes its scope from the parts of its head."""
        url, headers = self.url, self.headers
        super().on_message_begin()
        super().on_url(url)
        for name, value in headers:
            super().on_header(name, value)
        super().on_headers_complete()

    def _receive(self, route: RawRoute) -> None:
        before: Any = self.cycle
        request = RawRequest(self, route, is_first=before is None or before.response_complete)
        self.cycle: Any = request
        if not request.is_first:
            self.flow.pause_reading()
            self.pipeline.appendleft((cast(Any, request), self.app))
        for name, value in self.headers:
            if name == b"content-length":
                # The parser has checked that it is a number.
                request.expect(int(value))
        if (b"expect", b"100-continue") in self.headers and not request.response_complete:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        if isinstance(self.cycle, RawRequest):
            self.cycle.add(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if isinstance(self.cycle, RawRequest):
            self.cycle.complete()
        else:
            super().on_message_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        if isinstance(cycle, RawRequest):
            # Later: many requests of one read, each answered at once, would be a deep recursion.
            self.loop.call_soon(cycle.begin)
        else:
            super()._start_asgi_task(cycle, app)

    def send(self, response: Response | None, *, with_body: bool, keep_alive: bool) -> None:
        if self.flow.write_paused:
            # The client sends requests and does not read the answers.
            self.transport.abort()
            return
        if self._common is not self.server_state.default_headers:
            # uvicorn makes a new list each second.
            self._common = self.server_state.default_headers
            self._common_lines = _lines(self._common)
            self._empty_answer = STATUS_LINE[200] + self._common_lines + b"content-length: 0\r\n"
        if response is None:
            head = self._empty_answer
        else:
            head = STATUS_LINE[response.status_code] + self._common_lines + _lines(response.raw_headers)
        head += b"\r\n" if keep_alive else b"connection: close\r\n\r\n"
        self.transport.write(head + bytes(response.body) if response is not None and with_body else head)
        if not keep_alive:
            self.transport.close()
        self.on_response_complete()


def _lines(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    return b"".join([b"%b: %b\r\n" % header for header in headers])
