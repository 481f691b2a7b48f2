"""Leases: shared evenly, taken over when they run out, fenced by their epoch."""

from __future__ import annotations

import pytest

from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.leases import Leases

KIND = "test"
COUNT = 16


@pytest.fixture(autouse=True)
async def no_leases(desk: Database) -> None:
    async with desk.begin() as tx:
        await tx.sql("DELETE FROM lease")
        await tx.sql("DELETE FROM lease_member")


def member(desk: Database) -> Leases:
    return Leases(desk.engine, KIND, COUNT)


async def refresh(*members: Leases) -> None:
    for one in members:
        one.due = 0.0
        await one.refresh()


async def run_out(desk: Database, one: Leases) -> None:
    """Time passes, and `one` was not heard of in it."""
    async with desk.begin() as tx:
        past = "clock_timestamp() - interval '1 hour'"
        await tx.sql(f"UPDATE lease SET expires_at = {past} WHERE owner = $1", one.owner)
        await tx.sql(f"UPDATE lease_member SET seen_at = {past} WHERE owner = $1", one.owner)


async def test_one_alone_holds_all_and_a_second_is_handed_its_half_at_once(desk: Database) -> None:
    first, second = member(desk), member(desk)
    await refresh(first)
    assert first.held == dict.fromkeys(range(COUNT), 1)
    await refresh(second)
    assert second.held == {}  # until the first one gives back, nothing is free
    await refresh(first, second)
    assert len(first.held) == len(second.held) == COUNT // 2
    assert first.held.keys() | second.held.keys() == set(range(COUNT))
    assert set(second.held.values()) == {2}


async def test_three_share_all_and_nobody_has_more_than_a_third(desk: Database) -> None:
    members = [member(desk) for _ in range(3)]
    for _ in range(3):
        await refresh(*members)
    held = [number for one in members for number in one.held]
    assert sorted(held) == list(range(COUNT))
    assert max(len(one.held) for one in members) == 6


async def test_what_is_held_stays_where_it_is(desk: Database) -> None:
    first, second = member(desk), member(desk)
    await refresh(first, second, first, second)
    before = first.held, second.held
    await refresh(first, second, first, second)
    assert (first.held, second.held) == before


async def test_leases_that_ran_out_are_taken_over_under_a_higher_epoch(desk: Database) -> None:
    dead, heir = member(desk), member(desk)
    await refresh(dead)
    await run_out(desk, dead)
    await refresh(heir)
    assert heir.held == dict.fromkeys(range(COUNT), 2)
    # It was only asleep: it has lost its leases, and starts again with its share.
    await refresh(dead, heir, dead)
    assert set(dead.held.values()) == {3}
    assert dead.held.keys().isdisjoint(heir.held)


async def test_the_leases_of_a_process_that_died_are_taken_over_at_once(desk: Database) -> None:
    pool = create_engine(desk.engine.url.render_as_string(hide_password=False))
    dead, other, heir = Leases(pool, KIND, COUNT), member(desk), member(desk)
    await refresh(dead, other, dead, other)
    assert len(dead.held) == len(other.held) == COUNT // 2
    await pool.dispose()  # its connections end, as with the process
    await refresh(heir)
    assert heir.held == {number: epoch + 1 for number, epoch in dead.held.items()}
    assert await desk.autocommit("SELECT FROM lease WHERE owner = $1", other.owner) == [()] * (COUNT // 2)


async def test_its_own_are_renewed_under_the_same_epoch_though_they_ran_out(desk: Database) -> None:
    one = member(desk)
    await refresh(one)
    await run_out(desk, one)
    await refresh(one)
    assert one.held == dict.fromkeys(range(COUNT), 1)


async def test_between_two_renewals_nothing_is_asked(desk: Database) -> None:
    one = member(desk)
    await one.refresh()
    await run_out(desk, one)
    await refresh(member(desk))
    await one.refresh()
    assert len(one.held) == COUNT


async def test_what_is_released_is_free_at_once(desk: Database) -> None:
    first, second = member(desk), member(desk)
    await refresh(first)
    await first.release()
    assert first.held == {}
    await refresh(second)
    assert second.held == dict.fromkeys(range(COUNT), 2)


async def test_other_kinds_are_left_alone(desk: Database) -> None:
    one, other = member(desk), Leases(desk.engine, KIND + "er", COUNT)
    await refresh(one)
    await refresh(other)
    await one.release()
    await refresh(other)
    assert other.held == dict.fromkeys(range(COUNT), 1)
