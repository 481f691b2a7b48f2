"""Runs the services as real processes on a test stack, with a database, a virtual host and topics of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import aio_pika
import httpx
import msgspec
from aiokafka import AIOKafkaProducer

from infra.clock import utcnow, uuid7
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import Passwords, migrate, prepare_database, role_url
from infra.security.auth import IDENTITY_HEADER, SCOPES, Identity
from infra.security.crypto import Cipher
from infra.security.sealed_letters import SealedLetters
from infra.web.rpc_client import Channels
from protos.catalog import CATALOG
from protos.envelope import Envelope, Message
from protos.topology import Catalog, Queue, Topic
from tooling.stack.checkout import CHECKOUT
from tooling.stack.home import SERVICE_PORTS
from tooling.stack.home import SERVICES as ALL
from tooling.stack.provision import provision_brokers
from tooling.testing import keys
from tooling.testing.processes import Process
from tooling.testing.stack import Stack, free_ports
from tooling.testing.until import until

# Roles belong to the whole PostgreSQL server, so all modules that share a stack must use the same passwords.
PASSWORDS = Passwords("owner-pw", "request-pw", "worker-pw")
MASTER_KEY = keys.MASTER_KEY
ADMIN_TOKEN = "an operator's token made up for tests"
READY_SECONDS = 90.0
ANSWER_SECONDS = 120.0
"""Of a client. Many tests at once on a slow machine must not end in a time-out."""
# The services serve plain HTTP. By default each client would read the system's certificates, which costs 25 ms of CPU.
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
# Engines that a service needs besides those of every test stack.
_NEEDED = {
    "memory": ("milvus", "s3"),
    "channel": ("s3",),
    "agent": ("s3",),
    "log_aggregator": ("opensearch", "s3"),
    "notification": ("mailbox",),
}


class Platform:
    """Service processes by their names in the catalog, on free ports. Logs go to `folder`."""

    def __init__(self, stack: Stack, database: str, vhost: str, prefix: str, folder: Path) -> None:
        self.stack = stack
        self.prefix = prefix
        self.database_url = database
        self.rabbitmq_url = vhost
        self.ports = free_ports(list(SERVICE_PORTS))
        self.processes: dict[str, Process] = {}
        self.folder = folder
        self._databases: dict[str, Database] = {}
        self._channels: dict[str, Channels] = {}
        self._producer: AIOKafkaProducer | None = None

    async def prepare(self, *names: str) -> None:
        """Makes the engines, roles, schemas, tables and queues that these services need, and all topics."""
        self.stack.need(*(engine for name in names for engine in _NEEDED.get(name, ())))
        await prepare_database(self.database_url, {name: PASSWORDS for name in names})
        for name in names:
            if (revisions := CHECKOUT / "services" / name / "migrations").exists():
                await migrate(self.database_url, name, revisions)
        # RabbitMQ takes about a second for the queues of all services.
        queues = tuple(queue for queue in CATALOG.queues if {queue.consumer, *queue.producers} & set(names))
        await provision_brokers(
            Catalog(CATALOG.topics, queues),
            self.database_url,
            kafka=self.stack.kafka_bootstrap_servers,
            rabbit_url=self.rabbitmq_url,
            management_url=self.stack.rabbitmq_management_url,
            prefix=self.prefix,
        )

    async def start(self, *names: str, **environment: str) -> None:
        """Starts these services and waits until they are ready. `environment` is added to the variables of each."""
        for name in names:
            self.spawn(name, **environment)
        for name in names:
            await self.ready(name)

    def spawn(self, name: str, **environment: str) -> None:
        """Starts one service without waiting. If it still runs because a test failed, it is stopped first."""
        if name in self.processes and self.processes[name].poll() is None:
            self.stop(name)
        log = self.folder / f"{name}.log"
        self.processes[name] = Process(f"services.{name}", {**self.environment(name), **environment}, log)

    def environment(self, name: str) -> dict[str, str]:
        grpc = {service: f"127.0.0.1:{self.ports[f'{service}_grpc']}" for service in ALL}
        engines = self.stack.engines
        found = {
            **os.environ,
            "PYTHONPATH": str(CHECKOUT),
            "CLAW_DATABASE_URL": role_url(self.database_url, name, "worker", PASSWORDS.worker),
            "CLAW_REQUEST_DATABASE_URL": role_url(self.database_url, name, "request", PASSWORDS.request),
            "CLAW_KAFKA_BOOTSTRAP_SERVERS": self.stack.kafka_bootstrap_servers,
            "CLAW_TOPIC_PREFIX": self.prefix,
            "CLAW_RABBITMQ_URL": self.rabbitmq_url,
            "CLAW_REDIS_URL": self.stack.redis_url,
            "CLAW_HTTP_PORT": str(self.ports[name]),
            "CLAW_GRPC_PORT": str(self.ports[f"{name}_grpc"]),
            **keys.environment(name),
            "CLAW_ADMIN_TOKEN": ADMIN_TOKEN,
            "CLAW_ALLOW_PRIVATE_TARGETS": "1",
            "CLAW_KAFKA_SESSION_MS": "6000",
            "CLAW_LEASE_SECONDS": "3",
            **{f"CLAW_{service.upper()}_GRPC": target for service, target in grpc.items()},
            "CLAW_OPERATIONS": ",".join(f"{service}={target}" for service, target in grpc.items()),
            "CLAW_AGENT_URL": self.url("agent"),
            "CLAW_PUBLIC_URL": "http://127.0.0.1:8080",
            "CLAW_OTLP_PORT": str(self.ports["otlp"]),
        }
        if "milvus" in engines:
            found["CLAW_MILVUS_URL"] = engines["milvus"]["url"]
        if "s3" in engines:
            found |= {f"CLAW_S3_{key.upper()}": value for key, value in engines["s3"].items()}
        if "opensearch" in engines:
            found["CLAW_OPENSEARCH_URL"] = engines["opensearch"]["url"]
        if "mailbox" in engines:
            found["CLAW_SMTP_URL"] = engines["mailbox"]["url"]
        return found

    async def ready(self, name: str) -> None:
        """Waits until the service is ready. Raises RuntimeError with the end of its log if it does not become ready."""
        deadline = time.monotonic() + READY_SECONDS
        answer = ""
        async with httpx.AsyncClient(base_url=self.url(name), trust_env=False) as client:
            while time.monotonic() < deadline and self.processes[name].poll() is None:
                try:
                    response = await client.get("/readyz")
                    answer = response.text
                    if response.status_code == 200:
                        return
                except httpx.HTTPError as error:
                    answer = str(error)
                await asyncio.sleep(0.1)
        raise RuntimeError(f"{name} did not become ready ({answer}); its log ends with\n{self.log(name)[-3000:]}")

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.ports[name]}"

    def grpc(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[f'{name}_grpc']}"

    def channels(self, caller: str) -> Channels:
        """The gRPC connections of the service `caller`: a method refuses callers that `protos.calls` does not list."""
        if caller not in self._channels:
            self._channels[caller] = Channels(keys.callers(caller))
        return self._channels[caller]

    def headers(
        self,
        tenant_id: str,
        *,
        scopes: tuple[str, ...] = SCOPES,
        actor: str = "api_key:test",
        groups: tuple[str, ...] = (),
    ) -> dict[str, str]:
        """The headers that the gateway adds to a request of this tenant. An empty tenant is the operator."""
        identity = Identity(actor if tenant_id else "operator", tenant_id, frozenset(scopes), groups=frozenset(groups))
        return {IDENTITY_HEADER: keys.identity_token(identity)}

    def client(self, name: str, tenant_id: str = "", **kwargs: Any) -> httpx.AsyncClient:
        """An HTTP client of one service for this tenant, or for the operator.

        It signs each request again: an identity is valid for a minute, and the tests of a module may take longer.
        """
        client = httpx.AsyncClient(base_url=self.url(name), trust_env=False, timeout=ANSWER_SECONDS, verify=_NO_TLS)

        async def identify(request: httpx.Request) -> None:
            # A client that follows an address elsewhere must not take its identity there.
            if (request.url.host, request.url.port) == (client.base_url.host, client.base_url.port):
                request.headers.update(self.headers(tenant_id, **kwargs))

        client.event_hooks = {"request": [identify]}
        return client

    def database(self, name: str) -> Database:
        """A `Database` of the service's worker role in this process."""
        if name not in self._databases:
            url = role_url(self.database_url, name, "worker", PASSWORDS.worker)
            self._databases[name] = Database(
                create_engine(url, pool_size=5), name, sealing=SealedLetters(Cipher(MASTER_KEY))
            )
        return self._databases[name]

    async def produce(
        self, topic: Topic, message: Message, *, key: str, tenant_id: str | None = None, message_id: UUID | None = None
    ) -> UUID:
        """Writes a fact to Kafka as its producer's relay does. Returns the message's id."""
        if self._producer is None:
            self._producer = AIOKafkaProducer(bootstrap_servers=self.stack.kafka_bootstrap_servers, acks="all")
            await self._producer.start()
        envelope = _envelope(topic.producers[0], message, key, tenant_id, message_id)
        await self._producer.send_and_wait(
            self.prefix + topic.name,
            msgspec.json.encode(message),
            key=key.encode(),
            headers=[(name, value.encode()) for name, value in envelope.headers().items()],
        )
        return envelope.id

    async def send(
        self,
        queue: Queue,
        message: Message,
        *,
        tenant_id: str | None = None,
        message_id: UUID | None = None,
        traceparent: str | None = None,
    ) -> UUID:
        """Publishes work to RabbitMQ as its producer's relay does. Returns the message's id."""
        envelope = _envelope(queue.producers[0], message, None, tenant_id, message_id, traceparent)
        connection = await aio_pika.connect(self.rabbitmq_url)
        async with connection:
            channel = await connection.channel()
            exchange = await channel.get_exchange(queue.exchange.name, ensure=False)
            await exchange.publish(
                aio_pika.Message(
                    msgspec.json.encode(message),
                    headers=dict(envelope.headers()),
                    message_id=str(envelope.id),
                    content_type="application/json",
                    delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
                ),
                routing_key=queue.routing_key,
            )
        return envelope.id

    async def outbox(self, name: str, destination: str) -> list[tuple[dict[str, str], dict[str, Any]]]:
        """Headers and bodies of the outbox rows of a service for a topic or an exchange, in order."""
        async with self.database(name).begin() as tx:
            rows = await tx.sql(
                "SELECT headers, body FROM outbox WHERE destination = $1 ORDER BY position", destination
            )
        return [(json.loads(headers), json.loads(body)) for headers, body in rows]

    until = staticmethod(until)

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        self.processes[name].send_signal(number)
        if number == signal.SIGKILL:
            self.processes[name].wait()

    def stop(self, name: str) -> int:
        """Sends SIGTERM, waits, and returns the exit code."""
        process = self.processes[name]
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            return process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    async def close(self) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        for name in self.processes:
            await asyncio.to_thread(self.stop, name)
        if self._producer:
            await self._producer.stop()
        for channels in self._channels.values():
            await channels.close()
        for database in self._databases.values():
            await database.engine.dispose()


@asynccontextmanager
async def running_platform(
    stack: Stack, database: str, vhost: str, prefix: str, folder: Path
) -> AsyncIterator[Platform]:
    """A platform. Its processes end with the block."""
    platform = Platform(stack, database, vhost, prefix, folder)
    try:
        yield platform
    finally:
        await platform.close()


def _envelope(
    source: str,
    message: Message,
    subject: str | None,
    tenant_id: str | None,
    message_id: UUID | None,
    traceparent: str | None = None,
) -> Envelope:
    return Envelope(
        id=message_id or uuid7(),
        source=source,
        type=message.wire_name(),
        time=utcnow(),
        subject=subject,
        tenant_id=tenant_id,
        traceparent=traceparent,
        tracestate=None,
    )
