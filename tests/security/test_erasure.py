"""A person's words go through the whole system; then the person is erased, and every store is searched for the words.

Words may stay only in the stores that docs/operations.md names, and only for the time that it names.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Iterable
from datetime import timedelta
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import pytest
import pytest_asyncio
from aiokafka import AIOKafkaConsumer, TopicPartition
from minio import Minio
from redis.asyncio import Redis

from protos.catalog import CATALOG
from tests.security.furnished import dead_letter
from tests.services.agent.learning.test_notes import NOTE, answer
from tests.services.plugin.conftest import register, tool
from tests.services.plugin.toolserver import ToolServer, tool_server
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines import ENGINES
from tooling.stack.home import SERVICES
from tooling.testing.model_server import KEY, ModelServer, Says, model_server
from tooling.testing.platform import Platform
from tooling.testing.vendors import WebhookStandIn

CANARY = "Zaunkönigweg9271"
MODEL = "gpt-4o-mini"
BEFORE_EXPIRY = timedelta(days=7)
"""What an outbox and a topic with personal content keep at most."""
# Topics whose messages have personal content.
PERSONAL = {"agent.events", "channel.events"}


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def models() -> AsyncIterator[ModelServer]:
    async with model_server() as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def server() -> AsyncIterator[ToolServer]:
    async with tool_server() as running:
        yield running


async def got(system: Platform, service: str, tenant: str, path: str, **params: Any) -> Any:
    async with system.client(service, tenant) as client:
        answer = await client.get(path, params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def made(system: Platform, service: str, tenant: str, path: str, body: Any, status: int = 201) -> Any:
    async with system.client(service, tenant) as client:
        answer = await client.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json() if answer.content else None


@pytest.mark.asyncio(loop_scope="package")
async def test_after_an_erasure_the_words_of_the_person_are_in_no_store_but_those_that_expire(
    system: Platform, models: ModelServer, server: ToolServer
) -> None:
    tenant = (await made(system, "user", "", "/api/v1/tenants", {"name": "Aviary"}))["id"]
    await register(system, tenant, server, tool("echo", text={"type": "string"}))
    provider = {"base_url": models.url, "api_key": KEY}
    body = {
        "name": "a",
        "model": f"openai/{MODEL}",
        "system_prompt": "",
        "provider": provider,
        "tools": ["echo"],
        "learning": "model",
    }
    agent = (await made(system, "agent", tenant, "/api/v1/agents", body))["id"]
    drawn = base64.b64encode(CANARY.encode()).decode()
    note = NOTE | {"text": f"Lives in {CANARY}.", "quote": f"I live in {CANARY}", "replaces": None}
    models.script(
        MODEL,
        Says(calls=(("echo", f'{{"text": "{CANARY}"}}'),)),
        Says(f"You live in {CANARY}: ![map](data:text/plain;base64,{drawn})"),
        Says(answer(note)),
    )
    async with WebhookStandIn() as vendor:
        account = {"type": "webhook", "agent_id": agent, "credentials": vendor.credentials}
        channel = await made(system, "channel", tenant, "/api/v1/channels", account)
        vendor.files["/home.txt"] = CANARY.encode()
        sent = {"url": f"{vendor.url}/home.txt", "name": "home.txt", "content_type": "text/plain"}
        message = {"conversation_id": "c1", "user_id": f"person of {CANARY}", "text": f"I live in {CANARY}."}
        content, headers = vendor.signed(message | {"attachments": [sent]})
        async with httpx.AsyncClient(base_url=system.url("channel"), trust_env=False) as client:
            assert (await client.post(channel["webhook_path"], content=content, headers=headers)).status_code == 200

        async def answered() -> dict[str, Any] | None:
            items = (await got(system, "agent", tenant, "/api/v1/runs"))["items"]
            return items[0] if items and items[0]["status"] == "completed" and len(vendor.texts()) == 2 else None

        run = await system.until(answered)
    assert run
    assert run["reply"] == f"You live in {CANARY}: [map.txt]"
    async with system.database("agent").begin() as tx:
        [(person, session)] = await tx.sql("SELECT subject_id, session_key FROM run WHERE id = $1", UUID(run["id"]))

    async def remembered() -> bool:
        search = {"query": CANARY, "types": ["conversation"], "session_key": session}
        found = await made(system, "memory", tenant, "/api/v1/memory/search", search, 200)
        return any(CANARY in item["text"] for item in found["items"])

    await system.until(remembered)

    async def learned() -> bool:
        items = (await got(system, "memory", tenant, "/api/v1/memories", scope="user", scope_id=person))["items"]
        return [item["text"] for item in items] == [note["text"]]

    await system.until(learned)
    # The file that the person sent, and the one of the answer.
    assert len(await asyncio.to_thread(in_objects, system)) == 2
    letter = await dead_letter(system, tenant, person, f"Greetings to {CANARY}")
    assert CANARY in (await got(system, "log_aggregator", tenant, f"/api/v1/deadletters/{letter}"))["payload"]

    await made(system, "user", tenant, f"/api/v1/subjects/{person}/erase", None, 204)
    for service in ("agent", "channel", "memory", "plugin"):

        async def erased(service: str = service) -> bool:
            async with system.database(service).begin() as tx:
                return bool(
                    await tx.sql("SELECT 1 FROM subject_key WHERE subject_id = $1 AND destroyed_at IS NOT NULL", person)
                )

        await system.until(erased)

    assert (await got(system, "agent", tenant, f"/api/v1/runs/{run['id']}"))["reply"] == "[erased]"
    assert (await got(system, "log_aggregator", tenant, f"/api/v1/deadletters/{letter}"))["payload"] in ("", "[erased]")

    async def forgotten() -> bool:
        return not await remembered()

    await system.until(forgotten)
    await files_are_deleted(system, tenant)
    await nothing_left_to_publish(system)
    found = {
        "PostgreSQL": await in_postgres(system),
        "Kafka": await in_kafka(system),
        "RabbitMQ": await in_rabbitmq(system),
        "Valkey": await in_valkey(system),
        "object store": await asyncio.to_thread(in_objects, system),
        "OpenSearch": await in_opensearch(system),
        "log files": in_files(system),
    }
    assert {"outbox"} >= {place.partition(".")[2] for place in found.pop("PostgreSQL")}
    assert found.pop("Kafka") <= PERSONAL
    assert found == {"RabbitMQ": set(), "Valkey": set(), "object store": set(), "OpenSearch": set(), "log files": set()}


def test_what_expires_does_so_within_the_time_that_the_documentation_names() -> None:
    topics = {topic.name: topic for topic in CATALOG.topics}
    assert all(topics[name].retention <= BEFORE_EXPIRY for name in PERSONAL)
    assert all((queue.expires or timedelta(hours=24)) <= timedelta(hours=24) for queue in CATALOG.queues)


def test_the_documentation_names_every_store() -> None:
    text = (CHECKOUT / "docs" / "operations.md").read_text()
    table = text.partition("## Erasure")[2].partition("\n## ")[0]
    named = " ".join(re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)).casefold()
    words = {"postgres": "postgresql", "s3": "object store", "nginx": "gateway", "mailbox": "mail"}
    stores = {words.get(name, name) for name in ENGINES} | {"log files", "backups"}
    assert {store for store in stores if store not in named} == set()


async def files_are_deleted(system: Platform, tenant: str) -> None:
    """Their deletion is due some minutes after the erasure, and here at once."""

    async def due() -> bool:
        async with system.database("channel").begin() as tx:
            await tx.sql(
                "UPDATE lane_item SET not_before = now() WHERE kind = 'erased files' AND tenant_id = $1 "
                "AND not_before > now()",
                tenant,
            )
            await tx.sql("UPDATE lane SET ready_at = now() WHERE kind = 'erased files' AND ready_at > now()")
            return not await tx.sql("SELECT 1 FROM attachment WHERE tenant_id = $1", tenant)

    await system.until(due)


async def nothing_left_to_publish(system: Platform) -> None:
    for service in SERVICES:

        async def published(service: str = service) -> bool:
            async with system.database(service).begin() as tx:
                return not await tx.sql("SELECT FROM outbox WHERE published_at IS NULL")

        await system.until(published)


def _forms() -> tuple[str, ...]:
    """The canary as text, in JSON with escapes, as PostgreSQL shows bytes, and in base64 (without its last letters,
    which depend on the next ones)."""
    escaped = CANARY.encode("unicode_escape").decode().replace("\\x", "\\u00")
    return CANARY, escaped, CANARY.encode().hex(), base64.b64encode(CANARY.encode()).decode()[:-4]


def _has(content: str) -> bool:
    return any(form in content for form in _forms())


async def in_postgres(system: Platform) -> set[str]:
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
            list(_forms()),
        )
        if rows:
            found.add(f"{schema}.{table}")
    await admin.close()
    return found


async def in_kafka(system: Platform) -> set[str]:
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
                    if any(_has(f"{r.key!r} {r.headers} {(r.value or b'').decode(errors='replace')}") for r in records):
                        found.add(topic.name)
    finally:
        await consumer.stop()
    return found


async def in_rabbitmq(system: Platform) -> set[str]:
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
            if any(_has(str(message)) for message in messages):
                found.add(queue["name"])
    assert queues
    return found


async def in_valkey(system: Platform) -> set[str]:
    redis = Redis.from_url(system.stack.redis_url)
    found = set()
    async for key in redis.scan_iter(count=1000):
        if _has((key + (await redis.dump(key) or b"")).decode(errors="replace")):
            found.add(repr(key))
    await redis.aclose()
    return found


def in_objects(system: Platform) -> set[str]:
    access = system.stack.engines["s3"]
    url = httpx.URL(access["endpoint"])
    store = Minio(url.netloc.decode(), access["access_key"], access["secret_key"], secure=False, region="us-east-1")
    found = set()
    for bucket in store.list_buckets():
        for item in store.list_objects(bucket.name, recursive=True):
            response = store.get_object(bucket.name, str(item.object_name))
            if _has(f"{item.object_name} {response.read().decode(errors='replace')}"):
                found.add(str(item.object_name))
            response.close()
            response.release_conn()
    return found


async def in_opensearch(system: Platform) -> set[str]:
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
            found |= {hit["_index"] for hit in hits if _has(str(hit))}
            if not hits:
                break
            after = hits[-1]["sort"]
    assert seen, "log lines, events and spans were indexed"
    return found


def in_files(system: Platform) -> set[str]:
    paths: Iterable[Any] = [path for path in system.folder.rglob("*") if path.is_file()]
    return {path.name for path in paths if _has(path.read_text(errors="replace"))}
