"""A service process: pools, relays, consumers, HTTP and gRPC in one event loop, started and stopped in order."""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import uvloop
from prometheus_client import CollectorRegistry
from redis.asyncio import Redis
from starlette.routing import BaseRoute

from infra import VERSION
from infra.bus.at_least_once import AtLeastOnceReader
from infra.bus.kafka import KafkaPublisher
from infra.bus.outbox import Relay
from infra.bus.rabbit import Workers
from infra.bus.rabbit_publisher import RabbitPublisher
from infra.bus.tail import Tail
from infra.bus.transactional import TransactionalReader
from infra.connections import TLS_FILES, context_of, end_of
from infra.lanes.lane import Work
from infra.lanes.runner import LaneRunner
from infra.observe import logs, telemetry
from infra.observe.metrics import Metrics
from infra.outgoing.client import Outgoing
from infra.postgres import db
from infra.postgres.database import Database
from infra.postgres.db import sql
from infra.postgres.event_store import Aggregate
from infra.postgres.read_models import ReadModel
from infra.security.auth import Callers, Identities
from infra.security.crypto import Cipher
from infra.security.keys import Keyring
from infra.security.rewrap import KERNEL, SealedColumn
from infra.security.sealed_letters import SealedLetters
from infra.service import operations, tenant_erasure
from infra.service.maintenance import Maintenance
from infra.service.process import Running, collect_by_bytes, freeze_loaded_modules, limit_stop, retry_start
from infra.service.redrive import Redriver
from infra.service.settings import Settings, SettingsError
from infra.service.threads import TenantThreads
from infra.web import http, rpc
from infra.web.raw import RawRoute
from infra.web.rpc_client import Channels
from infra.web.server import serve_http
from protos.catalog import SERVICE_LOGS
from protos.topology import Queue, Subscription, Topic

STUCK_SECONDS = 120.0
"""After this time without progress, a consumer with records to read makes the process not alive, so that a supervisor
restarts it."""


@dataclass(frozen=True)
class Runtime:
    """The parts of a running process, given to the factories of a service."""

    settings: Any
    worker: Database
    """Without row-level security."""
    request: Database
    """Bound to one tenant by row-level security."""
    metrics: Metrics
    channels: Channels
    identities: Identities
    cipher: Cipher
    cache: Redis
    outgoing: Outgoing
    tls: ssl.SSLContext | None = None
    """For HTTP to other services; None: they serve without TLS."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the process must end: answers without an end of their own then end too."""


RouteFactory = Callable[[Runtime], Sequence[BaseRoute]]
ServicerFactory = Callable[[Runtime], tuple[Callable[[Any, Any], None], Any]]


class Background(Protocol):
    """A loop that runs until it is stopped. If it ends with an error, the process ends."""

    async def run(self) -> None: ...

    async def stop(self) -> None: ...


class Service:
    """The declaration of a service, made in its ``__main__``. Nothing connects before `run`."""

    def __init__(self, name: str, settings: type[Settings] = Settings) -> None:
        self.name = name
        self.subscriptions: list[Subscription] = []
        self.adapters: dict[str, dict[str, Callable[[Runtime], Any]]] = {}
        self.works: list[tuple[Work, dict[str, Callable[[Runtime], Any]]]] = []
        self.aggregates: list[Aggregate[Any]] = []
        self.read_models: list[ReadModel] = []
        self.settings = settings
        self.sealed: list[SealedColumn] = list(KERNEL)
        self._routes: list[RouteFactory] = []
        self._servicers: list[ServicerFactory] = []
        self._besides: dict[str, Callable[[Runtime], Background]] = {}
        self._dependencies: dict[str, Callable[[Runtime], Callable[[], Awaitable[None]]]] = {}

    def consume(self, subscription: Subscription, **adapters: Callable[[Runtime], Any]) -> None:
        """Adds a subscription. Its handler also gets each of `adapters`, which are built once at the start."""
        self.subscriptions.append(subscription)
        self.adapters[subscription.name] = adapters

    def work(self, work: Work, **adapters: Callable[[Runtime], Any]) -> None:
        """Adds the work of a kind of lane. Its handlers also get each of `adapters`, built once at the start."""
        self.works.append((work, adapters))

    def own(self, *aggregates: Aggregate[Any]) -> None:
        """Declares the streams that this service owns; a replay publishes their facts again."""
        self.aggregates += aggregates

    def project(self, *models: ReadModel) -> None:
        """Declares the read models that the service writes with their source; they can be verified and repaired."""
        self.read_models += models

    def seal(self, *columns: SealedColumn) -> None:
        """Declares the columns that the service seals under its master key; a rotation seals them again."""
        self.sealed += columns

    def erase_tenants(
        self,
        kept: Collection[str] = (),
        before: Callable[[Runtime], tenant_erasure.Before] | None = None,
        notes: Collection[str] = (),
    ) -> None:
        """Erases tenants as `infra.service.tenant_erasure` says: every row that has the tenant's id, except in the
        tables `kept`. `before` deletes files and vectors that rows refer to. `notes`: the tables that name files before
        these are stored."""

        def erasure(runtime: Runtime) -> tenant_erasure.Erasure:
            return tenant_erasure.Erasure(kept, before(runtime) if before else None, notes)

        self.consume(tenant_erasure.queue_erasure(self.name))
        self.work(tenant_erasure.erase_rows, erasure=erasure)

    def depend(self, name: str, check: Callable[[Runtime], Callable[[], Awaitable[None]]]) -> None:
        """Adds a dependency that health checks by a round trip. Without it the process serves, but is degraded."""
        self._dependencies[name] = check

    def beside(self, name: str, build: Callable[[Runtime], Background]) -> None:
        """Adds a loop of the service's own, which runs as long as the process serves."""
        self._besides[name] = build

    def serve_http(self, routes: RouteFactory) -> None:
        self._routes.append(routes)

    def serve_grpc(self, servicer: ServicerFactory) -> None:
        """Adds a servicer: the factory returns the generated ``add_…_to_server`` function and the object to add."""
        self._servicers.append(servicer)

    def run(self) -> None:
        """Runs until SIGTERM or SIGINT, then drains. Exits with a message if the environment is not usable."""
        try:
            settings = self.settings.load()
        except SettingsError as error:
            sys.exit(f"{self.name}: {error}")
        freeze_loaded_modules()
        sys.exit(uvloop.run(self.serve(settings)))

    async def serve(self, settings: Settings) -> int:
        """Runs until a signal. Returns the exit code: 1 if a part of the process ended with an error."""
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.set_default_executor(TenantThreads())
        collect_by_bytes(loop)
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, stopping.set)
        async with AsyncExitStack() as stack:
            running = Running(stack, stopping)
            await self._start(settings, stack, running)
            await stopping.wait()
            limit_stop(loop)
            # Leaving the stack stops the parts in reverse order: readiness goes, consumers finish their current work,
            # HTTP and gRPC answer open requests, relays publish their window, then the pools close.
        return running.failed

    async def _start(self, settings: Settings, stack: AsyncExitStack, running: Running) -> None:
        metrics = Metrics(CollectorRegistry())
        logs.setup(self.name, settings.log_level)
        traces = telemetry.setup(
            self.name, VERSION, settings.otlp_endpoint, ratio=settings.trace_ratio, metrics=metrics
        )
        stack.push_async_callback(asyncio.to_thread, traces.shutdown)
        sink = logs.KafkaLogSink(
            settings.kafka_bootstrap_servers.get_secret_value(), settings.topic_prefix + SERVICE_LOGS.name, metrics
        )
        await sink.start()
        stack.push_async_callback(sink.stop)

        engine = db.create_engine(settings.database_url.get_secret_value(), name=self.name)
        stack.push_async_callback(engine.dispose)
        request_engine = db.create_engine(settings.request_database_url.get_secret_value(), name=self.name)
        stack.push_async_callback(request_engine.dispose)
        for name, one in (("worker", engine), ("request", request_engine)):
            metrics.db_pool_used_ratio.labels(name).set_function(partial(getattr, one, "used_ratio"))
        keyring = Keyring(self.name, settings.private_key_file, settings.public_keys_file)
        callers = Callers(keyring)
        channels = Channels(callers, _tls(settings))
        stack.push_async_callback(channels.close)
        cache = Redis.from_url(settings.redis_url.get_secret_value())
        stack.push_async_callback(cache.aclose)
        outgoing = Outgoing(allow_private=settings.allow_private_targets)
        stack.push_async_callback(outgoing.close)
        cipher = Cipher(settings.master_key_file)
        runtime = Runtime(
            settings=settings,
            worker=Database(engine, self.name, sealing=SealedLetters(cipher)),
            request=Database(request_engine, self.name, tenanted=True),
            metrics=metrics,
            channels=channels,
            identities=Identities(keyring),
            cipher=cipher,
            cache=cache,
            outgoing=outgoing,
            tls=context_of(settings.tls_folder) if settings.tls_folder else None,
            stopping=running.stopping,
        )
        health = http.Health(self.name, VERSION)

        async def postgres() -> None:
            async with engine.statements() as connection:
                await sql(connection, "SELECT 1")

        health.add_check("postgres", postgres)
        for name, check in self._dependencies.items():
            health.add_check(name, check(runtime), needed=False)
        self._start_relays(runtime, health, stack, running)
        await self._start_servers(runtime, callers, health, stack)
        for name, build in self._besides.items():
            part = build(runtime)
            running.add(name, part.run, part.stop)
        if self.works:
            self._start_lanes(runtime, stack, running)
        await self._start_consumers(runtime, health, stack, running)
        stack.callback(health.drain)
        logs.get_logger("infra.service").info("service is up", http_port=settings.http_port)

    def _start_relays(self, runtime: Runtime, health: http.Health, stack: AsyncExitStack, running: Running) -> None:
        settings = runtime.settings
        kafka = KafkaPublisher(
            settings.kafka_bootstrap_servers.get_secret_value(),
            prefix=settings.topic_prefix,
            client_id=f"clawbus-{self.name}",
        )
        rabbit = RabbitPublisher(settings.rabbitmq_url.get_secret_value())

        async def brokers() -> None:
            await (await kafka.start()).client.force_metadata_update()

        health.add_check("kafka", brokers, needed=False)
        for publisher in (kafka, rabbit):
            stack.push_async_callback(publisher.stop)
            relay = Relay(runtime.worker, publisher, runtime.metrics, lease_seconds=settings.lease_seconds)
            runtime.worker.on_messages(relay.wake)
            runtime.request.on_messages(relay.wake)
            running.add(f"relay to {publisher.bus}", relay.run, relay.stop)
        maintenance = Maintenance(runtime.worker, runtime.metrics, self.read_models, settings.verify_read_models_at)
        running.add("maintenance", maintenance.run, maintenance.stop)

    async def _start_servers(
        self, runtime: Runtime, callers: Callers, health: http.Health, stack: AsyncExitStack
    ) -> None:
        if self._servicers or runtime.settings.grpc_port is not None:
            server = rpc.Server(
                self.name,
                callers,
                runtime.metrics,
                tls=_tls(runtime.settings),
                shared=runtime.settings.share_ports,
            )
            for add, servicer in [
                operations.servicer(runtime.worker, health),
                *(factory(runtime) for factory in self._servicers),
            ]:
                add(servicer, server.grpc)
            await server.start(runtime.settings.grpc_port, runtime.settings.listen_host)
            stack.push_async_callback(server.stop)
        routes = [route for factory in self._routes for route in factory(runtime)]
        app = http.create_app(routes, health, runtime.metrics)
        raw = [route for route in routes if isinstance(route, RawRoute)]
        settings = runtime.settings
        if settings.tls_folder:
            runtime.metrics.certificate_end.set(end_of(settings.tls_folder / TLS_FILES[1]).timestamp())
        web = await serve_http(
            app,
            settings.http_port,
            settings.listen_host,
            settings.tls_folder,
            raw=raw,
            shared=settings.share_ports,
            draining=health.is_draining,
        )
        stack.push_async_callback(web.stop)

    def _start_lanes(self, runtime: Runtime, stack: AsyncExitStack, running: Running) -> None:
        settings = runtime.settings
        # The runner has a connection of its own to listen, claim and renew, so handlers cannot starve it of the pool.
        control = db.create_engine(settings.database_url.get_secret_value(), pool_size=1, name=f"{self.name} lanes")
        stack.push_async_callback(control.dispose)
        works = []
        for work, adapters in self.works:
            built = {name: build(runtime) for name, build in adapters.items()}
            dead = partial(work.dead, **built) if work.dead else None
            works.append(replace(work, handler=partial(work.handler, **built), dead=dead))
        runner = LaneRunner(runtime.worker, works, control, runtime.metrics, lease_seconds=settings.lease_seconds)
        for database in (runtime.worker, runtime.request):
            database.on_items(runner.wake)
            database.claim_for(runner)
        running.add("lanes", runner.run, runner.stop)

    async def _start_consumers(
        self, runtime: Runtime, health: http.Health, stack: AsyncExitStack, running: Running
    ) -> None:
        settings = runtime.settings
        bound = [self._bind(subscription, runtime) for subscription in self.subscriptions]
        for subscription in (s for s in bound if s.tail):
            tail = Tail(
                subscription,
                bootstrap=settings.kafka_bootstrap_servers.get_secret_value(),
                prefix=settings.topic_prefix,
            )
            running.add(f"tail {subscription.name}", tail.run, tail.stop)
        subscribed = [subscription for subscription in bound if not subscription.tail]
        # Needed even without subscriptions: a message that could not be published is a dead letter too.
        redriver = Redriver(runtime.worker, subscribed, runtime.metrics)
        running.add("redrive", redriver.run, redriver.stop)
        by_group: dict[tuple[type[TransactionalReader | AtLeastOnceReader], str], list[Subscription]] = {}
        for subscription in subscribed:
            if isinstance(subscription.source, Topic):
                kind = AtLeastOnceReader if subscription.at_least_once else TransactionalReader
                by_group.setdefault((kind, subscription.group), []).append(subscription)
        for (kind, group), subscriptions in by_group.items():
            reader = kind(
                runtime.worker,
                group,
                subscriptions,
                bootstrap=settings.kafka_bootstrap_servers.get_secret_value(),
                metrics=runtime.metrics,
                prefix=settings.topic_prefix,
                session_ms=settings.kafka_session_ms,
            )
            health.add_probe(f"consumer {group}", partial(_makes_progress, reader))
            running.add(f"reader {group}", reader.run, reader.stop)
        jobs = [s for s in subscribed if isinstance(s.source, Queue)]
        if jobs:
            workers = Workers(runtime.worker, jobs, settings.rabbitmq_url.get_secret_value(), runtime.metrics)

            async def rabbitmq() -> None:
                if not await workers.ping():
                    raise ConnectionError("RabbitMQ does not answer")

            health.add_check("rabbitmq", rabbitmq, needed=False)
            await retry_start("RabbitMQ", workers.start, running.stopping)
            stack.push_async_callback(workers.stop)

    def _bind(self, subscription: Subscription, runtime: Runtime) -> Subscription:
        built = {name: build(runtime) for name, build in self.adapters[subscription.name].items()}
        if not built:
            return subscription
        tail = partial(subscription.tail, **built) if subscription.tail else None
        return replace(subscription, handler=partial(subscription.handler, **built), tail=tail)


def _tls(settings: Settings) -> rpc.Tls | None:
    return rpc.Tls.read(settings.tls_folder) if settings.tls_folder else None


def _makes_progress(reader: TransactionalReader | AtLeastOnceReader) -> bool:
    return reader.stuck_for() < STUCK_SECONDS
