"""The HTTP server in the event loop of a service, and its WebSockets."""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import uvicorn
from starlette.types import ASGIApp
from starlette.websockets import WebSocket
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from infra.connections import TLS_FILES
from infra.web.http import MAX_BODY_BYTES
from infra.web.raw import RawProtocol, RawRoute

DRAIN_SECONDS = 10
IDLE_SECONDS = 5.0
"""Longer than the gateway keeps an idle connection."""
PING_SECONDS = 30.0
"""A WebSocket gets a ping this often."""
PONG_SECONDS = 60.0
"""A WebSocket that does not answer a ping in this time is closed."""

# The extension of a WebSocket's scope by which its transport is handed over.
_HAND_OVER = "claw.hand_over"


class Upgraded(Protocol):
    """The protocol of an accepted WebSocket, which takes the transport over from uvicorn."""

    def take_over(self, transport: asyncio.Transport, released: Callable[[], object]) -> None:
        """Must make itself the protocol of the transport, and call `released` when the connection has ended."""

    def shutdown(self) -> None:
        """The server stops: must close the connection."""


def hand_over(websocket: WebSocket, protocol: Upgraded) -> None:
    """Ends uvicorn's part in an accepted WebSocket. The ASGI application must return at once."""
    websocket.scope["extensions"][_HAND_OVER](protocol)


class _WebSocketHandshake(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, which can be handed over. uvicorn would keep a task, queues and timers for each socket."""

    async def run_asgi(self) -> None:
        extensions: dict[str, Any] = self.scope["extensions"]
        extensions[_HAND_OVER] = self._hand_over
        await super().run_asgi()
        # Without this reference cycle, the memory is free at once.
        del extensions[_HAND_OVER]

    def _hand_over(self, protocol: Upgraded) -> None:
        self.stop_keepalive()
        self.connections.discard(self)
        self.connections.add(cast(Any, protocol))
        protocol.take_over(self.transport, partial(self.connections.discard, cast(Any, protocol)))
        # uvicorn closes its transport when the application returns.
        self.transport = cast(asyncio.Transport, _NoTransport())


class _NoTransport:
    def close(self) -> None:
        pass


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers, which belong to the process, and with an event for its start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()


class HttpServer:
    """A running server. `port` is the bound port."""

    def __init__(self, server: _Server, task: asyncio.Task[None], port: int, *, shared: bool) -> None:
        self._server = server
        self._task = task
        self._shared = shared
        self.port = port

    async def stop(self) -> None:
        """Closes the listening socket, gives running requests ten seconds to finish, then cancels them.

        If the port is shared, the clients first close their idle connections. Otherwise a client could send a request
        on a connection that the server is closing, and would not know whether it was processed.
        """
        if self._shared:
            await self._wait_for_idle_clients()
        self._server.should_exit = True
        await self._task

    async def _wait_for_idle_clients(self) -> None:
        connections = self._server.server_state.connections
        ends = time.monotonic() + IDLE_SECONDS
        while connections and time.monotonic() < ends:  # noqa: ASYNC110 - uvicorn has no event for it
            await asyncio.sleep(0.1)


def _tls(folder: Path) -> dict[str, Any]:
    authority, certificate, key = (str(folder / name) for name in TLS_FILES)
    return {
        "ssl_ca_certs": authority,
        "ssl_certfile": certificate,
        "ssl_keyfile": key,
        "ssl_cert_reqs": ssl.CERT_REQUIRED,
    }


async def serve_http(
    app: ASGIApp,
    port: int,
    host: str = "127.0.0.1",
    tls: Path | None = None,
    *,
    raw: Sequence[RawRoute] = (),
    shared: bool = False,
    draining: Callable[[], bool] = lambda: False,
) -> HttpServer:
    """Serves `app` and the `raw` routes in this event loop; returns when the server accepts connections. Port 0 takes a
    free port.

    tls: the folder of its certificate; the clients have to show one of the same authority. shared: another process may
    listen on the same port. draining: true when the server is about to stop; each answer then closes its connection.

    Raises OSError naming an address that cannot be bound.
    """
    # asyncio sets TCP_NODELAY, without which small writes wait, only on a socket made with IPPROTO_TCP.
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"HTTP on {host}:{port}: {error.strerror}") from error
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        http=cast(Any, partial(RawProtocol, routes=raw, draining=draining)),
        ws=_WebSocketHandshake,
        # A message has the same limit as a body; a larger one closes its socket (1009).
        ws_max_size=MAX_BODY_BYTES,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=PONG_SECONDS,
        # Compression would need more memory than all other parts of a socket, and our messages are small.
        ws_per_message_deflate=False,
        **(_tls(tls) if tls else {}),
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve([sock]), name="http server")
    up = asyncio.create_task(server.up.wait())
    await asyncio.wait((task, up), return_when=asyncio.FIRST_COMPLETED)
    up.cancel()
    if task.done():
        task.result()
    return HttpServer(server, task, sock.getsockname()[1], shared=shared)
