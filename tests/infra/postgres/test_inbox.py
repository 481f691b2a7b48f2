"""Messages in the inbox."""

from __future__ import annotations

from infra.clock import uuid7
from infra.postgres.database import Database
from infra.postgres.inbox import mark_handled


async def test_each_consumer_is_told_which_messages_it_has_not_handled(desk: Database) -> None:
    one, two, three = uuid7(), uuid7(), uuid7()
    async with desk.begin() as tx:
        assert await mark_handled(await tx.connection(), "reader", [two]) == {two}
        assert await mark_handled(await tx.connection(), "somebody else", [three]) == {three}
    async with desk.begin() as tx:
        assert await mark_handled(await tx.connection(), "reader", [three, one, two]) == {one, three}
    async with desk.begin() as tx:
        assert await mark_handled(await tx.connection(), "reader", [one, two, three]) == set()
