"""Where benches run: a database of their own, topics of their own, and somewhere for the spans to go."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from infra.schema import Passwords, prepare_database, role_url
from infra.testing.stack import Stack

SERVICE = "bench"
PARTITIONS = 4


@dataclass(frozen=True)
class Ground:
    """`admin` is the administrator's connection with the bench's schema first in its path; `url` the worker's."""

    admin_url: str
    bootstrap: str
    prefix: str
    url: str
    admin: asyncpg.Connection
    otlp: str

    async def end_offsets(self, topic: str) -> int:
        """How many records the topic has had."""
        consumer = AIOKafkaConsumer(bootstrap_servers=self.bootstrap)
        await consumer.start()
        try:
            ends = await consumer.end_offsets([TopicPartition(self.prefix + topic, n) for n in range(PARTITIONS)])
        finally:
            await consumer.stop()
        return sum(ends.values())


@asynccontextmanager
async def ground(stack: Stack, topics: list[str]) -> AsyncIterator[Ground]:
    """Makes the database, its kernel tables, these topics and a receiver of spans; removes them at the end."""
    name = f"bench_{secrets.token_hex(6)}"
    admin = await asyncpg.connect(stack.postgres_url)
    kafka = AIOKafkaAdminClient(bootstrap_servers=stack.kafka_bootstrap_servers)
    await kafka.start()
    sink = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "infra.testing.bench.sink", stdin=subprocess.PIPE, stdout=subprocess.PIPE
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
        yield Ground(url, stack.kafka_bootstrap_servers, f"{name}.", worker, inside, endpoint)
        await inside.close()
    finally:
        sink.terminate()
        await sink.wait()
        await kafka.delete_topics([f"{name}.{topic}" for topic in topics])
        await kafka.close()
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.close()


async def connections(url: str, count: int) -> Any:
    """A pool of asyncpg itself, for the anchors."""
    return await asyncpg.create_pool(url, min_size=count, max_size=count)
