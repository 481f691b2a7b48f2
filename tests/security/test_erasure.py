"""A person's words go through the whole system; then the person is erased, and every store is searched for the words.

Words may stay only in the stores that docs/operations.md names, and only for the time that it names.
"""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
import pytest_asyncio

from protos.catalog import CATALOG
from tests.security.furnished import dead_letter
from tests.security.stores import in_objects, places_of
from tests.services.agent.learning.test_notes import NOTE, answer
from tests.services.plugin.conftest import register, tool
from tests.services.plugin.toolserver import ToolServer, tool_server
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines import ENGINES
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
    assert len(await asyncio.to_thread(in_objects, system, CANARY)) == 2
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
    found = await places_of(system, CANARY)
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
