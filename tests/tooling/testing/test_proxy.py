"""The faults of the proxy, seen by a client of a real server."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import pytest

from tooling.testing.proxy import FaultProxy


@pytest.fixture
async def proxy() -> AsyncIterator[FaultProxy]:
    """A proxy in front of an echo server, which sends ``bye`` after the end of its client."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(1000):
                writer.write(data)
                await writer.drain()
            writer.write(b"bye")
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        yield proxy
    server.close()
    await server.wait_closed()


async def connect(proxy: FaultProxy) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    return reader, writer


async def test_without_faults_it_forwards_both_ways_to_the_end(proxy: FaultProxy) -> None:
    reader, writer = await connect(proxy)
    writer.write_eof()
    assert await reader.read() == b"bye"
    writer.close()


async def test_latency_delays_every_piece(proxy: FaultProxy) -> None:
    reader, writer = await connect(proxy)
    proxy.latency = 0.05
    began = time.monotonic()
    writer.write(b"x")
    assert await reader.readexactly(1) == b"x"
    assert time.monotonic() - began >= 0.1
    writer.close()


async def test_a_blackhole_holds_data_and_loses_none(proxy: FaultProxy) -> None:
    reader, writer = await connect(proxy)
    proxy.blackhole()
    writer.write(b"x")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(1), 0.1)
    proxy.heal()
    assert await reader.readexactly(1) == b"x"
    writer.close()


async def test_a_reset_breaks_the_connections_and_takes_new_ones(proxy: FaultProxy) -> None:
    reader, writer = await connect(proxy)
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        await reader.readexactly(1)
    writer.close()
    _, again = await connect(proxy)
    again.close()


async def test_a_half_closed_client_reads_the_end_and_may_write(proxy: FaultProxy) -> None:
    reader, writer = await connect(proxy)
    proxy.half_close()
    assert await reader.read() == b""
    writer.write(b"still")
    await writer.drain()
    writer.close()


async def test_half_open_connections_are_silent_until_a_reset_and_new_ones_work(proxy: FaultProxy) -> None:
    reader, writer = await connect(proxy)
    proxy.half_open()
    writer.write(b"is anybody there")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.2)
    _, other = await connect(proxy)
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
    writer.close()
    other.close()


async def test_without_a_server_the_connection_is_closed() -> None:
    async with FaultProxy("127.0.0.1", 1) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await reader.read() == b""
        writer.close()


async def test_lost_answers_are_dropped_until_a_reset(proxy: FaultProxy) -> None:
    reader, writer = await connect(proxy)
    proxy.lose_answers()
    writer.write(b"handled")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.read(1), 0.2)
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        await reader.read(1)
    writer.close()
    reader, writer = await connect(proxy)
    writer.close()


async def test_a_reset_by_the_server_reaches_the_client() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        linger_off = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_off)
        writer.transport.abort()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with FaultProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"hello")
        async with asyncio.timeout(10):
            with suppress(ConnectionResetError):
                assert await reader.read(1) == b""
        writer.close()
    server.close()
    await server.wait_closed()
