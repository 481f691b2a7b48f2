"""A fresh database, fresh topics and a receiver of spans for one bench."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import httpx
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from infra.postgres.schema import Passwords, prepare_database, role_url
from tooling.testing.platform import Platform, running_platform
from tooling.testing.stack import Stack

SERVICE = "bench"
# Tests have shorter times, because they wait until they expire.
PRODUCTION = {"CLAW_LEASE_SECONDS": "9", "CLAW_KAFKA_SESSION_MS": "10000"}
PARTITIONS = 4


@dataclass(frozen=True)
class Fixture:
    """Everything that a bench uses on the engines of `stack`."""

    stack: Stack
    admin_url: str
    """The administrator's URL of the fresh database."""
    bootstrap: str
    """Kafka's bootstrap servers."""
    prefix: str
    """Prefix of the names of the topics."""
    url: str
    """The database URL of the bench's worker role."""
    admin: asyncpg.Connection
    """The administrator's connection; the bench's schema is first in its search path."""
    otlp: str
    """Base URL of the receiver of spans."""

    async def check_durable(self) -> None:
        """Raises ValueError if a commit does not wait for the disk."""
        settings = "SELECT current_setting('fsync') || current_setting('synchronous_commit')"
        if await self.admin.fetchval(settings) != "onon":
            raise ValueError("fsync and synchronous_commit of PostgreSQL: must be on; no figure is reported")

    async def end_offsets(self, topic: str) -> int:
        """Number of records that were ever written to the topic."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap)
        await consumer.start()
        try:
            ends = await consumer.end_offsets([TopicPartition(self.prefix + topic, n) for n in range(PARTITIONS)])
        finally:
            await consumer.stop()
        return sum(ends.values())


@asynccontextmanager
async def bench_fixture(stack: Stack, topics: list[str]) -> AsyncIterator[Fixture]:
    """Makes the database, its kernel tables, these topics and a receiver of spans, and removes them at the end."""
    name = f"bench_{secrets.token_hex(6)}"
    admin = await asyncpg.connect(stack.postgres_url)
    kafka = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_bootstrap_servers)
    await kafka.start()
    sink = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tooling.bench.span_sink", stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        url = urlunsplit(urlsplit(stack.postgres_url)._replace(path=f"/{name}"))
        passwords = Passwords(*(secrets.token_hex(12) for _ in range(3)))
        await prepare_database(url, {SERVICE: passwords})
        await kafka.create_topics([NewTopic(f"{name}.{topic}", PARTITIONS, 1) for topic in topics])
        assert sink.stdout is not None
        endpoint = (await sink.stdout.readline()).decode().strip()
        worker = role_url(url, SERVICE, "worker", passwords.worker)
        inside = await asyncpg.connect(url, server_settings={"search_path": SERVICE})
        yield Fixture(stack, url, stack.kafka_bootstrap_servers, f"{name}.", worker, inside, endpoint)
        await inside.close()
    finally:
        sink.terminate()
        await sink.wait()
        await kafka.delete_topics([topic for topic in await kafka.list_topics() if topic.startswith(f"{name}.")])
        await kafka.close()
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.close()


@asynccontextmanager
async def running_platform_on(place: Fixture) -> AsyncIterator[Platform]:
    """The product's services in the fixture's database, with topics and a virtual host of their own. They end with the
    block."""
    name = place.prefix.removesuffix(".")
    url = urlsplit(place.stack.rabbitmq_management_url)
    vhost = urlunsplit(urlsplit(place.stack.rabbitmq_url)._replace(path=f"/{name}"))
    async with httpx.AsyncClient(
        base_url=f"http://{url.hostname}:{url.port}/api",
        auth=(url.username or "", url.password or ""),
        trust_env=False,
        timeout=30,
    ) as management:
        (await management.put(f"/vhosts/{name}")).raise_for_status()
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        try:
            (await management.put(f"/permissions/{name}/{url.username}", json=everything)).raise_for_status()
            with tempfile.TemporaryDirectory() as folder:
                # The benches' own topics have the same names behind the fixture's prefix, with other settings.
                prefix = f"{place.prefix}platform."
                async with running_platform(place.stack, place.admin_url, vhost, prefix, Path(folder)) as platform:
                    yield platform
        finally:
            (await management.delete(f"/vhosts/{name}")).raise_for_status()


async def connections(url: str, count: int) -> Any:
    """A pool of plain asyncpg connections, for the anchors."""
    return await asyncpg.create_pool(url, min_size=count, max_size=count)


@asynccontextmanager
async def child(*command: str | Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that takes lines on stdin and prints lines on stdout. It is killed at the end of the block."""
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
