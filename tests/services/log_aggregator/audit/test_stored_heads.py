"""A chain that fits itself, but not the heads that were stored before, is reported."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from asyncpg import connect
from minio import Minio

from infra.security.crypto import Cipher
from infra.stores.objects import Objects
from services.log_aggregator.audit import chains, domain
from services.log_aggregator.audit.lines import AuditLines
from services.log_aggregator.audit.stored_heads import BUCKET, Keeper, StoredHeads
from tooling.testing.platform import MASTER_KEY, Platform


def record(text: str) -> str:
    fields = {"at": "2026-01-01T00:00:00+00:00", "actor": text, "action": "agent.create", "object_id": "o"}
    return domain.canonical(fields)


async def grow(aggregator: Platform, tenant: str, *texts: str) -> None:
    async with aggregator.database("log_aggregator").begin() as tx:
        await chains.append(tx, {tenant: [record(text) for text in texts]})


def keeper(aggregator: Platform) -> Keeper:
    """A new one, as after a restart of the service."""
    database = aggregator.database("log_aggregator")
    objects = Objects(**aggregator.stack.engines["s3"], bucket=BUCKET)
    return Keeper(database, StoredHeads(objects, AuditLines(database, Cipher(MASTER_KEY)), aggregator.prefix))


def store(aggregator: Platform) -> Minio:
    s3 = aggregator.stack.engines["s3"]
    return Minio(urlsplit(s3["endpoint"]).netloc, s3["access_key"], s3["secret_key"], secure=False)


def paths(aggregator: Platform, tenant: str) -> list[str]:
    found = store(aggregator).list_objects(BUCKET, f"{aggregator.prefix}{tenant}/", recursive=True)
    return [str(entry.object_name) for entry in found]


async def verified(aggregator: Platform, tenant: str, **params: str) -> dict[str, Any]:
    async with aggregator.client("log_aggregator", tenant) as client:
        answer = await client.get("/api/v1/audit/verify", params=params)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def replace(aggregator: Platform, tenant: str, *texts: str) -> None:
    """Makes the chain new in the database, as a user with all rights there can."""
    administrator = await connect(aggregator.database_url)
    try:
        for table in ("audit_record", "audit_head"):
            await administrator.execute(f"DELETE FROM log_aggregator.{table} WHERE tenant_id = $1", tenant)
    finally:
        await administrator.close()
    if texts:
        await grow(aggregator, tenant, *texts)


async def test_the_head_of_each_chain_that_has_grown_is_stored_once(aggregator: Platform, tenant: str) -> None:
    assert (await verified(aggregator, tenant))["stored"] == {"heads": 0, "newest": 0, "mismatch_at": None}
    loop = keeper(aggregator)
    await grow(aggregator, tenant, "a", "b")
    await loop.tick()
    await loop.tick()
    await keeper(aggregator).tick()
    [first] = paths(aggregator, tenant)
    await grow(aggregator, tenant, "c")
    await loop.tick()
    found = await verified(aggregator, tenant)
    assert (found["ok"], found["stored"]) == (True, {"heads": 2, "newest": 3, "mismatch_at": None})
    # The content is a line which an auditor can use.
    [_, newest] = paths(aggregator, tenant)
    response = store(aggregator).get_object(BUCKET, newest)
    line = response.read().decode()
    response.close()
    response.release_conn()
    assert line == found["line"]
    assert (await verified(aggregator, tenant, line=line))["ok"]
    await keeper(aggregator).tick()
    assert paths(aggregator, tenant) == [first, newest]


@pytest.mark.parametrize(
    ("texts", "mismatch_at"),
    [
        (("a", "b"), 4),
        (("a", "x", "c", "d"), 2),
        (("a", "b", "c", "x", "e"), 4),
        ((), 2),
    ],
)
async def test_a_chain_that_was_cut_back_or_made_new_is_reported_although_it_fits_itself(
    aggregator: Platform, tenant: str, texts: tuple[str, ...], mismatch_at: int
) -> None:
    loop = keeper(aggregator)
    for text in ("ab", "cd"):
        await grow(aggregator, tenant, *text)
        await loop.tick()
    await replace(aggregator, tenant, *texts)
    assert (await chains.verify(aggregator.database("log_aggregator"), tenant)).broken_at is None
    found = await verified(aggregator, tenant)
    assert (found["ok"], found["broken_at"], found["line"]) == (False, mismatch_at, "")
    assert found["stored"]["mismatch_at"] == mismatch_at
    # A head that is stored later does not hide it.
    await grow(aggregator, tenant, "later")
    await keeper(aggregator).tick()
    assert (await verified(aggregator, tenant))["stored"]["mismatch_at"] == mismatch_at


async def test_an_object_that_this_platform_has_not_stored_is_reported(aggregator: Platform, tenant: str) -> None:
    other = str(uuid4())
    for chain in (tenant, other):
        await grow(aggregator, chain, "a", "b")
    await keeper(aggregator).tick()
    [path] = paths(aggregator, tenant)
    name = path.rpartition("/")[2]
    client = Objects(**aggregator.stack.engines["s3"], bucket=BUCKET)
    for wrong, at in ((f"{name[:-4]}AAA=", 2), ("unknown", 1)):
        await client.put_once(f"{aggregator.prefix}{tenant}/{wrong}", b"?")
        found = await verified(aggregator, tenant)
        assert (found["ok"], found["stored"]["mismatch_at"]) == (False, at)
    assert (await verified(aggregator, other))["ok"]


async def test_without_the_object_store_the_chain_is_compared_with_itself(aggregator: Platform, tenant: str) -> None:
    database = aggregator.database("log_aggregator")
    nowhere = Objects("http://127.0.0.1:1", "a", "b", BUCKET)
    stored = StoredHeads(nowhere, AuditLines(database, Cipher(MASTER_KEY)), aggregator.prefix)
    assert await stored.compare(database, tenant) is None
    refused = Objects(**{**aggregator.stack.engines["s3"], "secret_key": "wrong"}, bucket=BUCKET)
    stored = StoredHeads(refused, AuditLines(database, Cipher(MASTER_KEY)), aggregator.prefix)
    assert await stored.compare(database, tenant) is None
