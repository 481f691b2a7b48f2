"""Tests of group commit: writes at the same time share a transaction, and each has its own outcome."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from uuid import UUID, uuid4

import pytest
from sqlalchemy.exc import OperationalError

from infra.errors import Conflict
from infra.lanes.claims import Claims, LaneLost, Lease
from infra.lanes.group import ForbiddenByGuard, Group
from infra.postgres.db import create_engine
from infra.postgres.tx import Database, Tx
from tests.infra.conftest import SampleDatabase
from tests.infra.lanes.lane_fixture import new_lane, put
from tooling.testing.sample.desk.domain import NoteWritten
from tooling.testing.sample.desk.publishing import NOTEBOOK

FORBIDDEN = uuid4()
GUARD = f"SELECT id, id = '{FORBIDDEN}' FROM unnest($1::uuid[]) AS n(id)"
STATEMENT = "INSERT INTO stream SELECT 'put ' || name, 1 FROM unnest($1::text[]) AS n(name)"


@pytest.fixture
async def claims(sample: SampleDatabase) -> AsyncIterator[Claims]:
    engine = create_engine(sample.url("desk", "worker"), pool_size=1)
    claims = Claims(engine, "sample_desk", lambda kind: None, lease_seconds=60)
    yield claims
    await claims.close()
    await engine.dispose()


@pytest.fixture
async def leases(claims: Claims, desk: Database) -> list[Lease]:
    """Of ten lanes."""
    kind = new_lane()
    for n in range(10):
        await put(desk, kind, f"lane {n}", n)
    return [lease for lease, _ in (await claims.claim(kind.name, "", 10, 10, {})).lanes]


@pytest.fixture
def group(desk: Database) -> Group:
    return Group(desk, GUARD)


def note(group: Group, book: str, *, version: int = 0) -> Tx:
    tx = group.buffered("t")
    tx.append_at(NOTEBOOK.stream(book), [NoteWritten(version + 1, "x")], version)
    tx.buffer(STATEMENT, f"{book} {version}")
    return tx


async def written(desk: Database, *books: str) -> list[tuple[str, int, int]]:
    """Of each book how many events it has, and how many messages about it are to go out."""
    async with desk.begin() as tx:
        return [
            (
                book,
                *(await tx.sql("SELECT count(*) FROM event WHERE stream_id = $1", f"notebook:{book}"))[0],
                *(await tx.sql("SELECT count(*) FROM outbox WHERE key = $1", book))[0],
            )
            for book in books
        ]


async def transactions(desk: Database, *books: str) -> int:
    """In how many transactions the streams were written."""
    async with desk.begin() as tx:
        rows = await tx.sql(
            "SELECT DISTINCT xmin::text FROM event WHERE stream_id = ANY($1::text[])",
            [f"notebook:{book}" for book in books],
        )
    return len(rows)


async def test_what_is_written_at_once_shares_commits(desk: Database, group: Group, leases: list[Lease]) -> None:
    books = [f"{uuid4()}" for _ in leases]
    await asyncio.gather(
        *(group.write(lease, note(group, book), uuid4()) for lease, book in zip(leases, books, strict=True))
    )
    assert await written(desk, *books) == [(book, 1, 1) for book in books]
    # Those that came while the first one was alone on its way went together.
    assert await transactions(desk, *books) <= 2
    async with desk.begin() as tx:
        [(count,)] = await tx.sql(
            "SELECT count(*) FROM stream WHERE stream_id = ANY($1::text[])", [f"put {book} 0" for book in books]
        )
    assert count == len(books)


async def test_what_does_not_go_in_takes_nothing_with_it(desk: Database, group: Group, leases: list[Lease]) -> None:
    books = [f"{uuid4()}" for _ in leases]
    writes = [
        group.write(lease, note(group, book, version=7 if n == 5 else 0), uuid4())
        for n, (lease, book) in enumerate(zip(leases, books, strict=True))
    ]
    results = await asyncio.gather(*writes, return_exceptions=True)
    assert [type(result) for result in results] == [Conflict if n == 5 else type(None) for n in range(10)]
    assert [count for _, count, _ in await written(desk, *books)] == [int(n != 5) for n in range(10)]


async def test_who_has_lost_the_lane_writes_nothing(desk: Database, group: Group, leases: list[Lease]) -> None:
    mine, *_ = leases
    async with desk.begin() as tx:
        await tx.sql("UPDATE lane SET epoch = epoch + 1 WHERE lane_id = $1", mine.lane_id)
    book = f"{uuid4()}"
    with pytest.raises(LaneLost):
        await group.write(mine, note(group, book), uuid4())
    assert await written(desk, book) == [(book, 0, 0)]


async def test_the_guard_forbids_only_what_may_be_forbidden(desk: Database, group: Group, leases: list[Lease]) -> None:
    one, other, third = (f"{uuid4()}" for _ in range(3))
    results = await asyncio.gather(
        group.write(leases[0], note(group, one), FORBIDDEN, may_be_forbidden=True),
        group.write(leases[1], note(group, other), FORBIDDEN),
        group.write(leases[2], note(group, third), uuid4(), may_be_forbidden=True),
        return_exceptions=True,
    )
    assert [type(result) for result in results] == [ForbiddenByGuard, type(None), type(None)]
    assert await written(desk, one, other, third) == [(one, 0, 0), (other, 1, 1), (third, 1, 1)]


async def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    desk: Database, group: Group, leases: list[Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    book = f"{uuid4()}"
    real = group._try
    attempts = 0

    async def cut_off(writes: object) -> object:
        nonlocal attempts
        attempts += 1
        result = await real(writes)  # type: ignore[arg-type]
        if attempts == 1:
            raise OperationalError("COMMIT", None, ConnectionResetError("cut off"))
        return result

    monkeypatch.setattr(group, "_try", cut_off)
    await group.write(leases[0], note(group, book), UUID(int=1))
    assert attempts == 2
    assert await written(desk, book) == [(book, 1, 1)]
