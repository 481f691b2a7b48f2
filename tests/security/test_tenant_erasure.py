"""A tenant that has one of everything is erased. Every store is searched for its words, every table for its id.

Words may stay only in the places that docs/operations.md names.
"""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest

from infra.security.auth import IDENTITY_HEADER
from infra.service.tenant_erasure import ERASURES
from services.billing.tenants import KEPT
from tests.security.conftest import environment
from tests.security.furnished import Furnished, asked, furnish
from tests.security.stores import places_of
from tests.services.memory.conftest import Vectors
from tooling.stack.home import SERVICES
from tooling.testing.keys import identities
from tooling.testing.platform import ADMIN_TOKEN, Platform

pytestmark = pytest.mark.asyncio(loop_scope="package")

WORD = "Zilpzalpwiese6650"
NOWHERE = "http://127.0.0.1:9/v1"
KILLED = ("memory", "billing")
# Rows that name an erased tenant and stay: that it was erased, and the books that the law requires.
STAYS = {
    *(f"{service}.erased_tenant" for service in SERVICES),
    *(f"billing.{table}" for table in KEPT if table != "buyer"),
    *(f"log_aggregator.{table}" for table in ("audit_record", "audit_head", "audit_verification")),
    *("user.tenant", "user.tenant_erasure"),
}


async def erase(system: Platform, tenant: str, confirm: str) -> httpx.Response:
    async with system.client("user") as operator:
        return await operator.post(f"/api/v1/tenants/{tenant}/erase", json={"confirm": confirm})


async def erased(system: Platform, tenant: str) -> dict[str, Any]:
    """The progress after the second pass of every service, which begins at once here and not ten minutes later."""

    async def over() -> dict[str, Any] | None:
        for service in SERVICES:
            async with system.database(service).begin() as tx:
                lanes = await tx.sql(
                    """
                    UPDATE lane_item AS i
                    SET not_before = now()
                    FROM lane AS l
                    WHERE l.lane_id = i.lane_id AND i.kind = $1 AND l.lane = $2 AND i.not_before > now()
                      AND i.seq = (SELECT min(seq) + 1 FROM lane_item AS o WHERE o.lane_id = i.lane_id)
                    RETURNING i.lane_id
                    """,
                    ERASURES.name,
                    tenant,
                )
                await tx.sql(
                    "UPDATE lane SET ready_at = now() WHERE lane_id = ANY($1::bigint[]) AND owner IS NULL",
                    [lane for (lane,) in lanes],
                )
        progress = await asked(system, "user", "", "GET", f"/api/v1/tenants/{tenant}/erasure")
        return progress if progress["erased_at"] else None

    found = await system.until(over)
    assert found
    return found


async def tables_of(system: Platform, tenant: str) -> set[str]:
    """The tables that have the id of the tenant in any column, but for messages that expire."""
    admin = await asyncpg.connect(system.database_url)
    tables = await admin.fetch(
        """
        SELECT n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE c.relkind IN ('r', 'p') AND NOT c.relispartition AND n.nspname = ANY($1::text[])
          AND c.relname NOT IN ('outbox', 'lane', 'lane_item')
        """,
        list(SERVICES),
    )
    found = {
        f"{schema}.{table}"
        for schema, table in tables
        if await admin.fetchval(
            f'SELECT count(*) FROM "{schema}"."{table}" t WHERE position($1 IN t::text) > 0', tenant
        )
    }
    await admin.close()
    return found


async def indexed(system: Platform, tenant: Furnished) -> Vectors:
    """Milvus, once it has the tenant's document."""
    vectors = Vectors(system.stack.engines["milvus"]["url"], system.prefix)

    async def has() -> bool:
        return bool(await asyncio.to_thread(vectors.ids, tenant.things["documents"]))

    await system.until(has)
    return vectors


async def test_an_erased_tenant_leaves_its_invoices_and_nothing_else(
    system: Platform, other: Furnished, tmp_path: Path
) -> None:
    tenant = await furnish(system, WORD)
    vectors = await indexed(system, tenant)
    body = {"name": "a", "model": "openai/gpt-4o-mini", "provider": {"base_url": NOWHERE, "api_key": WORD}}
    agent = await asked(system, "agent", tenant.id, "POST", "/api/v1/agents", {**body, "system_prompt": WORD})
    message = f"/api/v1/agents/{agent['id']}/sessions/s/messages"
    run = (await asked(system, "agent", tenant.id, "POST", message, {"text": WORD}))["run_id"]
    path = f"/api/v1/channels/{tenant.things['channels']}"
    webhook = (await asked(system, "channel", tenant.id, "GET", path))["webhook_path"]
    key = (await asked(system, "user", tenant.id, "POST", "/api/v1/api-keys", {"name": WORD}))["api_key"]
    assert {"agent.run", "channel.account", "memory.passage", "user.member", "billing.buyer"} <= await tables_of(
        system, tenant.id
    )
    [invoice] = (await asked(system, "billing", tenant.id, "GET", "/api/v1/invoices"))["items"]
    assert (invoice["status"], invoice["buyer"]["name"]) == ("draft", "")

    refused = await erase(system, tenant.id, "another name")
    assert (refused.status_code, refused.json()["errors"][0]["field"]) == (422, "confirm")
    # Each of these is killed once in the middle of its first pass, and goes on when it is started again.
    for service in KILLED:
        (tmp_path / service).touch()
        fatal = {"CLAW_FAILPOINT": "before_erased_table", "CLAW_FAILPOINT_PASS": "5"}
        system.stop(service)
        once = {"CLAW_FAILPOINT_ONCE": str(tmp_path / service)}
        await system.start(service, **environment(system), **fatal, **once)
    assert (await erase(system, tenant.id, WORD)).status_code == 202
    for service in KILLED:
        assert await asyncio.to_thread(system.processes[service].wait, 60) == -signal.SIGKILL
        await system.start(service, **environment(system))
    assert set((await erased(system, tenant.id))["services"]) == set(SERVICES)
    assert (await erase(system, tenant.id, "")).status_code == 202, "a repeated call changes nothing"

    assert await tables_of(system, tenant.id) <= STAYS
    assert await asyncio.to_thread(vectors.ids, tenant.things["documents"]) == []
    found = await places_of(system, WORD)
    places = found.pop("PostgreSQL")
    assert "billing.invoice" in places, "the name of the buyer of a finalised invoice"
    assert {place.partition(".")[2] for place in places - {"billing.invoice"}} <= {"outbox"}
    assert found.pop("Kafka") <= {"agent.events", "channel.events", "platform.events"}
    # The names of agents.
    assert {name.partition("clawbus-")[2][:5] for name in found.pop("OpenSearch")} <= {"spans"}
    assert found == {"RabbitMQ": set(), "Valkey": set(), "object store": set(), "log files": set()}

    await nothing_works(system, tenant.id, webhook, key)
    await run_was_cancelled(system, run)
    async with system.client("billing", tenant.id) as client:
        kept = (await client.get("/api/v1/invoices")).json()["items"]
        # The draft of the last period, and one of the days until the erasure.
        assert [(one["status"], one["number"], one["buyer"]["name"]) for one in kept] == [
            ("finalised", "INV-000001", WORD),
            ("finalised", "INV-000002", WORD),
        ]
        assert kept[0]["id"] == invoice["id"]
        assert (await client.get(f"/api/v1/invoices/{invoice['id']}/pdf")).content.startswith(b"%PDF")
        [subscription] = (await client.get("/api/v1/subscriptions")).json()["items"]
        assert subscription["ends_at"]
    for (service, path), view in other.views.items():
        assert await asked(system, service, other.id, "GET", path) == view, "another tenant is not touched"


async def nothing_works(system: Platform, tenant: str, webhook: str, key: str) -> None:
    """The webhook is answered as one that never existed, the key is refused, and the operator can only read."""
    unknown = "/webhooks/webhook/" + "x" * len(webhook.rpartition("/")[2])
    async with httpx.AsyncClient(base_url=system.url("channel"), trust_env=False) as vendor:

        async def closed() -> bool:
            answers = [await vendor.post(path, content=b"{}") for path in (webhook, unknown)]
            return answers[0].status_code == answers[1].status_code == 404

        # A process knows an account for three seconds.
        await system.until(closed)
    headers = {"Authorization": f"Bearer {key}", "X-Claw-Service": "agent"}
    async with httpx.AsyncClient(base_url=system.url("user"), trust_env=False) as gateway:
        assert (await gateway.get("/internal/auth", headers=headers)).status_code == 401
        headers |= {"Authorization": f"Bearer {ADMIN_TOKEN}", "X-Claw-Tenant": tenant}
        token = (await gateway.get("/internal/auth", headers=headers)).headers[IDENTITY_HEADER]
    assert identities("agent").verify(token, "GET", "/").scopes == {"read"}


async def run_was_cancelled(system: Platform, run: str) -> None:
    """The run ended by its cancellation before its rows were deleted."""
    async with system.database("agent").begin() as tx:
        rows = await tx.sql("SELECT body FROM outbox WHERE position(convert_to($1, 'UTF8') IN body) > 0", run)
    facts = [json.loads(body) for (body,) in rows]
    assert [fact["status"] for fact in facts if "status" in fact] == ["cancelled"]
