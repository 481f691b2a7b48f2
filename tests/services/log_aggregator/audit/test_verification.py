"""Each audit chain is verified once a day, against itself and against its stored heads. No service runs here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import nullcontext
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from asyncpg import connect
from prometheus_client import CollectorRegistry

from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import migrate, prepare_database, role_url
from infra.security.crypto import Cipher
from infra.stores.objects import Objects
from services.log_aggregator.audit import chains, domain
from services.log_aggregator.audit.lines import AuditLines
from services.log_aggregator.audit.stored_heads import BUCKET, Keeper, StoredHeads
from services.log_aggregator.audit.verification import Verifier
from tooling.stack.checkout import CHECKOUT
from tooling.testing.platform import MASTER_KEY, PASSWORDS
from tooling.testing.stack import Stack

SERVICE = "log_aggregator"


@pytest.fixture(scope="module")
async def stored(database: str) -> AsyncIterator[Database]:
    await prepare_database(database, {SERVICE: PASSWORDS})
    await migrate(database, SERVICE, CHECKOUT / "services" / SERVICE / "migrations")
    engine = create_engine(role_url(database, SERVICE, "worker", PASSWORDS.worker))
    yield Database(engine, SERVICE)
    await engine.dispose()


@pytest.fixture(scope="module")
def store(stack: Stack) -> dict[str, Any]:
    stack.need("s3")
    return stack.engines["s3"]


@pytest.fixture(scope="module")
def heads(stored: Database, store: dict[str, Any]) -> StoredHeads:
    return stored_heads(stored, store)


def stored_heads(stored: Database, store: dict[str, Any], **changes: str) -> StoredHeads:
    objects = Objects(**(store | changes), bucket=BUCKET)
    return StoredHeads(objects, AuditLines(stored, Cipher(MASTER_KEY)), f"{uuid4()}.")


async def grow(stored: Database, tenant: str, *texts: str) -> None:
    fields = {"at": "2026-01-01T00:00:00+00:00", "action": "agent.create", "object_id": "o"}
    async with stored.begin() as tx:
        await chains.append(tx, {tenant: [domain.canonical(fields | {"actor": text}) for text in texts]})


async def delete(database: str, tenant: str) -> None:
    """As a user with all rights in the database can."""
    administrator = await connect(database)
    for table in ("audit_record", "audit_head"):
        await administrator.execute(f"DELETE FROM {SERVICE}.{table} WHERE tenant_id = $1", tenant)
    await administrator.close()


async def next_day(stored: Database) -> None:
    async with stored.begin() as tx:
        await tx.sql("UPDATE audit_verification SET due_at = clock_timestamp(), verified_at = NULL")


async def found(stored: Database, tenant: str) -> tuple[bool, int | None, int]:
    """Whether the chain was verified, its first broken record, and the hours (rounded) until it is due again."""
    async with stored.begin() as tx:
        [row] = await tx.sql(
            """
            SELECT verified_at IS NOT NULL, broken_at,
                   round(extract(epoch FROM due_at - clock_timestamp()) / 3600)::int
            FROM audit_verification WHERE tenant_id = $1
            """,
            tenant,
        )
    return row[0], row[1], row[2]


def values(metrics: Metrics) -> list[float | None]:
    names = ("claw_audit_chains_broken", "claw_audit_unverified_seconds")
    return [metrics.registry.get_sample_value(name) for name in names]


async def test_each_chain_is_verified_once_a_day_and_a_break_is_reported(
    database: str, stored: Database, heads: StoredHeads
) -> None:
    tenant, other = str(uuid4()), str(uuid4())
    verifier = Verifier(stored, heads, metrics := Metrics(CollectorRegistry()))
    await grow(stored, tenant, "a", "b", "c")
    await grow(stored, other, "a")
    await Keeper(stored, heads).tick()
    await verifier.tick()
    assert await found(stored, tenant) == (True, None, 24)
    assert values(metrics)[0] == 0

    # Deleted as a whole, head and all: only the object store still knows the chain. It is not due before the next day.
    await delete(database, tenant)
    await verifier.tick()
    assert await found(stored, tenant) == (True, None, 24)
    await next_day(stored)
    await verifier.tick()
    assert await found(stored, tenant) == (True, 3, 24)
    assert await found(stored, other) == (True, None, 24)
    assert values(metrics)[0] == 1

    await grow(stored, tenant, "a", "b", "c")
    await next_day(stored)
    await verifier.tick()
    assert await found(stored, tenant) == (True, None, 24)
    assert values(metrics)[0] == 0


async def test_without_the_object_store_a_chain_counts_as_not_verified(stored: Database, store: dict[str, Any]) -> None:
    tenant = str(uuid4())
    away = stored_heads(stored, store, endpoint="http://127.0.0.1:9")
    await next_day(stored)
    await grow(stored, tenant, "a")
    await Verifier(stored, away, metrics := Metrics(CollectorRegistry())).tick()
    assert await found(stored, tenant) == (False, None, 0)
    async with stored.begin() as tx:
        await tx.sql("UPDATE audit_verification SET seen_at = seen_at - interval '3 days' WHERE tenant_id = $1", tenant)
    await Verifier(stored, away, metrics).tick()
    age = values(metrics)[1]
    assert age is not None
    assert age >= 3 * 86_400


async def test_a_chain_that_another_process_verifies_is_left_to_it(stored: Database, heads: StoredHeads) -> None:
    tenant = str(uuid4())
    await grow(stored, tenant, "a")
    verifier = Verifier(stored, heads, Metrics(CollectorRegistry()))
    async with stored.begin() as tx:
        await tx.sql("INSERT INTO audit_verification (tenant_id) VALUES ($1)", tenant)
    async with stored.begin() as tx:
        await tx.sql("SELECT FROM audit_verification WHERE tenant_id = $1 FOR UPDATE", tenant)
        await verifier.tick()
    assert (await found(stored, tenant))[:2] == (False, None)
    await verifier.tick()
    assert await found(stored, tenant) == (True, None, 24)


async def test_a_list_since_a_time_reads_only_the_records_since_then(stored: Database, database: str) -> None:
    tenant = uuid4().hex
    await grow(stored, tenant, *map(str, range(3_000)))
    administrator = await connect(database)
    await administrator.execute("ANALYZE log_aggregator.audit_record")
    await administrator.close()
    read = """
        SELECT coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) FROM pg_stat_xact_user_tables
        WHERE relname = 'audit_record'
    """
    async with stored.begin() as tx:
        same: Any = SimpleNamespace(begin=lambda tenant_id: nullcontext(tx))
        [(before,)] = await tx.sql(read)
        # PostgreSQL may keep a plan for any time after five.
        for _ in range(8):
            assert await chains.listed(same, tenant, {}, datetime(2026, 1, 2, tzinfo=UTC), None, 2) == []
        assert await tx.sql(read) == [(before,)]
        assert len(await chains.listed(same, tenant, {}, datetime(2026, 1, 1, tzinfo=UTC), 2_000, 51)) == 51
        [(after,)] = await tx.sql(read)
        assert after - before < 100
