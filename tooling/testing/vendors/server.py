"""The HTTP server behind every stand-in. Written on sockets, because a framework would not cut its own answer off."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from http import HTTPStatus
from types import TracebackType
from typing import Any, NamedTuple, Self

import msgspec


class Call(NamedTuple):
    """A request as it came; names of `headers` in lower case."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


class Accepted(NamedTuple):
    """A message that the vendor took: to whom, the text as it would be shown, its id, all that was sent, and when
    (Unix seconds)."""

    to: str
    text: str
    id: str
    fields: Mapping[str, Any]
    at: float


class Reply(NamedTuple):
    status: int
    body: Any
    headers: Mapping[str, str] = {}


class Fault(NamedTuple):
    """What happens to one request instead of an answer, or instead of the right one.

    accept: the message is taken first, and whoever sent it does not hear of it.
    wait: before anything is answered.
    late: after that it is handled as ever.
    """

    reply: Reply | None = None
    accept: bool = False
    wait: asyncio.Event | None = None
    late: bool = False


class Refused(Exception):
    """The vendor does not take this request; `reply` says so in the vendor's words."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.body)
        self.reply = reply


def answer(status: int, body: Any = None, **headers: str) -> Fault:
    """This status instead of taking the message. `headers`: ``retry_after="2"`` is ``Retry-After: 2``."""
    return Fault(Reply(status, body, {name.replace("_", "-"): value for name, value in headers.items()}))


def cut(*, accept: bool) -> Fault:
    """The connection is closed without an answer."""
    return Fault(accept=accept)


def hang(*, accept: bool) -> Fault:
    """No answer, and the connection stays open until the stand-in is closed."""
    return Fault(accept=accept, wait=asyncio.Event())


def hold(until: asyncio.Event) -> Fault:
    """Nothing happens until the event is set; then it is handled as ever."""
    return Fault(wait=until, late=True)


class StandIn(ABC):
    """One vendor account. ``async with`` serves it at `url`, a free port of the loopback interface.

    ledger: what was accepted, in order. refusals: what was not, and why; a correct client leaves it empty but for
    what a test provokes. faults: what happens to the next requests, each to one.
    """

    def __init__(self) -> None:
        self.ledger: list[Accepted] = []
        self.refusals: list[str] = []
        self.faults: deque[Fault] = deque()
        self.calls = 0
        self.url = ""
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @abstractmethod
    def take(self, call: Call) -> Reply:
        """Accepts a message into the ledger. Raises Refused."""

    def accepted(self, to: str, text: str, id_: str, fields: Mapping[str, Any]) -> None:
        self.ledger.append(Accepted(to, text, id_, fields, time.time()))

    def texts(self, to: str | None = None) -> list[str]:
        """What a person would see, in order; of one conversation, or of all."""
        return [message.text for message in self.ledger if to in (None, message.to)]

    async def __aenter__(self) -> Self:
        return await self.start()

    async def start(self, port: int = 0) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", port, limit=2**21)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Closes all connections; hanging ones too."""
        assert self._server is not None
        self._server.close()
        for connection in list(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (call := await _read(reader)) and (reply := await self._handle(call)):
                writer.write(_bytes(reply))
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            # The other side is gone, or this one is being closed.
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _handle(self, call: Call) -> Reply | None:
        """The answer; None cuts the connection off."""
        self.calls += 1
        fault = self.faults.popleft() if self.faults else Fault(late=True)
        if fault.accept:
            self._take(call)
        if fault.wait:
            await fault.wait.wait()
        return self._take(call) if fault.late else fault.reply

    def _take(self, call: Call) -> Reply:
        try:
            return self.take(call)
        except Refused as refused:
            self.refusals.append(f"{refused.reply.status} {refused.reply.body}")
            return refused.reply


async def _read(reader: asyncio.StreamReader) -> Call | None:
    head = await reader.readuntil(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
    return Call(method, path, headers, await reader.readexactly(int(headers.get("content-length", "0"))))


def _bytes(reply: Reply) -> bytes:
    body = b"" if reply.body is None else msgspec.json.encode(reply.body)
    head = f"HTTP/1.1 {reply.status} {HTTPStatus(reply.status).phrase}\r\ncontent-length: {len(body)}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in reply.headers.items())
    return head.encode() + b"content-type: application/json\r\n\r\n" + body
