"""``fanout``: what is published of runs on Redis reaches everybody who watches them by WebSocket.

The gateway is one real process on real Redis and Kafka, beside stand-ins for the agent and the user service, which it
asks about each socket. Against it stands one process that writes frames made beforehand, of the same length, to as many
plain TCP sockets. Those who watch are a process for each of the two, which only counts; after each slice every socket
must have had what was published for its run, once. Deliveries are counted, and the time until the last has arrived.

Its second result is the memory of a socket: how much the gateway has grown from its start to after the last slice.
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
from infra.security.auth import Callers
from infra.web import rpc
from infra.web.http import Health, create_app, serve_http
from protos.pubsub import RUN_DELTAS
from protos.user.v1 import user_pb2, user_pb2_grpc
from services.ws_gateway.domain import Delta
from services.ws_gateway.protocol import RunEvent
from tooling.bench.fanout_processes import frame
from tooling.bench.fixture import Fixture, child, running_platform_on
from tooling.bench.protocol import SLICE_SECONDS, Anchor, Slice, Units, units
from tooling.testing.platform import INTERNAL_SECRET, Platform

SERVICE = "ws_gateway"
SOCKETS = 10_000
RUNS = 100
# Each process has other files than its sockets.
FILES = 500
# Runs whose deltas are published together, and how many such batches are under way at most.
BATCH = 10
AHEAD = 4
WAIT_SECONDS = 120.0
SOCKET_GOAL_KIB = 25.0
_TEXT = "a piece of an answer as it comes"
# Deltas are numbered from here on, so that all have the same length.
_FIRST = 100_000


class _Keys(user_pb2_grpc.KeysServicer):
    """Lets everybody stay."""

    async def Scopes(self, request: user_pb2.ScopesRequest, context: Any) -> user_pb2.ScopesReply:
        return user_pb2.ScopesReply(scopes=["read"])


async def _no_facts(request: Request) -> JSONResponse:
    """The agent's answer about a run that has just begun."""
    return JSONResponse({"items": []})


@dataclass
class Crowd:
    """A process that watches by so many sockets for `each` run. `sent`: by run, what these are to have had; that makes
    `due` deltas, of which `heard` have arrived."""

    process: Process
    each: int
    sent: list[int]
    due: int = 0
    heard: int = 0

    def expect(self, batch: range) -> None:
        for run in batch:
            self.sent[run] += 1
        self.due += len(batch) * self.each

    async def hear(self, most_missing: int) -> None:
        """Returns when no more than so many deltas are missing."""
        while self.due - self.heard > most_missing:
            self.heard = int(await self.line())

    async def check(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"?\n")
        found = json.loads(await self.line())
        if found != [[count, count] for count in self.sent]:
            raise ValueError(f"fanout: sockets of the runs had (least, most) {found} deltas of {self.sent}")

    async def line(self) -> str:
        """What it says next. Raises ValueError where that takes too long, and where it has ended."""
        assert self.process.stdout is not None
        try:
            async with asyncio.timeout(WAIT_SECONDS):
                line = (await self.process.stdout.readline()).decode().strip()
        except TimeoutError:
            raise ValueError(f"fanout: {self.due - self.heard} deltas did not arrive") from None
        if not line:
            raise ValueError("fanout: who watches has ended; what it printed says why")
        return line


@dataclass
class Fanout:
    """Both sides with their crowds. `before`: bytes of the gateway when nobody was there."""

    gateway: psutil.Process
    redis: Redis
    writer: Process
    watching: Crowd
    reading: Crowd
    runs: list[str]
    before: int
    published: int = 0
    turn: int = 0

    @property
    def sockets(self) -> int:
        return len(self.runs) * self.watching.each

    def anchors(self) -> list[Anchor]:
        name = f"bare writes to {self.sockets:,} sockets"
        return [Anchor(name, 0.7, partial(self._slice, self.reading, self._write))]

    async def ours(self) -> Slice:
        return await self._slice(self.watching, self._publish)

    def memory(self) -> Units:
        after = self.gateway.memory_info().rss
        kib = (after - self.before) / 1024 / self.sockets
        made_of = {"sockets": self.sockets, "MiB before": self.before / 2**20, "after": after / 2**20}
        return units("fanout", "memory of a socket", SOCKET_GOAL_KIB, kib, "KiB", **made_of)

    async def listening(self) -> None:
        """Returns when Redis tells the gateway what is published."""
        async with asyncio.timeout(WAIT_SECONDS):
            while not await self.redis.publish(f"{RUN_DELTAS}{uuid7()}", b""):  # noqa: ASYNC110  # Redis cannot be waited for
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
    """The gateway and the writer, with as many sockets each as this process may have files."""
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
    """With those whom it asks."""
    keys = rpc.Server("user", Callers(INTERNAL_SECRET, "user"), Metrics(CollectorRegistry()))
    user_pb2_grpc.add_KeysServicer_to_server(_Keys(), keys.grpc)
    agent = create_app(
        [Route("/internal/runs/{id}/events", _no_facts)], Health("agent", "0"), Metrics(CollectorRegistry())
    )
    async with running_platform_on(place) as platform:
        await keys.start(platform.ports["user_grpc"])
        server = await serve_http(agent, platform.ports["agent"])
        try:
            await platform.prepare(SERVICE)
            await platform.start(SERVICE, OTEL_EXPORTER_OTLP_ENDPOINT=place.otlp)
            yield platform
            await asyncio.to_thread(platform.stop, SERVICE)
        finally:
            await server.stop()
            await keys.stop()


@asynccontextmanager
async def _crowd(kind: str, port: int, length: int, each: int, runs: list[str]) -> AsyncIterator[Crowd]:
    """Once all its sockets are open and follow their runs."""
    numbers = (str(number) for number in (port, length, each, each * BATCH))
    async with _end("watch", kind, *numbers, *runs) as process:
        crowd = Crowd(process, each, [0] * len(runs))
        await crowd.line()
        yield crowd


def _end(*arguments: str) -> AbstractAsyncContextManager[Process]:
    return child(sys.executable, "-m", "tooling.bench.fanout_processes", *arguments)


def _delta(number: int) -> Delta:
    return Delta(step=1, attempt=1, n=_FIRST + number, text=_TEXT)
