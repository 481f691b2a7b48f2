"""A batch in the inbox."""

from __future__ import annotations

import asyncio

import pytest

from infra.clock import uuid7
from infra.errors import Transient
from infra.postgres.db import sql
from infra.postgres.inbox import mark_batch, mark_handled
from infra.postgres.tx import Database
from tests.infra.bus.conftest import until


async def test_a_batch_is_told_what_was_handled_already(desk: Database) -> None:
    one, two, three = uuid7(), uuid7(), uuid7()
    async with desk.begin() as tx:
        assert await mark_handled(await tx.connection(), "reader", [two]) == {two}
        assert await mark_handled(await tx.connection(), "somebody else", [three]) == {three}
    async with desk.begin() as tx:
        assert await mark_batch(await tx.connection(), "reader", [three, one, two]) == {two}
    async with desk.begin() as tx:
        assert await mark_batch(await tx.connection(), "reader", [one, two, three]) == {one, two, three}


@pytest.mark.parametrize("committed", [True, False])
async def test_a_batch_waits_for_who_handles_one_of_its_messages_now(desk: Database, committed: bool) -> None:
    one, two = uuid7(), uuid7()

    async def batch() -> set[object]:
        async with desk.begin() as tx:
            return set(await mark_batch(await tx.connection(), "reader", [one, two]))

    async def waits() -> bool:
        async with desk.engine.connect() as connection:
            return bool(
                await sql(connection, "SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'")
            )

    first = await desk.engine.connect()
    await mark_handled(first, "reader", [two])
    second = asyncio.create_task(batch())
    await until(waits)
    await (first.commit() if committed else first.rollback())
    await first.close()
    if committed:
        with pytest.raises(Transient, match="reader: another transaction"):
            await second
        # Tried again it goes through, and nothing of the first attempt was kept.
        assert await batch() == {two}
    else:
        assert await second == set()
