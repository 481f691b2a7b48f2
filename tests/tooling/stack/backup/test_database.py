"""The dump of a database is one snapshot, and is restored whole or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import uuid4

import asyncpg
import msgspec
import pytest

from infra.postgres.schema import known_kernel_steps, migrate, prepare_database
from tests.conftest import fresh_database
from tests.infra.conftest import PASSWORDS, SampleDatabase
from tests.infra.conftest import sample as sample
from tests.tooling.stack.backup.conftest import AT
from tooling.stack.backup import database, take
from tooling.stack.backup.database import Snapshot, check_versions
from tooling.stack.backup.parts import Manifest
from tooling.stack.checkout import CHECKOUT
from tooling.stack.engines.base import EngineError
from tooling.stack.home import SERVICES, Home
from tooling.testing.stack import Stack

EMIT = """
    INSERT INTO sample_desk.outbox (bus, bucket, message_id, destination, routing_key, key, headers, body, keep_until,
        published_at)
    VALUES ('kafka', 0, gen_random_uuid(), $1, '', 'k', '{}', '', now() + interval '1 day', $2)
"""


@pytest.fixture
def empty(stack: Stack) -> Iterator[str]:
    with fresh_database(stack) as url:
        yield url


@pytest.fixture
def full(stack: Stack) -> Iterator[str]:
    with fresh_database(stack) as url:
        yield url


@pytest.fixture
async def live(sample: SampleDatabase) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(sample.admin_url)
    yield connection
    await connection.close()


async def answer(url: str, question: str) -> object:
    connection = await asyncpg.connect(url)
    try:
        return await connection.fetchval(question)
    finally:
        await connection.close()


async def test_a_restored_database_is_the_snapshot_with_all_rights(
    sample: SampleDatabase, live: asyncpg.Connection, empty: str
) -> None:
    await live.execute(EMIT, "before", AT)
    async with database.snapshot(sample.admin_url) as taken:
        await live.execute(EMIT, "after", AT)
        pieces = list(database.dump(sample.admin_url, taken))
    assert taken.server.startswith("18.")
    database.restore(empty, pieces)
    found = "SELECT string_agg(destination, ',') FROM sample_desk.outbox WHERE destination IN ('before', 'after')"
    assert await answer(empty, found) == "before"
    as_worker = empty.replace(empty.partition("//")[2].partition("@")[0], f"sample_desk_worker:{PASSWORDS.worker}")
    assert await answer(as_worker, "SELECT count(*) FROM sample_desk.outbox")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await answer(as_worker, "SELECT count(*) FROM sample_ledger.outbox")
    # The start of the stack finds nothing to make, and can make the tables of newer code.
    await prepare_database(empty, {f"sample_{name}": PASSWORDS for name in ("front", "desk", "ledger")})


async def test_the_tables_of_every_service_can_be_restored(full: str, empty: str) -> None:
    """A function that a generated column or an index calls must not depend on the search path."""
    await prepare_database(full, dict.fromkeys(SERVICES, PASSWORDS))
    for name in SERVICES:
        if (revisions := CHECKOUT / "services" / name / "migrations").exists():
            await migrate(full, name, revisions)
    async with database.snapshot(full) as taken:
        database.restore(empty, database.dump(full, taken))
    assert set(taken.migrations) == {name for name in SERVICES if name != "ws_gateway"}
    assert taken.kernel_steps == known_kernel_steps()
    insert = """
        INSERT INTO memory.passage (id, tenant_id, document_id, n, text) VALUES ($1, 't', $1, 0, 'kept words')
        RETURNING words::text
    """
    connection = await asyncpg.connect(empty)
    await connection.execute("ALTER TABLE memory.passage DISABLE TRIGGER ALL")
    assert "'kept':1" in await connection.fetchval(insert, uuid4())
    await connection.close()


async def test_a_dump_that_ends_early_restores_nothing(sample: SampleDatabase, empty: str) -> None:
    async with database.snapshot(sample.admin_url) as taken:
        whole = b"".join(database.dump(sample.admin_url, taken))
    with pytest.raises(EngineError, match="pg_restore failed"):
        database.restore(empty, [whole[:-1]])

    def broken() -> Iterator[bytes]:
        yield whole
        raise EngineError("the backup was changed")

    with pytest.raises(EngineError, match="was changed"):
        database.restore(empty, broken())
    assert await answer(empty, "SELECT to_regclass('sample_desk.outbox')") is None


def test_a_dump_that_fails_tells_the_reason(sample: SampleDatabase) -> None:
    with pytest.raises(EngineError, match=r"pg_dump failed: .*snapshot"):
        list(database.dump(sample.admin_url, Snapshot("00000000-00000000-1", AT, "18.6", {}, [])))


async def test_kept_messages_are_sent_again_and_old_inboxes_stay(
    sample: SampleDatabase, live: asyncpg.Connection
) -> None:
    """The messages of a backup from last year are sent only now, and their consumers must still know them."""
    await live.execute(EMIT, "sent", AT)
    await live.execute(EMIT, "not sent", None)
    await live.execute("INSERT INTO sample_desk.outbox_held_back VALUES ('kafka', 'sent', '', 1, now(), 'away')")
    handled = f"018bcfe5-6800-7000-8000-{uuid4().hex[:12]}"
    await live.execute(
        """
        CREATE TABLE sample_desk.inbox_202311 (LIKE sample_desk.inbox INCLUDING ALL);
        ALTER TABLE sample_desk.inbox_202311 OWNER TO sample_desk_owner;
        ALTER TABLE sample_desk.inbox ATTACH PARTITION sample_desk.inbox_202311
            FOR VALUES FROM ('018b8838-9c00-0000-0000-000000000000') TO ('018c22ba-9c00-0000-0000-000000000000')
        """
    )
    await live.execute("INSERT INTO sample_desk.inbox VALUES ($1, 'c')", handled)
    assert await database.send_all_again(sample.admin_url) >= 1
    await sample.prepare()
    assert await live.fetchval("SELECT count(*) FROM sample_desk.outbox WHERE published_at IS NOT NULL") == 0
    assert await live.fetchval("SELECT count(*) FROM sample_desk.outbox WHERE destination LIKE '%sent'") == 2
    assert await live.fetchval("SELECT count(*) FROM sample_desk.outbox_held_back") == 0
    assert await live.fetchval("SELECT count(*) FROM sample_desk.inbox WHERE message_id = $1", handled) == 1


async def test_a_stack_has_data_if_it_has_a_tenant(empty: str) -> None:
    assert not await database.has_tenants(empty)
    await answer(empty, 'CREATE SCHEMA "user"')
    await answer(empty, 'CREATE TABLE "user".tenant (tenant_id text)')
    assert not await database.has_tenants(empty)
    await answer(empty, """INSERT INTO "user".tenant VALUES ('acme')""")
    assert await database.has_tenants(empty)


def test_the_database_of_a_stack_with_tls_is_read_by_its_socket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLAW_HOME", str(tmp_path))
    home = Home(tmp_path)
    home.write_credentials(home.place(), {"postgres": {"url": "postgresql://admin@127.0.0.1/clawbus"}, "s3": {}})
    assert take.source().socket is None
    (tmp_path / "tls").mkdir()
    assert take.source().socket == tmp_path / "postgres"


@pytest.fixture
def manifest() -> Manifest:
    values = {"at": AT, "finished_at": AT, "postgres": "18.6", "migrations": {"billing": "0001"}, "parts": []}
    steps = {"format": 1, "code": "0", "kernel_steps": ["0001_kernel.sql"], "engines": {}, "objects": {}, "rebuilt": {}}
    return msgspec.convert({**values, **steps}, Manifest)


def test_tables_of_known_code_are_accepted(manifest: Manifest) -> None:
    check_versions(manifest, "x.backup")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"migrations": {"billing": "0001", "user": "9001"}}, r"user 9001"),
        ({"migrations": {"voice": "0001"}}, r"voice 0001"),
        ({"kernel_steps": ["0001_kernel.sql", "9001_new.sql"]}, r"9001_new\.sql"),
        ({"postgres": "19.1"}, r"PostgreSQL 19"),
    ],
)
def test_tables_of_newer_code_are_refused(manifest: Manifest, change: dict[str, object], named: str) -> None:
    with pytest.raises(EngineError, match=f"{named}.*Nothing was changed"):
        check_versions(msgspec.structs.replace(manifest, **change), "x.backup")
