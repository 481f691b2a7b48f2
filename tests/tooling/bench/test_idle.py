"""Idle: the share of a core that services and engines use without traffic."""

from __future__ import annotations

import pytest

from tooling.bench import idle
from tooling.bench.fixture import bench_fixture
from tooling.testing.stack import Stack


async def test_the_share_of_each_process_is_recorded(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(idle, "WINDOW_SECONDS", 1.0)
    async with bench_fixture(stack, []) as place:
        services, everything = await idle.measure(place, lambda *_: None, ("billing",), 2)
    assert (services.measure, services.unit, services.goal) == ("1 services", "cores", 0.1)
    assert services.made_of.keys() >= {"billing", "postgres", "kafka", "rabbitmq", "valkey"}
    assert 0 < services.value <= everything.value
    assert everything.goal == 0.25
