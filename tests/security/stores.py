"""Searches for a word in every store of the system."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable
from typing import Any

import asyncpg
import httpx
from aiokafka import AIOKafkaConsumer, TopicPartition
from minio import Minio
from redis.asyncio import Redis

from infra.stores.objects import list_objects
from protos.catalog import CATALOG
from tooling.stack.home import SERVICES
from tooling.testing.platform import Platform


async def places_of(system: Platform, word: str) -> dict[str, set[str]]:
    """Store → the tables, topics, queues, keys, objects, indexes and files that have the word in any form."""
    await nothing_left_to_publish(system)
    return {
        "PostgreSQL": await in_postgres(system, word),
        "Kafka": await in_kafka(system, word),
        "RabbitMQ": await in_rabbitmq(system, word),
        "Valkey": await in_valkey(system, word),
        "object store": await asyncio.to_thread(in_objects, system, word),
        "OpenSearch": await in_opensearch(system, word),
        "log files": in_files(system, word),
    }


async def nothing_left_to_publish(system: Platform) -> None:
    for service in SERVICES:

        async def published(service: str = service) -> bool:
            async with system.database(service).begin() as tx:
                return not await tx.sql("SELECT FROM outbox WHERE published_at IS NULL")

        await system.until(published)


def _forms(word: str) -> tuple[str, ...]:
    """The word as text, in JSON with escapes, as PostgreSQL shows bytes, and in base64 (without its last letters,
    which depend on the next ones)."""
    escaped = word.encode("unicode_escape").decode().replace("\\x", "\\u00")
    return word, escaped, word.encode().hex(), base64.b64encode(word.encode()).decode()[:-4]


def _has(content: str, word: str) -> bool:
    return any(form in content for form in _forms(word))


async def in_postgres(system: Platform, word: str) -> set[str]:
    """The tables (``schema.table``) that have the words in any column."""
    admin = await asyncpg.connect(system.database_url)
    tables = await admin.fetch(
        """
        SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p', 'm') AND NOT c.relispartition
          AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
        """
    )
    assert len(tables) > 50
    found = set()
    for schema, table in tables:
        rows = await admin.fetchval(
            f'SELECT count(*) FROM "{schema}"."{table}" t WHERE EXISTS (SELECT FROM unnest($1::text[]) f '
            "WHERE position(f IN t::text) > 0)",
            list(_forms(word)),
        )
        if rows:
            found.add(f"{schema}.{table}")
    await admin.close()
    return found


async def in_kafka(system: Platform, word: str) -> set[str]:
    found = set()
    consumer = AIOKafkaConsumer(bootstrap_servers=system.stack.kafka_bootstrap_servers, enable_auto_commit=False)
    await consumer.start()
    try:
        for topic in CATALOG.topics:
            name = system.prefix + topic.name
            partitions = [TopicPartition(name, n) for n in consumer.partitions_for_topic(name) or ()] or [
                TopicPartition(name, n) for n in range(topic.partitions)
            ]
            consumer.assign(partitions)
            await consumer.seek_to_beginning(*partitions)
            ends = await consumer.end_offsets(partitions)
            while any([await consumer.position(tp) < end for tp, end in ends.items()]):
                for records in (await consumer.getmany(timeout_ms=1000)).values():
                    if any(
                        _has(f"{r.key!r} {r.headers} {(r.value or b'').decode(errors='replace')}", word)
                        for r in records
                    ):
                        found.add(topic.name)
    finally:
        await consumer.stop()
    return found


async def in_rabbitmq(system: Platform, word: str) -> set[str]:
    """The queues that still have a message: after the erasure all work of this test is done."""
    url = httpx.URL(system.stack.rabbitmq_management_url)
    vhost = httpx.URL(system.rabbitmq_url).path.strip("/")
    auth = (url.username, url.password)
    async with httpx.AsyncClient(base_url=url.copy_with(userinfo=b""), auth=auth, trust_env=False) as client:
        queues = (await client.get(f"/api/queues/{vhost}")).raise_for_status().json()
        found = set()
        for queue in queues:
            wanted = {"count": 100, "ackmode": "ack_requeue_true", "encoding": "auto"}
            messages = (await client.post(f"/api/queues/{vhost}/{queue['name']}/get", json=wanted)).json()
            if any(_has(str(message), word) for message in messages):
                found.add(queue["name"])
    assert queues
    return found


async def in_valkey(system: Platform, word: str) -> set[str]:
    redis = Redis.from_url(system.stack.redis_url)
    found = set()
    async for key in redis.scan_iter(count=1000):
        if _has((key + (await redis.dump(key) or b"")).decode(errors="replace"), word):
            found.add(repr(key))
    await redis.aclose()
    return found


def in_objects(system: Platform, word: str) -> set[str]:
    access = system.stack.engines["s3"]
    url = httpx.URL(access["endpoint"])
    store = Minio(url.netloc.decode(), access["access_key"], access["secret_key"], secure=False, region="us-east-1")
    found = set()
    for bucket in store.list_buckets():
        for item in list_objects(store, bucket.name):
            response = store.get_object(bucket.name, str(item.object_name))
            if _has(f"{item.object_name} {response.read().decode(errors='replace')}", word):
                found.add(str(item.object_name))
            response.close()
            response.release_conn()
    return found


async def in_opensearch(system: Platform, word: str) -> set[str]:
    """The indexes of log lines, events and spans that have the words, searched document by document."""
    found = set()
    url = system.stack.engines["opensearch"]["url"]
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=60) as client:
        path = f"/{system.prefix}clawbus-*"
        await client.post(f"{path}/_refresh")
        after: list[Any] = []
        seen = 0
        while True:
            query = {"size": 1000, "sort": [{"_id": "asc"}], **({"search_after": after} if after else {})}
            answer = (await client.post(f"{path}/_search", json=query)).raise_for_status().json()
            hits = answer["hits"]["hits"]
            seen += len(hits)
            found |= {hit["_index"] for hit in hits if _has(str(hit), word)}
            if not hits:
                break
            after = hits[-1]["sort"]
    assert seen, "log lines, events and spans were indexed"
    return found


def in_files(system: Platform, word: str) -> set[str]:
    paths: Iterable[Any] = [path for path in system.folder.rglob("*") if path.is_file()]
    return {path.name for path in paths if _has(path.read_text(errors="replace"), word)}
