"""Growth: runs are measured after the event store has the wanted size, with the wanted tenants and processes."""

from __future__ import annotations

import pytest

from tooling.bench import growth
from tooling.bench.fixture import bench_fixture
from tooling.bench.growth import Case
from tooling.testing.stack import Stack


async def test_each_case_has_its_events_tenants_and_processes(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growth, "SESSIONS", 6)
    cases = (Case(100, 1, 1), Case(200, 3, 2))
    async with bench_fixture(stack, []) as place:
        small, large = await growth.measure(place, lambda *_: None, 1, cases)
    assert small.measure == "CPU of a run: 100 events, tenants 1, worker processes 1"
    assert large.measure == "CPU of a run: 200 events, tenants 3, worker processes 2"
    assert small.made_of["events at the begin"] >= 100
    assert large.made_of["events at the begin"] >= 200
    assert small.value > 0
    assert large.value > 0
