"""The resequencer: messages are handled in the order of their positions, and only dead ones are skipped."""

from __future__ import annotations

import json
from datetime import timedelta
from functools import partial
from uuid import uuid4

import pytest

from infra.clock import utcnow
from infra.errors import NotYet
from infra.lanes.lane import Lane
from infra.lanes.resequencer import LOST_AFTER, MissingMessages, Resequencer, next_position
from infra.postgres.database import Database
from infra.postgres.dead_letters import DeadLetter, store_dead_letters
from infra.postgres.tx import Tx

RESEQUENCER = Resequencer(Lane("test gaps", MissingMessages))


class Desk:
    """Takes messages of one key; `handled`: their positions, in order."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.key = f"{uuid4()}"
        self.handled: list[int] = []

    async def take(self, position: int) -> None:
        async with self._database.begin(tenant_id="t") as tx:
            await RESEQUENCER.accept(tx, self.key, position, b"%d" % position, partial(self._handle, tx))

    async def skip(self, position: int, *, after: timedelta = timedelta(0)) -> None:
        gap = MissingMessages(self.key, position, utcnow() - after)
        async with self._database.begin(tenant_id="t") as tx:
            await RESEQUENCER.skip_gap(tx, gap, partial(self._handle, tx))

    async def die(self, *positions: int, state: str = "failed", tenant_id: str = "t") -> None:
        """The messages become dead letters, as a queue's worker stores them."""
        letters = [
            DeadLetter(
                destination="queue",
                place="",
                message_id=f"{uuid4()}",
                key=self.key,
                tenant_id=tenant_id,
                attempts=5,
                error="",
                headers=json.dumps({"ce_subject": self.key, "ce_sequence": str(position)}),
                payload=b"",
                state=state,
            )
            for position in positions
        ]
        async with self._database.begin() as tx:
            await store_dead_letters(await tx.connection(), "queue", "rabbit", letters, None)

    async def gaps(self) -> list[int]:
        """The positions that a check of missing messages is scheduled for."""
        async with self._database.begin() as tx:
            rows = await tx.sql(
                "SELECT (convert_from(body, 'UTF8')::json ->> 'position')::int FROM lane_item "
                "WHERE kind = 'test gaps' AND convert_from(body, 'UTF8')::json ->> 'key' = $1 "
                "AND not_before > now() + interval '5 seconds' ORDER BY seq",
                self.key,
            )
        return [position for (position,) in rows]

    async def _handle(self, tx: Tx, parcel: bytes) -> None:
        self.handled.append(int(parcel))
        await tx.sql("SELECT 1")


@pytest.fixture
def messages(desk: Database) -> Desk:
    return Desk(desk)


async def test_what_comes_too_early_waits_for_what_is_before_it(messages: Desk) -> None:
    for position in (3, 1, 4, 2, 5):
        await messages.take(position)
    assert messages.handled == [1, 2, 3, 4, 5]
    assert await messages.gaps() == [3, 4]


async def test_keys_do_not_wait_for_each_other(desk: Database, messages: Desk) -> None:
    await messages.take(2)
    other = Desk(desk)
    await other.take(1)
    assert (messages.handled, other.handled) == ([], [1])


async def test_what_has_no_position_waits_for_nobody(messages: Desk) -> None:
    for position in (0, 2, 0):
        await messages.take(position)
    assert messages.handled == [0, 0]


async def test_dead_messages_are_skipped_and_handled_all_the_same_if_they_come_later(messages: Desk) -> None:
    for position in (1, 4, 5, 7):
        await messages.take(position)
    await messages.die(2, 3)
    await messages.skip(4)
    assert messages.handled == [1, 4, 5]
    # Asked again, nothing more happens.
    await messages.skip(5)
    assert messages.handled == [1, 4, 5]
    await messages.take(2)
    await messages.take(6)
    assert messages.handled == [1, 4, 5, 2, 6, 7]


async def test_a_message_that_is_not_known_to_be_dead_is_waited_for_however_long_it_takes(messages: Desk) -> None:
    for position in (1, 4):
        await messages.take(position)
    await messages.die(2)
    await messages.die(3, state="redriving")  # it is on its way again
    await messages.die(3, tenant_id="another tenant")
    for after in (timedelta(minutes=10), LOST_AFTER / 2):
        with pytest.raises(NotYet):
            await messages.skip(4, after=after)
    assert messages.handled == [1]
    await messages.take(3)
    await messages.skip(4)
    assert messages.handled == [1, 3, 4]


async def test_a_message_that_its_sender_no_longer_keeps_is_not_waited_for(messages: Desk) -> None:
    await messages.take(2)
    await messages.skip(2, after=LOST_AFTER * 2)
    assert messages.handled == [2]


async def test_a_message_that_came_behind_the_message_of_a_gap_and_is_before_it_is_not_skipped(messages: Desk) -> None:
    for position in (5, 3, 2, 7):
        await messages.take(position)
    await messages.die(1, 4, 6)
    await messages.skip(5)
    assert messages.handled == [2, 3, 5]
    # The others of them have nothing left to do.
    for position in (3, 2):
        await messages.skip(position)
    await messages.skip(7)
    assert messages.handled == [2, 3, 5, 7]


async def test_positions_are_counted_per_key_and_none_is_given_and_not_used(desk: Database) -> None:
    key, other = f"{uuid4()}", f"{uuid4()}"

    async def give(key: str, *, fail: bool = False) -> int:
        async with desk.begin(tenant_id="t") as tx:
            position = await next_position(tx, "sent", key)
            if fail:
                raise ZeroDivisionError
        return position

    assert [await give(key), await give(key), await give(other)] == [1, 2, 1]
    with pytest.raises(ZeroDivisionError):
        await give(key, fail=True)
    assert await give(key) == 3
