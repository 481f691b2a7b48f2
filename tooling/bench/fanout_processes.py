"""The processes of ``fanout`` besides the gateway.

``watch ws|plain <port> <bytes> <sockets per run> <deliveries per report> <run>…`` opens the sockets, by WebSocket to
the gateway or by TCP to the writer, and prints their number at each hundred. It counts text frames of that many bytes
and prints their number at each multiple of a report. For each line on stdin it prints the least and the most frames of
a socket per run.

``write <frame in hexadecimal>`` prints its port. For each line ``<from> <to>`` it writes the frame to all sockets of
these runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from typing import cast

import uvloop

from infra.security.auth import IDENTITY_HEADER, Identity
from tooling.testing.keys import identity_token

OPENING = 100
# One tenant alone would not get a place for each socket.
WHO = [Identity("api_key:bench", f"bench-{n}", frozenset({"read"}), "bench") for n in range(10)]
_HANDSHAKE = (
    "GET /ws HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n"
    "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n{}: {}\r\n\r\n"
)
# RFC 6455 §5.2: FIN with the opcodes of text, ping and pong.
_TEXT, _PING, _PONG = 0x81, 0x89, 0x8A


def frame(body: bytes) -> bytes:
    """A text frame as a server sends it."""
    if len(body) < 126:
        return bytes((_TEXT, len(body))) + body
    return bytes((_TEXT, 126)) + len(body).to_bytes(2, "big") + body


def _from_client(opcode: int, body: bytes) -> bytes:
    """A frame as a client sends it, of less than 126 bytes. Its mask is zero, so it leaves the bytes as they are."""
    return bytes((opcode, 0x80 | len(body), 0, 0, 0, 0)) + body


class Watch:
    """All sockets of the process, and the frames that each has received."""

    def __init__(self, length: int, report: int, runs: Sequence[str]) -> None:
        self.length = length
        self.report = report
        self.runs = runs
        self.had: list[list[int]] = [[] for _ in runs]
        self.total = 0

    def count(self, run: int, number: int) -> None:
        self.had[run][number] += 1
        self.total += 1
        if self.total % self.report == 0:
            _say(str(self.total))

    def ask(self) -> None:
        """Handles a line on stdin. End of file ends the process."""
        if not os.read(0, 100):
            os._exit(0)
        _say(json.dumps([[min(had), max(had)] for had in self.had]))


class Socket(asyncio.Protocol):
    """A socket that follows one run. The future `ready` is done after the server has confirmed it."""

    def __init__(self, watch: Watch, run: int, *, ws: bool) -> None:
        self._watch = watch
        self._run = run
        self._ws = ws
        self._number = len(watch.had[run])
        watch.had[run].append(0)
        self._left = b""
        self._upgraded = not ws
        self.ready = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._ws:
            self._transport.write(_HANDSHAKE.format(IDENTITY_HEADER, identity_token(WHO[self._run % 10])).encode())
        else:
            self._transport.write(b"%d\n" % self._run)

    def data_received(self, data: bytes) -> None:
        if self._left:
            data, self._left = self._left + data, b""
        if not self._upgraded:
            head, found, data = data.partition(b"\r\n\r\n")
            if not found or not head.startswith(b"HTTP/1.1 101"):
                raise SystemExit(f"the gateway refused the WebSocket: {head!r}")
            self._upgraded = True
            subscribe = json.dumps({"type": "subscribe", "run_id": self._watch.runs[self._run]})
            self._transport.write(_from_client(_TEXT, subscribe.encode()))
        at = 0
        while len(data) - at >= 4:
            begin, length = at + 2, data[at + 1]
            if length == 126:
                begin, length = at + 4, int.from_bytes(data[at + 2 : at + 4], "big")
            if begin + length > len(data):
                break
            if data[at] == _PING:
                self._transport.write(_from_client(_PONG, data[begin : begin + length]))
            elif length == self._watch.length:
                self._watch.count(self._run, self._number)
            elif not self.ready.done():
                self.ready.set_result(None)
            at = begin + length
        self._left = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        print(f"a socket was lost: {exc}", file=sys.stderr)  # noqa: T201
        os._exit(1)


async def watch(kind: str, port: int, length: int, each: int, report: int, runs: Sequence[str]) -> None:
    sockets = Watch(length, report, runs)
    loop = asyncio.get_running_loop()

    async def open_one(run: int) -> None:
        socket = partial(Socket, sockets, run, ws=kind == "ws")
        _, opened = await loop.create_connection(socket, "127.0.0.1", port)
        await opened.ready

    left = [run for run in range(len(runs)) for _ in range(each)]
    for first in range(0, len(left), OPENING):
        some = left[first : first + OPENING]
        await asyncio.gather(*map(open_one, some))
        _say(str(first + len(some)))
    loop.add_reader(0, sockets.ask)
    await asyncio.Event().wait()


class _Reader(asyncio.Protocol):
    """The writer's side of a socket. The socket names its run, and the writer confirms it."""

    def __init__(self, runs: dict[int, list[asyncio.Transport]]) -> None:
        self._runs = runs

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._runs[int(data)].append(self._transport)
        self._transport.write(frame(b"{}"))


async def write(data: bytes) -> None:
    runs: dict[int, list[asyncio.Transport]] = defaultdict(list)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Reader(runs), "127.0.0.1", 0, backlog=1024)
    asked: asyncio.StreamReader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(asked), sys.stdin)
    _say(str(server.sockets[0].getsockname()[1]))
    async for line in asked:
        first, last = line.split()
        for run in range(int(first), int(last)):
            for transport in runs[run]:
                transport.write(data)


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    if sys.argv[1] == "write":
        uvloop.run(write(bytes.fromhex(sys.argv[2])))
    else:
        _, _, which, *numbers = sys.argv[:7]
        at, bytes_, of_a_run, of_a_report = (int(number) for number in numbers)
        uvloop.run(watch(which, at, bytes_, of_a_run, of_a_report, sys.argv[7:]))
