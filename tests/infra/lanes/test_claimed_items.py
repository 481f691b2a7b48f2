"""Lanes that a transaction claims together with the insert of their first item, for the runner of its process."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest

from infra.errors import Transient
from infra.lanes.claims import Claims
from infra.lanes.lane import Lane
from infra.postgres.database import Database
from protos.messages.sample import NoteTaken
from tests.infra.conftest import SampleDatabase
from tests.infra.lanes.lane_fixture import TENANT, Notes, Parcel, World, all_over, items, log_lines, new_lane, put
from tooling.testing.sample.catalog import SAMPLE_EVENTS
from tooling.testing.until import until


@pytest.fixture
def world(sample: SampleDatabase) -> Iterator[World]:
    with log_lines():
        yield World(sample)


@pytest.fixture
def notes() -> Notes:
    return Notes()


async def ready(database: Database, kind: Lane[Parcel]) -> None:
    """Waits until the runner has found that no older lane waits."""

    async def has_place() -> bool:
        places = database._places
        assert places
        if places.reserve(kind.name, TENANT):
            places.give_up(kind.name, TENANT)
            return True
        return False

    await until(has_place)


async def owned(database: Database, kind: Lane[Parcel]) -> list[tuple[str, bool, int]]:
    rows = await items(database, kind, "DISTINCT lane", "owner IS NOT NULL", "epoch", "seq")
    return [(lane, is_owned, epoch) for lane, is_owned, epoch, _ in rows]


def refuse_claims(monkeypatch: pytest.MonkeyPatch) -> None:
    async def refused(*_: object, **__: object) -> None:
        raise Transient("the test allows no search for lanes")

    monkeypatch.setattr(Claims, "claim", refused)


async def test_the_item_of_an_idle_lane_is_handled_without_a_search_for_lanes(
    world: World, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=2)(notes.note)) as database:
        await ready(database, kind)
        refuse_claims(monkeypatch)
        for number in range(3):
            await put(database, kind, "a", number)
            await all_over(database, kind)
        assert notes.numbers == [0, 1, 2]
        assert {attempts for (attempts,) in await items(database, kind, "attempts")} == {1}


async def test_a_rolled_back_claim_leaves_the_lane_and_the_place_free(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await ready(database, kind)
        with pytest.raises(RuntimeError, match="no"):
            async with database.begin(tenant_id=TENANT) as tx:
                tx.enqueue(kind, lane="a", item=Parcel(1))
                await tx.flush()
                raise RuntimeError("no")
        await ready(database, kind)
        await put(database, kind, "a", 2)
        await all_over(database, kind)
    assert notes.numbers == [2]


async def test_a_process_without_a_place_claims_nothing_and_older_lanes_come_first(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=1)(notes.hold)) as database:
        await ready(database, kind)
        hint = SAMPLE_EVENTS, NoteTaken(notebook=kind.name, number=1, text="a lane is ready")
        await put(database, kind, "a", 1, hint=hint)
        await notes.begun.wait()
        for lane, number in (("b", 2), ("c", 3)):
            await put(database, kind, lane, number, hint=hint)
        assert [is_owned for _, is_owned, _ in await owned(database, kind)] == [True, False, False]
        async with database.begin() as tx:
            hints = await tx.sql(
                "SELECT key FROM outbox WHERE convert_from(body, 'UTF8')::json ->> 'notebook' = $1 ORDER BY position",
                kind.name,
            )
        # Other processes need not look for the lane that this one has claimed.
        assert hints == [("b",), ("c",)]
        notes.go_on.set()
        await all_over(database, kind)
    assert notes.numbers == [1, 2, 3]


async def test_a_tenant_claims_no_more_than_its_share_of_the_places(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=3, per_tenant=1)(notes.hold)) as database:
        await ready(database, kind)
        await put(database, kind, "a", 1)
        await put(database, kind, "b", 2)
        await put(database, kind, "c", 3, tenant_id="other")
        await notes.has(2)
        assert sorted(notes.numbers) == [1, 3]
        notes.go_on.set()
        await all_over(database, kind)


async def test_a_lane_with_older_items_or_an_item_that_is_not_due_is_not_claimed(
    world: World, notes: Notes, desk: Database
) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=4)(notes.hold)) as database:
        await ready(database, kind)
        await put(database, kind, "later", 1, after=timedelta(hours=1))
        await put(database, kind, "expired", 2, expires_in=timedelta(seconds=-1))
        await put(database, kind, "mine", 3)
        await notes.begun.wait()
        await put(database, kind, "mine", 4)
        lanes = {lane: epoch for lane, _, epoch in await owned(database, kind)}
        assert (lanes["later"], lanes["mine"]) == (0, 1)
        notes.go_on.set()
        await notes.has(2)
    assert notes.numbers == [3, 4]


async def test_an_item_that_is_not_due_takes_no_place_from_one_that_is(
    world: World, notes: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=1)(notes.note)) as database:
        await ready(database, kind)
        refuse_claims(monkeypatch)
        async with database.begin(tenant_id=TENANT) as tx:
            tx.enqueue(kind, lane="later", item=Parcel(1), after=timedelta(hours=1))
            tx.enqueue(kind, lane="now", item=Parcel(2))
        await notes.has(1)
    assert notes.numbers == [2]


async def test_many_items_of_one_transaction_are_handled_each_once(world: World, notes: Notes) -> None:
    kind = new_lane()
    async with world.process(kind.runner(concurrency=3)(notes.note)) as database:
        await ready(database, kind)
        async with database.begin(tenant_id=TENANT) as tx:
            for number in range(12):
                tx.enqueue(kind, lane=f"lane {number % 6}", item=Parcel(number))
        await all_over(database, kind)
    assert sorted(notes.numbers) == list(range(12))
    first, second = ([notes.numbers.index(number) for number in part] for part in (range(6), range(6, 12)))
    assert all(before < after for before, after in zip(first, second, strict=True))
