"""Soak and burst: real services; a lost message is an error, and a table that grows is named."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tooling.bench import burst, soak
from tooling.bench.consume import TOPICS
from tooling.bench.fixture import bench_fixture
from tooling.bench.overhead import SERVICES, Overhead, running
from tooling.bench.soak import Soak
from tooling.testing.stack import Stack
from tooling.testing.vendors import WebhookStandIn


@pytest.fixture(scope="module")
async def bench(stack: Stack) -> AsyncIterator[Overhead]:
    async with bench_fixture(stack, TOPICS) as place, running(place, WebhookStandIn()) as found:
        yield found


async def test_all_accepted_messages_of_a_burst_are_answered(bench: Overhead, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(burst, "ROUND", 20)
    drain, grown = await burst.measure(bench, lambda *_: None, 0.5)
    assert drain.made_of["refused"] == 0
    assert drain.made_of["accepted"] == round(drain.made_of["offered per s"] * 0.5)
    assert drain.value == pytest.approx(
        drain.made_of["seconds"] * drain.made_of["capacity per s"] / drain.made_of["accepted"]
    )
    assert grown.made_of["before"] > 50


async def test_a_table_that_grows_is_named(bench: Overhead, monkeypatch: pytest.MonkeyPatch) -> None:
    same = Soak(bench.fixture, bench.platform, bench.models, bench.vendor, services=SERVICES, path=bench.path)
    same.sent = bench.sent
    monkeypatch.setattr(soak, "HISTORIES", soak.HISTORIES - {"agent.run"})
    services, engines, other, rows, database, wal = await soak.measure(same, lambda *_: None, 2, 1.0)
    assert services.made_of["agent MiB"] > 20
    assert engines.made_of["postgres MiB"] > 20
    assert other.made_of["agent.run"] == 1
    assert rows.made_of["agent.run"] == 1
    assert (database.measure, wal.measure) == ("database of a message", "WAL of a message")
    assert wal.value > 10
    bench.sent = same.sent
