"""``fanout``: deltas of runs that are published on Redis reach all WebSockets that follow these runs.

The gateway is one real process on real Redis and Kafka, with fakes of the agent and the user service, which it asks
about each socket. The anchor is one process that writes prepared frames of the same length to as many TCP sockets. On
the other side of each contender is one process that only counts. After each slice every socket must have received
each delta of its run once. A slice counts deliveries and ends when the last one has arrived.

The second figure is the memory of a socket: the growth of the gateway from its start to the end of the last slice.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any

import msgspec
import psutil
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from infra.clock import uuid7
from infra.observe.metrics import Metrics
from infra.web import rpc
from infra.web.http import Health, create_app
from infra.web.server import serve_http
from protos.pubsub import RUN_DELTAS
from protos.user.v1 import user_pb2, user_pb2_grpc
from services.ws_gateway.domain import Delta
from services.ws_gateway.protocol import RunEvent
from tooling.bench.fanout_processes import frame
from tooling.bench.fixture import Fixture, child, running_platform_on
from tooling.bench.protocol import SLICE_SECONDS, Anchor, Slice, Units, units
from tooling.testing import keys
from tooling.testing.platform import Platform

SERVICE = "ws_gateway"
SOCKETS = 10_000
RUNS = 100
# Files of a process besides its sockets.
FILES = 500
# Runs whose deltas are published together, and the largest number of such batches in flight.
BATCH = 10
AHEAD = 4
WAIT_SECONDS = 120.0
SOCKET_GOAL_KIB = 12.0
_TEXT = "a piece of an answer as it comes"
# The first delta has this number, so that all deltas have the same length.
_FIRST = 100_000


class _Keys(user_pb2_grpc.KeysServicer):
    """Grants every key the scope to read."""

    async def Scopes(self, request: user_pb2.ScopesRequest, context: Any) -> user_pb2.ScopesReply:
        return user_pb2.ScopesReply(scopes=["read"])


async def _no_facts(request: Request) -> JSONResponse:
    """The agent's answer about a run without facts."""
    return JSONResponse({"items": []})


@dataclass
class Crowd:
    """A process whose sockets follow all runs."""

    process: Process
    each: int
    """Sockets per run."""
    sent: list[int]
    """For each run, the number of deltas that each of its sockets should have received."""
    due: int = 0
    """Deliveries that should arrive."""
    heard: int = 0
    """Deliveries that the process has reported."""

    def expect(self, batch: range) -> None:
        for run in batch:
            self.sent[run] += 1
        self.due += len(batch) * self.each

    async def hear(self, most_missing: int) -> None:
        """Returns when at most `most_missing` deliveries are missing."""
        while self.due - self.heard > most_missing:
            self.heard = int(await self.line())

    async def check(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"?\n")
        found = json.loads(await self.line())
        if found != [[count, count] for count in self.sent]:
            raise ValueError(
                f"fanout: sockets received (least, most) {found} deltas per run; {self.sent} were published"
            )

    async def line(self) -> str:
        """The next line that the process prints. Raises ValueError after WAIT_SECONDS, and if the process has ended."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                line = (await self.process.stdout.readline()).decode().strip()
        except TimeoutError:
            raise ValueError(f"fanout: {self.due - self.heard} deliveries did not arrive") from None
        if not line:
            raise ValueError("fanout: the process of the sockets has ended; see its output above")
        return line


@dataclass
class Fanout:
    """Both contenders with their sockets."""

    gateway: psutil.Process
    redis: Redis
    writer: Process
    watching: Crowd
    reading: Crowd
    runs: list[str]
    before: int
    """Resident bytes of the gateway before the first socket."""
    published: int = 0
    turn: int = 0

    @property
    def sockets(self) -> int:
        return len(self.runs) * self.watching.each

    def anchors(self) -> list[Anchor]:
        name = f"bare writes to {self.sockets:,} sockets"
        return [Anchor(name, 0.75, partial(self._slice, self.reading, self._write))]

    async def ours(self) -> Slice:
        return await self._slice(self.watching, self._publish)

    def memory(self) -> Units:
        after = self.gateway.memory_info().rss
        kib = (after - self.before) / 1024 / self.sockets
        made_of = {"sockets": self.sockets, "MiB before": self.before / 2**20, "after": after / 2**20}
        return units("fanout", "memory of a socket", SOCKET_GOAL_KIB, kib, "KiB", **made_of)

    async def listening(self) -> None:
        """Returns when the gateway has subscribed at Redis."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not await self.redis.publish(f"{RUN_DELTAS}{uuid7()}", b""):  # noqa: ASYNC110  # Redis has no signal for it
                await asyncio.sleep(0.05)

    async def _slice(self, crowd: Crowd, tell: Callable[[range], Awaitable[None]]) -> Slice:
        batch = BATCH * crowd.each
        before, began = crowd.due, perf_counter()
        while perf_counter() - began < SLICE_SECONDS:
            first = self.turn % len(self.runs)
            self.turn += BATCH
            crowd.expect(range(first, first + BATCH))
            await tell(range(first, first + BATCH))
            await crowd.hear(AHEAD * batch)
        await crowd.hear(0)
        seconds = perf_counter() - began
        await crowd.check()
        return Slice(crowd.due - before, seconds)

    async def _publish(self, batch: range) -> None:
        pipeline = self.redis.pipeline(transaction=False)
        for run in batch:
            self.published += 1
            pipeline.publish(f"{RUN_DELTAS}{self.runs[run]}", msgspec.json.encode(_delta(self.published)))
        await pipeline.execute()

    async def _write(self, batch: range) -> None:
        assert self.writer.stdin is not None
        self.writer.stdin.write(b"%d %d\n" % (batch.start, batch.stop))


@asynccontextmanager
async def running(place: Fixture) -> AsyncIterator[Fanout]:
    """The gateway and the writer. Each has SOCKETS sockets, or fewer if this process may not open so many files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    each = min(SOCKETS, most - FILES) // RUNS
    runs = [str(uuid7()) for _ in range(RUNS)]
    body = msgspec.json.encode(RunEvent(run_id=uuid7(), event="delta", id=None, data=msgspec.to_builtins(_delta(0))))
    async with AsyncExitStack() as stack:
        platform = await stack.enter_async_context(_gateway(place))
        gateway = psutil.Process(platform.processes[SERVICE].pid)
        before = gateway.memory_info().rss
        redis = Redis.from_url(place.stack.redis_url)
        stack.push_async_callback(redis.aclose)
        writer = await stack.enter_async_context(_end("write", frame(body).hex()))
        assert writer.stdout is not None
        port = int(await writer.stdout.readline())
        watching, reading = [
            await stack.enter_async_context(_crowd(kind, to, len(body), each, runs))
            for kind, to in (("ws", platform.ports[SERVICE]), ("plain", port))
        ]
        bench = Fanout(gateway, redis, writer, watching, reading, runs, before)
        await bench.listening()
        yield bench


@asynccontextmanager
async def _gateway(place: Fixture) -> AsyncIterator[Platform]:
    """The gateway's process, with the fakes of the services that it asks."""
    user = rpc.Server("user", keys.callers("user"), Metrics(CollectorRegistry()))
    user_pb2_grpc.add_KeysServicer_to_server(_Keys(), user.grpc)
    agent = create_app(
        [Route("/internal/runs/{id}/events", _no_facts)], Health("agent", "0"), Metrics(CollectorRegistry())
    )
    async with running_platform_on(place) as platform:
        await user.start(platform.ports["user_grpc"])
        server = await serve_http(agent, platform.ports["agent"])
        try:
            await platform.prepare(SERVICE)
            await platform.start(SERVICE, OTEL_EXPORTER_OTLP_ENDPOINT=place.otlp)
            yield platform
            await asyncio.to_thread(platform.stop, SERVICE)
        finally:
            await server.stop()
            await user.stop()


@asynccontextmanager
async def _crowd(kind: str, port: int, length: int, each: int, runs: list[str]) -> AsyncIterator[Crowd]:
    """Starts the process, and yields when all its sockets are open and follow their runs."""
    numbers = (str(number) for number in (port, length, each, each * BATCH))
    async with _end("watch", kind, *numbers, *runs) as process:
        crowd = Crowd(process, each, [0] * len(runs))
        # On a busy machine all of them take minutes, but not the next hundred.
        while int(await crowd.line()) < each * len(runs):
            pass
        yield crowd


def _end(*arguments: str) -> AbstractAsyncContextManager[Process]:
    return child(sys.executable, "-m", "tooling.bench.fanout_processes", *arguments)


def _delta(number: int) -> Delta:
    return Delta(step=1, attempt=1, n=_FIRST + number, text=_TEXT)
