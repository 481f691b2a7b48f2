"""The places of a lane runner: which of them a transaction may keep for a lane that it claims."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from infra.lanes.claims import Claimed, Lease
from infra.lanes.runner import LaneRunner, _Kind
from infra.observe.metrics import Metrics
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from tests.infra.lanes.lane_fixture import Notes, new_lane


@pytest.fixture
def runner() -> LaneRunner:
    """With three places, two for one tenant. It never connects, and believes that no older lane waits."""
    engine = create_engine("postgresql://user@localhost/database")
    work = new_lane().runner(concurrency=3, per_tenant=2)(Notes().note)
    made = LaneRunner(Database(engine, "desk"), [work], engine, Metrics(CollectorRegistry()), lease_seconds=3)
    kind_of(made).behind = False
    return made


def kind_of(runner: LaneRunner) -> _Kind:
    [kind] = runner._kinds.values()
    return kind


def reserve(runner: LaneRunner, tenant_id: str) -> bool:
    return runner.reserve(kind_of(runner).name, tenant_id)


def test_each_reserved_place_counts_until_it_is_given_up(runner: LaneRunner) -> None:
    assert [reserve(runner, tenant_id) for tenant_id in "abcd"] == [True, True, True, False]
    runner.give_up(kind_of(runner).name, "b")
    assert [reserve(runner, tenant_id) for tenant_id in "ef"] == [True, False]


def test_a_tenant_reserves_no_more_than_its_share(runner: LaneRunner) -> None:
    assert [reserve(runner, "a") for _ in range(3)] == [True, True, False]
    assert reserve(runner, "b")


def test_lanes_that_run_count(runner: LaneRunner) -> None:
    kind = kind_of(runner)
    for number, tenant_id in enumerate("aab"):
        assert runner.reserve(kind.name, tenant_id)
        runner.give_up(kind.name, tenant_id)
        kind.running[Lease(kind.name, tenant_id, "lane", number, 1, 0.0)] = None  # type: ignore[assignment]
        if number == 1:
            assert not reserve(runner, "a")
    assert not reserve(runner, "c")


def test_nothing_is_reserved_while_older_lanes_wait_and_a_place_that_gets_free_is_theirs(runner: LaneRunner) -> None:
    kind = kind_of(runner)
    assert reserve(runner, "a")
    kind.behind = True
    assert not reserve(runner, "b")
    assert not runner._woken
    runner.give_up(kind.name, "a")
    assert runner._woken == {kind.name}


async def test_nothing_is_reserved_by_a_runner_that_stops(runner: LaneRunner) -> None:
    await runner.stop()
    assert not reserve(runner, "a")


def test_nothing_is_reserved_while_an_item_that_may_end_the_process_is_alone(runner: LaneRunner) -> None:
    runner._suspect = Lease(kind_of(runner).name, "a", "lane", 1, 1, 0.0)
    runner._alone_until = time.monotonic() + 60
    assert not reserve(runner, "b")
    runner._alone_until = 0.0
    assert reserve(runner, "b")


async def test_a_search_for_lanes_and_transactions_do_not_take_the_same_places(
    runner: LaneRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[tuple[int, Mapping[str, int], bool]] = []

    async def claim(kind: str, start: str, wanted: int, per_tenant: int, taken: Mapping[str, int], **_: Any) -> Claimed:
        searched.append((wanted, dict(taken), reserve(runner, "b")))
        return Claimed([], 0, None, False, 0)

    monkeypatch.setattr(runner._claims, "claim", claim)
    assert reserve(runner, "a")
    await runner._fill(kind_of(runner))
    # The place of the transaction was not searched for, counted for its tenant, and none was left meanwhile.
    assert searched == [(2, {"a": 1}, False)]
    assert reserve(runner, "b")
