"""A damaged page of PostgreSQL is never read as data, and the operator sees it."""

from __future__ import annotations

import asyncpg
import pytest
from prometheus_client import CollectorRegistry

from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.service.maintenance import Maintenance
from tooling.stack.engines import postgres
from tooling.stack.home import Home
from tooling.testing.stack import Stack

PAGE = 8192


async def test_a_flipped_bit_is_an_error_in_place_of_data_and_a_problem_of_the_stack(
    stack: Stack, database: str, ledger_database: Database
) -> None:
    connection = await asyncpg.connect(database)
    await connection.execute("CREATE EXTENSION pg_buffercache")
    await connection.execute("CREATE TABLE word AS SELECT repeat('word', 100) AS text FROM generate_series(1, 100)")
    await connection.execute("CHECKPOINT")
    path = await connection.fetchval("SELECT pg_relation_filepath('word')")
    with (stack.home / "postgres" / "data" / path).open("r+b") as file:
        file.seek(PAGE + PAGE // 2)
        [byte] = file.read(1)
        file.seek(PAGE + PAGE // 2)
        file.write(bytes([byte ^ 1]))
    await connection.execute("SELECT pg_buffercache_evict_relation('word')")
    with pytest.raises(asyncpg.DataCorruptedError, match="invalid page in block 1"):
        await connection.fetch("SELECT text FROM word")
    problem = await postgres.problem(Home(stack.home).place())
    await connection.close()
    assert problem
    assert "a page that does not fit its checksum" in problem
    metrics = Metrics(CollectorRegistry())
    async with ledger_database.begin() as tx:
        await Maintenance(ledger_database, metrics)._observe(tx)
    assert metrics.registry.get_sample_value("claw_db_damaged_pages") == 1
