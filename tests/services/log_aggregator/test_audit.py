"""Acts from Kafka are appended to the chains once, by tenant, and a change of a chain is detected."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import signal
from datetime import timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest
from asyncpg import connect

from infra.clock import utcnow, uuid7
from infra.security.crypto import KEY_BYTES, Cipher
from infra.security.rewrap import rewrap
from protos.catalog import AUDIT_LOGS
from protos.messages.audit import ActAudited
from services.log_aggregator.audit.lines import SEALED, AuditLines
from tooling.testing.platform import MASTER_KEY, Platform


def act(tenant_id: str | None, n: int = 0, **fields: Any) -> ActAudited:
    defaults: dict[str, Any] = {
        "tenant_id": tenant_id,
        "at": utcnow(),
        "actor": "api_key:k",
        "action": "agent.create",
        "object_kind": "agent",
        "object_id": str(n),
        "outcome": "done",
        "details": {"n": str(n)},
    }
    return ActAudited(**(defaults | fields))


async def publish(aggregator: Platform, *acts: ActAudited) -> None:
    for one in acts:
        tenant_id = one.tenant_id
        await aggregator.produce(AUDIT_LOGS, one, key=tenant_id or "system", tenant_id=tenant_id)


async def verified(client: httpx.AsyncClient, **params: str) -> dict[str, Any]:
    answer = await client.get("/api/v1/audit/verify", params=params)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def chained(aggregator: Platform, tenant_id: str, records: int) -> dict[str, Any]:
    """Waits until the chain has that many records. Returns the verification."""
    async with aggregator.client("log_aggregator", tenant_id) as client:

        async def ask() -> dict[str, Any] | None:
            found = await verified(client)
            return found if found["records"] >= records else None

        found = await aggregator.until(ask)
    assert found
    return found


async def test_acts_are_chained_in_their_order_and_a_client_can_recompute_the_hashes(
    aggregator: Platform, tenant: str
) -> None:
    acts = [act(tenant, n, details={"text": f"ümlaut \x00 {n}"}) for n in range(7)]
    await publish(aggregator, *acts)
    verdict = await chained(aggregator, tenant, 7)
    async with aggregator.client("log_aggregator", tenant) as client:
        pages = []
        cursor: dict[str, str] = {}
        while True:
            answer = (await client.get("/api/v1/audit", params={"limit": "3", **cursor})).json()
            pages.append(answer["items"])
            if not answer["next"]:
                break
            cursor = {"cursor": answer["next"]}
    assert [len(items) for items in pages] == [3, 3, 1]
    records = [record for items in pages for record in items][::-1]
    assert [record["seq"] for record in records] == list(range(1, 8))
    assert [record["details"] for record in records] == [one.details for one in acts]
    async with aggregator.database("log_aggregator").begin() as tx:
        stored = await tx.sql("SELECT record FROM audit_record WHERE tenant_id = $1 ORDER BY seq", tenant)
    previous = bytes(32)
    for record, (text,) in zip(records, stored, strict=True):
        assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) == text
        previous = hashlib.sha256(previous + text.encode()).digest()
        assert record["hash"] == previous.hex()
    line = f"clawbus-audit-2 {tenant} 7 {previous.hex()} "
    assert verdict.pop("line").startswith(line)
    del verdict["stored"]
    assert verdict == {"records": 7, "ok": True, "head": previous.hex(), "broken_at": None}


async def test_a_repeated_message_is_one_record(aggregator: Platform, tenant: str) -> None:
    id_ = uuid7()
    for _ in range(3):
        await aggregator.produce(AUDIT_LOGS, act(tenant, 1), key=tenant, tenant_id=tenant, message_id=id_)
    await publish(aggregator, act(tenant, 2))
    assert (await chained(aggregator, tenant, 2))["records"] == 2


async def test_killed_in_the_middle_it_chains_every_act_once(aggregator: Platform, tenant: str) -> None:
    tenants = [tenant, *(str(uuid4()) for _ in range(4))]
    for n in range(0, 300, 50):
        acts = [act(tenants[i % len(tenants)], i) for i in range(n, n + 50)]
        await publish(aggregator, *acts)
        if n == 150:
            aggregator.kill("log_aggregator", signal.SIGKILL)
            await aggregator.start("log_aggregator")
    for id_ in tenants:
        verdict = await chained(aggregator, id_, 60)
        assert (verdict["records"], verdict["ok"]) == (60, True)
        async with aggregator.client("log_aggregator", id_) as client:
            items = (await client.get("/api/v1/audit", params={"limit": 200})).json()["items"]
        assert len({item["id"] for item in items}) == 60
        numbers = [int(item["object_id"]) for item in items]
        assert numbers == sorted(numbers, reverse=True)


async def test_the_list_is_filtered_by_the_query(aggregator: Platform, tenant: str) -> None:
    old = utcnow() - timedelta(days=2)
    await publish(
        aggregator,
        act(tenant, 1, at=old),
        act(tenant, 2, actor="member:m"),
        act(tenant, 3, action="agent.delete"),
        act(tenant, 2, action="agent.delete"),
    )
    await chained(aggregator, tenant, 4)
    async with aggregator.client("log_aggregator", tenant) as client:

        async def seqs(**params: str) -> list[int]:
            answer = await client.get("/api/v1/audit", params=params)
            assert answer.status_code == 200, answer.text
            return [item["seq"] for item in answer.json()["items"]]

        assert await seqs() == [4, 3, 2, 1]
        assert await seqs(action="agent.delete") == [4, 3]
        assert await seqs(object_id="2") == [4, 2]
        assert await seqs(object_id="2", action="agent.delete") == [4]
        assert await seqs(actor="member:m") == [2]
        assert await seqs(since=(utcnow() - timedelta(days=1)).isoformat()) == [4, 3, 2]
        for params, field in (
            ({"since": "yesterday"}, "since"),
            ({"since": "2026-01-01T00:00:00"}, "since"),
            ({"cursor": "eA=="}, "cursor"),
            ({"actor": "\x00"}, "actor"),
        ):
            answer = await client.get("/api/v1/audit", params=params)
            assert answer.status_code == 422
            assert [error["field"] for error in answer.json()["errors"]] == [field]


async def test_each_tenant_sees_its_chain_and_the_operator_the_systems_and_all(
    aggregator: Platform, tenant: str
) -> None:
    other = str(uuid4())
    await publish(aggregator, act(tenant, 1), act(other, 2), act(None, 3, action="tenant.suspend"))
    await chained(aggregator, tenant, 1)
    await chained(aggregator, other, 1)
    async with aggregator.client("log_aggregator", tenant) as client:
        items = (await client.get("/api/v1/audit")).json()["items"]
        assert [item["object_id"] for item in items] == ["1"]
        for path in ("/api/v1/audit", "/api/v1/audit/verify"):
            assert (await client.get(path, params={"tenant_id": other})).status_code == 403
    async with aggregator.client("log_aggregator", tenant, scopes=("run",)) as client:
        assert (await client.get("/api/v1/audit")).status_code == 403
    async with aggregator.client("log_aggregator") as operator:

        async def system() -> bool:
            return bool((await operator.get("/api/v1/audit", params={"action": "tenant.suspend"})).json()["items"])

        await aggregator.until(system)
        assert (await verified(operator))["ok"]
        assert (await verified(operator, tenant_id=other))["records"] == 1


async def test_a_tenant_verifies_its_chain_once_at_a_time(aggregator: Platform, tenant: str) -> None:
    administrator = await connect(aggregator.database_url)
    async with aggregator.client("log_aggregator", tenant) as client, aggregator.client("log_aggregator") as operator:
        async with administrator.transaction():
            # No verification ends meanwhile.
            await administrator.execute("LOCK TABLE log_aggregator.audit_head")
            calls = {asyncio.create_task(client.get("/api/v1/audit/verify")) for _ in range(3)}
            calls.add(asyncio.create_task(operator.get("/api/v1/audit/verify", params={"tenant_id": tenant})))
            ended = asyncio.as_completed(calls)
            refused = [await next(ended), await next(ended)]
        assert [(one.status_code, one.headers["retry-after"]) for one in refused] == [(429, "5")] * 2
        assert sorted(one.status_code for one in await asyncio.gather(*calls)) == [200, 200, 429, 429]
        assert (await verified(client))["ok"]
    await administrator.close()


async def test_an_empty_chain_is_intact(aggregator: Platform, tenant: str) -> None:
    async with aggregator.client("log_aggregator", tenant) as client:
        verdict = await verified(client)
        assert (verdict["records"], verdict["ok"], verdict["head"]) == (0, True, "00" * 32)
        assert (await verified(client, line=verdict["line"]))["ok"]
        assert (await client.get("/api/v1/audit")).json() == {"items": [], "next": None}


@pytest.mark.parametrize(
    ("change", "broken_at"),
    [
        ("UPDATE audit_record SET record = replace(record, 'done', 'denied') WHERE tenant_id = $1 AND seq = 3", 3),
        ("UPDATE audit_record SET actor = 'somebody else' WHERE tenant_id = $1 AND seq = 2", 2),
        ("DELETE FROM audit_record WHERE tenant_id = $1 AND seq = 4", 4),
        ("DELETE FROM audit_record WHERE tenant_id = $1 AND seq > 3", 4),
        ("DELETE FROM audit_record WHERE tenant_id = $1", 1),
        ("UPDATE audit_record SET record = 'no json' WHERE tenant_id = $1 AND seq = 2", 2),
        ("DELETE FROM audit_head WHERE tenant_id = $1", 1),
        (
            "UPDATE audit_head h SET seq = 2, hash = r.hash FROM audit_record r "
            "WHERE h.tenant_id = $1 AND r.tenant_id = $1 AND r.seq = 2",
            3,
        ),
        ("UPDATE audit_head SET hash = decode(repeat('ab', 32), 'hex') WHERE tenant_id = $1", 5),
    ],
)
async def test_a_change_of_the_chain_is_detected_with_its_position(
    aggregator: Platform, tenant: str, change: str, broken_at: int
) -> None:
    await publish(aggregator, *(act(tenant, n) for n in range(5)))
    await chained(aggregator, tenant, 5)
    administrator = await connect(aggregator.database_url)
    await administrator.execute(
        change.replace("UPDATE ", "UPDATE log_aggregator.").replace("FROM ", "FROM log_aggregator."), tenant
    )
    await administrator.close()
    async with aggregator.client("log_aggregator", tenant) as client:
        verdict = await verified(client)
    assert (verdict["ok"], verdict["records"], verdict["broken_at"]) == (False, broken_at - 1, broken_at)


async def test_a_chain_that_was_made_new_as_a_whole_is_noticed_by_a_line_that_was_kept(
    aggregator: Platform, tenant: str
) -> None:
    await publish(aggregator, *(act(tenant, n) for n in range(3)))
    kept = (await chained(aggregator, tenant, 3))["line"]
    await publish(aggregator, act(tenant, 3))
    await chained(aggregator, tenant, 4)
    async with aggregator.client("log_aggregator", tenant) as client:
        assert (await verified(client, line=kept))["ok"]
        of_another_key = f"{kept.rpartition(' ')[0]} {'AQEB' * 20}"
        forged = [kept.replace(tenant, str(uuid4())), kept[:-8] + "AAAAAAA=", kept.replace(" 3 ", " 2 "), "", "é"]
        forged.append(kept.replace(" 3 ", f" {'9' * 100} "))
        for wrong in (*forged, of_another_key):
            answer = await client.get("/api/v1/audit/verify", params={"line": wrong})
            assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, "line")
    administrator = await connect(aggregator.database_url)
    records = await administrator.fetch(
        "SELECT seq, record FROM log_aggregator.audit_record WHERE tenant_id = $1 ORDER BY seq", tenant
    )
    previous = bytes(32)
    for seq, record in records:
        changed = record.replace('"n":"1"', '"n":"9"')
        previous = hashlib.sha256(previous + changed.encode()).digest()
        await administrator.execute(
            "UPDATE log_aggregator.audit_record SET record = $3, hash = $4 WHERE tenant_id = $1 AND seq = $2",
            tenant,
            seq,
            changed,
            previous,
        )
    await administrator.execute("UPDATE log_aggregator.audit_head SET hash = $2 WHERE tenant_id = $1", tenant, previous)
    await administrator.close()
    async with aggregator.client("log_aggregator", tenant) as client:
        assert (await verified(client))["ok"], "the records fit each other"
        verdict = await verified(client, line=kept)
    assert (verdict["ok"], verdict["broken_at"], verdict["line"]) == (False, 3, "")


async def test_a_line_stays_valid_when_the_master_key_is_rotated(aggregator: Platform, tenant: str) -> None:
    await publish(aggregator, act(tenant, 1))
    kept = (await chained(aggregator, tenant, 1))["line"]
    database = aggregator.database("log_aggregator")
    old, new = MASTER_KEY, base64.b64encode(os.urandom(KEY_BYTES)).decode()
    try:
        await rewrap(database.engine, Cipher(f"{new} {old}"), SEALED, lambda rows: None)
        assert (await AuditLines(database, Cipher(new)).read(tenant, kept)).seq == 1
        with pytest.raises(RuntimeError, match="another master key"):
            await AuditLines(database, Cipher(old)).read(tenant, kept)
    finally:
        await rewrap(database.engine, Cipher(f"{old} {new}"), SEALED, lambda rows: None)


async def test_the_service_itself_cannot_change_a_record(aggregator: Platform, tenant: str) -> None:
    await publish(aggregator, act(tenant, 1))
    await chained(aggregator, tenant, 1)
    for change in ("UPDATE audit_record SET actor = 'x'", "DELETE FROM audit_record", "TRUNCATE audit_record"):
        with pytest.raises(Exception, match="permission denied"):
            async with aggregator.database("log_aggregator").begin() as tx:
                await tx.sql(change)


async def test_an_act_that_cannot_be_stored_does_not_block_other_acts(aggregator: Platform, tenant: str) -> None:
    await publish(aggregator, act(tenant, 1), act(tenant, 2, object_id="a\x00b"), act(tenant, 3))
    assert (await chained(aggregator, tenant, 2))["ok"]

    async def set_aside() -> list[Any]:
        async with aggregator.database("log_aggregator").begin() as tx:
            return list(await tx.sql("SELECT consumer FROM dead_letter WHERE tenant_id = $1", tenant))

    assert await aggregator.until(set_aside) == [("log_aggregator",)]
