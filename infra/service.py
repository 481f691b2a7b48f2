"""A service process: pools, relays, consumers, HTTP and gRPC in one event loop, started and drained in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import uvloop
from prometheus_client import CollectorRegistry
from starlette.routing import BaseRoute

from infra import VERSION, db, http, logs, rpc, telemetry
from infra.auth import Callers
from infra.bus import inbox, outbox
from infra.bus.kafka import KafkaPublisher
from infra.bus.outbox import Relay
from infra.bus.rabbit import RabbitPublisher, Workers
from infra.bus.reader import Reader
from infra.bus.redrive import Drainer
from infra.db import sql
from infra.eventstore.store import Aggregate
from infra.metrics import Metrics
from infra.settings import Settings
from infra.tx import Database
from protos.catalog import SERVICE_LOGS
from protos.topology import Queue, Subscription, Topic

# Past this a consumer that has records to read and makes no progress is restarted by whoever watches liveness.
STUCK_SECONDS = 120.0
MAINTENANCE_SECONDS = 60.0
OBSERVE_SECONDS = 5.0


@dataclass(frozen=True)
class Runtime:
    """What a service's own factories get: `worker` is free of row-level security, `request` is bound by it."""

    settings: Any
    worker: Database
    request: Database
    metrics: Metrics
    channels: rpc.Channels


RouteFactory = Callable[[Runtime], Sequence[BaseRoute]]
ServicerFactory = Callable[[Runtime], tuple[Callable[[Any, Any], None], Any]]


class Service:
    """What a service's ``__main__`` declares. Nothing connects before `run`."""

    def __init__(self, name: str, settings: type[Settings] = Settings) -> None:
        self.name = name
        self.subscriptions: list[Subscription] = []
        self.adapters: dict[str, dict[str, Callable[[Runtime], Any]]] = {}
        self.aggregates: list[Aggregate[Any]] = []
        self._settings = settings
        self._routes: list[RouteFactory] = []
        self._servicers: list[ServicerFactory] = []

    def consume(self, subscription: Subscription, **adapters: Callable[[Runtime], Any]) -> None:
        """The handler is also given each of `adapters`, built once when the service starts."""
        self.subscriptions.append(subscription)
        self.adapters[subscription.name] = adapters

    def own(self, *aggregates: Aggregate[Any]) -> None:
        """The streams that this service keeps; replay emits their facts again."""
        self.aggregates += aggregates

    def serve_http(self, routes: RouteFactory) -> None:
        self._routes.append(routes)

    def serve_grpc(self, servicer: ServicerFactory) -> None:
        """`servicer` returns the generated ``add_…_to_server`` function and the object to add."""
        self._servicers.append(servicer)

    def run(self) -> None:
        """Runs until SIGTERM or SIGINT, then drains. The settings' errors end the process with their message."""
        settings = self._settings.load()
        uvloop.run(self.serve(settings))

    async def serve(self, settings: Settings) -> None:
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stopping.set)
        async with AsyncExitStack() as stack:
            await self._start(settings, stack, stopping)
            await stopping.wait()
            # Leaving the stack drains in reverse order of the start: HTTP and gRPC refuse, consumers finish what is
            # under way, relays publish their window, then the pools close.

    async def _start(self, settings: Settings, stack: AsyncExitStack, stopping: asyncio.Event) -> None:
        metrics = Metrics(CollectorRegistry())
        logs.setup(self.name, settings.log_level)
        log = logs.get_logger("infra.service")
        traces = telemetry.setup(self.name, VERSION, settings.otlp_endpoint)
        stack.push_async_callback(asyncio.to_thread, traces.shutdown)
        sink = logs.KafkaLogSink(settings.kafka_bootstrap_servers, settings.topic_prefix + SERVICE_LOGS.name, metrics)
        await sink.start()
        stack.push_async_callback(sink.stop)

        engine = db.create_engine(settings.database_url.get_secret_value(), name=self.name)
        stack.push_async_callback(engine.dispose)
        request_engine = db.create_engine(settings.request_database_url.get_secret_value(), name=self.name)
        stack.push_async_callback(request_engine.dispose)
        worker = Database(engine, self.name)
        request = Database(request_engine, self.name, tenanted=True)
        callers = Callers(settings.internal_secret.get_secret_value(), self.name)
        channels = rpc.Channels(callers)
        stack.push_async_callback(channels.close)
        runtime = Runtime(settings, worker, request, metrics, channels)
        health = http.Health(self.name, VERSION)

        async def postgres() -> None:
            async with engine.connect() as connection:
                await sql(connection, "SELECT 1")

        health.add_check("postgres", postgres)
        running = _Running(stack, stopping, log)

        kafka = KafkaPublisher(
            settings.kafka_bootstrap_servers, prefix=settings.topic_prefix, client_id=f"clawbus-{self.name}"
        )
        rabbit = RabbitPublisher(settings.rabbitmq_url.get_secret_value())
        stack.push_async_callback(kafka.stop)
        stack.push_async_callback(rabbit.stop)

        async def brokers() -> None:
            await (await kafka.start()).client.force_metadata_update()

        health.add_check("kafka", brokers)
        for publisher in (kafka, rabbit):
            relay = Relay(engine, self.name, publisher, metrics, lease_seconds=settings.lease_seconds)
            worker.on_messages(relay.wake)
            request.on_messages(relay.wake)
            running.add(f"relay to {publisher.bus}", relay.run, relay.stop)

        subscribed = [self._bind(subscription, runtime) for subscription in self.subscriptions]
        by_group: dict[str, list[Subscription]] = {}
        for subscription in subscribed:
            if isinstance(subscription.source, Topic):
                by_group.setdefault(subscription.group, []).append(subscription)
        for group, subscriptions in by_group.items():
            reader = Reader(
                worker,
                group,
                subscriptions,
                bootstrap=settings.kafka_bootstrap_servers,
                metrics=metrics,
                prefix=settings.topic_prefix,
                session_ms=settings.kafka_session_ms,
            )
            health.add_probe(f"consumer {group}", partial(_makes_progress, reader))
            running.add(f"reader {group}", reader.run, reader.stop)
        jobs = [s for s in subscribed if isinstance(s.source, Queue)]
        if jobs:
            workers = Workers(worker, jobs, settings.rabbitmq_url.get_secret_value(), metrics)
            await _until_it_works("RabbitMQ", workers.start, log)
            stack.push_async_callback(workers.stop)

            async def rabbitmq() -> None:
                if not await workers.ping():
                    raise ConnectionError("RabbitMQ does not answer")

            health.add_check("rabbitmq", rabbitmq)
        # Also where nothing is consumed: what could not be published is a dead letter too.
        drainer = Drainer(worker, subscribed, metrics)
        running.add("redrive", drainer.run, drainer.stop)
        upkeep = _Upkeep(worker, metrics, log)
        running.add("upkeep", upkeep.run, upkeep.stop)

        if self._servicers:
            server = rpc.Server(self.name, callers, metrics)
            for factory in self._servicers:
                add, servicer = factory(runtime)
                add(servicer, server.grpc)
            await server.start(settings.grpc_port)
            stack.push_async_callback(server.stop)
        routes = [route for factory in self._routes for route in factory(runtime)]
        app = http.create_app(routes, health, metrics)
        web = await http.serve_http(app, settings.http_port)
        stack.push_async_callback(web.stop)
        stack.callback(health.drain)
        log.info("service is up", http_port=settings.http_port)

    def _bind(self, subscription: Subscription, runtime: Runtime) -> Subscription:
        built = {name: build(runtime) for name, build in self.adapters[subscription.name].items()}
        return replace(subscription, handler=partial(subscription.handler, **built)) if built else subscription


def _makes_progress(reader: Reader) -> bool:
    return reader.stuck_for() < STUCK_SECONDS


class _Running:
    """The background loops of the process. One that ends by an error ends the process: half a service is worse."""

    def __init__(self, stack: AsyncExitStack, stopping: asyncio.Event, log: Any) -> None:
        self._stack = stack
        self._stopping = stopping
        self._log = log

    def add(self, name: str, run: Callable[[], Awaitable[None]], stop: Callable[[], Awaitable[None]]) -> None:
        async def guarded() -> None:
            try:
                await run()
            except Exception:
                self._log.error(f"{name} ended by an error, the service stops", exc_info=True)
                self._stopping.set()

        task = asyncio.create_task(guarded(), name=name)

        async def drain() -> None:
            await stop()
            await task

        self._stack.push_async_callback(drain)


class _Upkeep:
    """Every few seconds: gauges of the outbox; every minute: partitions of the inbox, the outbox's past."""

    def __init__(self, database: Database, metrics: Metrics, log: Any) -> None:
        self._database = database
        self._metrics = metrics
        self._log = log
        self._stopping = asyncio.Event()

    async def stop(self) -> None:
        self._stopping.set()

    async def run(self) -> None:
        ticks = 0
        while not self._stopping.is_set():
            try:
                async with self._database.begin() as tx:
                    pending = await outbox.pending_by_destination(await tx.connection())
                    if ticks % int(MAINTENANCE_SECONDS / OBSERVE_SECONDS) == 0:
                        await inbox.maintain(await tx.connection())
                self._metrics.outbox_depth.clear()
                self._metrics.outbox_oldest_seconds.clear()
                for labels, (depth, oldest) in pending.items():
                    self._metrics.outbox_depth.labels(*labels).set(depth)
                    self._metrics.outbox_oldest_seconds.labels(*labels).set(oldest)
            except Exception as error:
                self._log.warning("upkeep failed, trying again", error=f"{type(error).__name__}: {error}")
            ticks += 1
            try:
                await asyncio.wait_for(self._stopping.wait(), OBSERVE_SECONDS)
            except TimeoutError:
                continue


async def _until_it_works(what: str, start: Callable[[], Awaitable[None]], log: Any) -> None:
    """A service that starts before its broker waits for it, instead of dying and being restarted until it is there."""
    while True:
        try:
            return await start()
        except (OSError, ConnectionError) as error:
            log.warning(f"{what} is not there yet, trying again", error=f"{type(error).__name__}: {error}")
            await asyncio.sleep(1)
