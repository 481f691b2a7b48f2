"""A TCP proxy between a client and a real server that can delay, hold, reset, half-close or half-open connections."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress


class FaultProxy:
    """``async with FaultProxy(host, port) as proxy`` listens on loopback at `proxy.port` and forwards to the target.

    `latency`: seconds by which each piece of data is delayed, in both directions.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._connections: set[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._losing = False
        self._half_open: set[asyncio.StreamWriter] = set()
        self.latency = 0.0
        self.port = 0

    async def __aenter__(self) -> FaultProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        self.reset()
        await self._server.wait_closed()

    def blackhole(self) -> None:
        """Holds all data. Neither side notices, as if packets were lost."""
        self._flowing.clear()

    def heal(self) -> None:
        """Forwards the data that `blackhole` has held, as TCP does after a retransmission."""
        self._flowing.set()

    def lose_answers(self) -> None:
        """Drops the answers of the server from now on: it handles requests, and the clients do not learn of it. `reset`
        ends it."""
        self._losing = True

    def half_open(self) -> None:
        """Resets the connections at the server only: the clients send and wait, as after the end of the other machine.
        New connections work. `reset` ends it, as the other machine does when a forgotten connection is used."""
        for _, server in self._connections:
            self._half_open.add(server)
            _reset(server)

    def reset(self) -> None:
        """Resets (RST) both ends of every connection."""
        self._losing = False
        for writers in self._connections:
            for writer in writers:
                _reset(writer)
        self._connections.clear()
        self._half_open.clear()

    def half_close(self) -> None:
        """The clients read the end of the stream and may still write."""
        for client, _ in self._connections:
            client.write_eof()

    async def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            from_server, server = await asyncio.open_connection(*self._target)
        except OSError:
            client.transport.abort()
            return
        self._connections.add((client, server))
        for source, sink in ((reader, server), (from_server, client)):
            pump = asyncio.create_task(self._pump(source, sink, server))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, server: asyncio.StreamWriter
    ) -> None:
        try:
            while piece := await source.read(65536):
                await asyncio.sleep(self.latency)
                await self._flowing.wait()
                if server in self._half_open or (self._losing and sink is not server):
                    continue
                sink.write(piece)
                await sink.drain()
            if server in self._half_open:
                return
            if sink.can_write_eof() and not sink.is_closing():
                sink.write_eof()
        except (OSError, RuntimeError):
            if server not in self._half_open:
                # A reset of one side reaches the other one, as without a proxy.
                sink.transport.abort()


def _reset(writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        linger_off = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_off)
    writer.transport.abort()
