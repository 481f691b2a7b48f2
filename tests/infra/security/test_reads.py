"""A read of personal content is recorded once for each reader, object and hour."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest

from infra.observe import telemetry
from infra.postgres.database import Database
from infra.security import reads
from infra.security.auth import Identity

NOON = datetime(2026, 1, 1, 12, 59, 59, tzinfo=UTC)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    """Its last time is the present."""
    times = [NOON]
    monkeypatch.setattr(reads, "utcnow", lambda: times[-1])
    return times


async def record(database: Database, reader: str, *ids: str, tenant: str = "t1") -> None:
    async with database.begin(tenant_id=tenant) as tx:
        await reads.record_reads(tx, Identity(reader, tenant, frozenset()), "session", ids, via="test")


async def acts(database: Database, *ids: str) -> list[tuple[str, str, str]]:
    async with database.begin() as tx:
        rows = await tx.sql("SELECT body FROM outbox WHERE destination = 'audit.logs' ORDER BY position")
    found = [json.loads(body) for (body,) in rows]
    return [(act["actor"], act["action"], act["object_id"]) for act in found if act["object_id"] in ids]


async def test_the_first_read_of_an_hour_is_recorded_for_each_reader_and_object(
    desk: Database, clock: list[datetime]
) -> None:
    a, b = sorted((uuid4().hex, uuid4().hex))
    await record(desk, "r1", b, a, b)
    await record(desk, "r1", a)
    await record(desk, "r2", a)
    first = [("r1", "session.read", a), ("r1", "session.read", b), ("r2", "session.read", a)]
    assert await acts(desk, a, b) == first
    clock.append(NOON + timedelta(seconds=1))
    await record(desk, "r1", a)
    assert await acts(desk, a, b) == [*first, ("r1", "session.read", a)]


async def test_many_reads_at_once_make_one_record(desk: Database) -> None:
    ids = [uuid4().hex for _ in range(5)]
    await asyncio.gather(*(record(desk, "r1", *ids) for _ in range(4)))
    assert sorted(await acts(desk, *ids)) == sorted(("r1", "session.read", id_) for id_ in ids)


async def test_a_read_that_is_rolled_back_is_recorded_the_next_time(desk: Database) -> None:
    id_ = uuid4().hex
    with pytest.raises(RuntimeError):
        async with desk.begin(tenant_id="t1") as tx:
            await reads.record_reads(tx, Identity("r1", "t1", frozenset()), "session", [id_])
            await tx.flush()
            raise RuntimeError
    assert await acts(desk, id_) == []
    await record(desk, "r1", id_)
    assert len(await acts(desk, id_)) == 1


async def test_the_record_names_the_trace(desk: Database) -> None:
    id_ = uuid4().hex
    with telemetry.continued(f"00-{'ab' * 16}-{'cd' * 8}-01"):
        await record(desk, "r1", id_)
    async with desk.begin() as tx:
        rows = await tx.sql("SELECT body FROM outbox WHERE position(convert_to($1, 'UTF8') IN body) > 0", id_)
    assert [json.loads(body)["details"] for (body,) in rows] == [{"via": "test", "trace_id": "ab" * 16}]


async def test_rows_of_past_hours_are_pruned(desk: Database, clock: list[datetime]) -> None:
    old, new = uuid4().hex, uuid4().hex
    await record(desk, "r1", old)
    clock.append(datetime.now(UTC))
    await record(desk, "r1", new)
    async with desk.begin() as tx:
        await reads.prune_reads(tx)
    async with desk.begin() as tx:
        rows = await tx.sql("SELECT object_id FROM content_read WHERE object_id = ANY($1::text[])", [old, new])
    assert rows == [(new,)]
