"""An HTTP client for load: sends prepared requests in a closed loop or at a fixed rate, and counts the answers.

A library would need more time for a request than the server that is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import cast

CONNECTIONS = 64


def request(path: str, headers: Mapping[str, str], body: bytes) -> bytes:
    """The bytes of a POST."""
    lines = [f"POST {path} HTTP/1.1", "host: localhost", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body


async def closed_loop(port: int, requests: Iterable[bytes], seconds: float) -> tuple[int, float]:
    """Sends the requests in their order for `seconds`. Each connection sends its next request after the last answer.

    Returns the number of answers 200, which belong to the first requests, and the seconds that passed. Raises
    ValueError for another answer, and if the requests run out.
    """
    left = iter(requests)
    began = perf_counter()
    end = began + seconds

    async def one() -> int:
        connection = await _Connection.to(port)
        done = 0
        while perf_counter() < end:
            _expect(await connection.send(_next(left)))
            done += 1
        connection.close()
        return done

    done = sum(await asyncio.gather(*(one() for _ in range(CONNECTIONS))))
    return done, perf_counter() - began


async def open_loop(port: int, requests: Sequence[bytes], rate: float, *, began: float | None = None) -> list[float]:
    """Sends each request when it is due, `rate` per second, even if earlier ones are not answered yet.

    `began`: the moment of the first request by `perf_counter`; None begins as soon as the connections are open.
    Returns for each request the seconds from the moment at which it was due to its answer. The wait for a connection is
    part of that time. Raises ValueError for an answer other than 200.
    """
    latencies = []
    for status, seconds in await flood(port, requests, rate, began=began):
        _expect(status)
        latencies.append(seconds)
    return latencies


async def flood(
    port: int, requests: Sequence[bytes], rate: float, *, began: float | None = None
) -> list[tuple[int, float]]:
    """As `open_loop`, with the status of each answer."""
    idle = [await _Connection.to(port) for _ in range(CONNECTIONS)]
    began = perf_counter() if began is None else began
    running: list[asyncio.Task[tuple[int, float]]] = []

    async def one(moment: float, data: bytes) -> tuple[int, float]:
        # The one that was used last: a server closes those that are idle for seconds.
        connection = idle.pop() if idle and not idle[-1].closed else await _Connection.to(port)
        status = await connection.send(data)
        idle.append(connection)
        return status, perf_counter() - moment

    for n, data in enumerate(requests):
        moment = began + n / rate
        if (early := moment - perf_counter()) > 0:
            await asyncio.sleep(early)
        running.append(asyncio.create_task(one(moment, data)))
    answers = list(await asyncio.gather(*running))
    for connection in idle:
        connection.close()
    return answers


def _expect(status: int) -> None:
    if status != 200:
        raise ValueError(f"a request was answered {status}, must be 200")


def _next(requests: Iterator[bytes]) -> bytes:
    try:
        return next(requests)
    except StopIteration:
        raise ValueError("the requests ran out before the time was over; prepare more of them") from None


class _Connection(asyncio.Protocol):
    """One connection. It sends a request only after the answer to the one before."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: asyncio.Future[int] | None = None
        self._data = b""

    @classmethod
    async def to(cls, port: int) -> _Connection:
        _, connection = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    async def send(self, data: bytes) -> int:
        """The status of the answer."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        return await self._answer

    @property
    def closed(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def close(self) -> None:
        assert self._transport is not None
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        assert self._answer is not None
        if not found or len(body) < _length(head):
            return
        self._answer.set_result(int(head.split(b" ", 2)[1]))
        self._data = b""

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer and not self._answer.done():
            self._answer.set_exception(ValueError(f"the connection was closed: {exc}"))


def _length(head: bytes) -> int:
    _, _, after = head.lower().partition(b"content-length:")
    return int(after.partition(b"\r\n")[0] or 0)
