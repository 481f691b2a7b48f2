"""Tests of roles and row-level security: the rights of each role."""

from __future__ import annotations

import pytest
from sqlalchemy.exc import DBAPIError

from infra.postgres.database import Database
from infra.postgres.db import create_engine, sql
from infra.postgres.schema import Passwords, prepare_database, role_url, tenant_policy
from tests.infra.conftest import SampleDatabase

TABLE = "CREATE TABLE IF NOT EXISTS secret (tenant_id text NOT NULL, word text NOT NULL)"


@pytest.fixture(scope="module")
async def secrets(sample: SampleDatabase) -> SampleDatabase:
    engine = create_engine(sample.url("desk", "owner"), pool_size=1)
    async with engine.begin() as connection:
        await sql(connection, TABLE)
        for statement in tenant_policy("sample_desk", "secret"):
            await sql(connection, statement)
    await engine.dispose()
    return sample


@pytest.fixture(scope="module")
async def request_role(secrets: SampleDatabase):  # type: ignore[no-untyped-def]
    engine = create_engine(secrets.url("desk", "request"))
    yield Database(engine, "sample_desk", tenanted=True)
    await engine.dispose()


async def test_the_request_role_sees_its_tenant_only(request_role: Database, desk: Database) -> None:
    for tenant in ("acme", "umbrella"):
        async with request_role.begin(tenant_id=tenant) as tx:
            await tx.sql("INSERT INTO secret VALUES ($1, $2)", tenant, f"word of {tenant}")
    async with request_role.begin(tenant_id="acme") as tx:
        assert await tx.sql("SELECT word FROM secret") == [("word of acme",)]
    async with desk.begin() as tx:
        assert await tx.sql("SELECT count(*) FROM secret") == [(2,)]


async def test_a_row_of_another_tenant_cannot_be_written(request_role: Database) -> None:
    with pytest.raises(DBAPIError, match="row-level security"):
        async with request_role.begin(tenant_id="acme") as tx:
            await tx.sql("INSERT INTO secret VALUES ('umbrella', 'forged')")


async def test_without_a_tenant_there_is_an_error_not_an_empty_answer(request_role: Database) -> None:
    with pytest.raises(ValueError, match="tenant_id"):
        async with request_role.begin() as tx:
            await tx.sql("SELECT word FROM secret")
    async with request_role.engine.connect() as connection:
        with pytest.raises(DBAPIError, match="no tenant is set"):
            await sql(connection, "SELECT word FROM secret")


async def test_a_tenant_does_not_outlive_its_transaction(request_role: Database) -> None:
    async with request_role.begin(tenant_id="acme") as tx:
        await tx.sql("SELECT 1")
    async with request_role.engine.connect() as connection:
        with pytest.raises(DBAPIError, match="no tenant is set"):
            await sql(connection, "SELECT word FROM secret")


@pytest.mark.parametrize("role", ["request", "worker"])
async def test_neither_role_owns_anything(secrets: SampleDatabase, role: str) -> None:
    engine = create_engine(secrets.url("desk", role), pool_size=1)
    async with engine.connect() as connection:
        with pytest.raises(DBAPIError, match=r"must be owner|permission denied"):
            await sql(connection, "ALTER TABLE secret DISABLE ROW LEVEL SECURITY")
        await connection.rollback()
        with pytest.raises(DBAPIError, match="permission denied"):
            await sql(connection, "SELECT * FROM sample_ledger.total")
    await engine.dispose()


async def test_preparing_again_changes_nothing_and_a_bad_name_is_refused_first(sample: SampleDatabase) -> None:
    await sample.prepare()
    with pytest.raises(ValueError, match="'no-such name'"):
        await prepare_database(sample.admin_url, {"no-such name": Passwords("a", "b", "c")})


def test_a_role_url_escapes_its_password() -> None:
    url = role_url("postgresql://admin:x@host:1/db", "billing", "worker", "p@ss/word")
    assert url == "postgresql://billing_worker:p%40ss%2Fword@host:1/db"
