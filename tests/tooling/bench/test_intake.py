"""Intake: the real agent without its lanes takes each message in once."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tooling.bench.fixture import bench_fixture
from tooling.bench.intake import Intake, running
from tooling.testing.stack import Stack


@pytest.fixture(scope="module")
async def bench(stack: Stack) -> AsyncIterator[Intake]:
    async with bench_fixture(stack, []) as place, running(place) as found:
        yield found


async def test_each_message_has_one_run_and_no_run_is_executed(bench: Intake) -> None:
    before = bench.published
    both, agent, postgres = await bench.measure(lambda *_: None, 2, messages=60)
    assert bench.published == before + 180
    assert await bench.fixture.admin.fetchval("SELECT count(*) FROM agent.run WHERE status = 'queued'") == before + 180
    assert both.goal is not None
    assert both.value > 0
    assert agent.value > 0
    assert postgres.value >= 0
    assert both.made_of["messages per CPU second"] == pytest.approx(1000 / both.value)


async def test_a_message_without_a_run_is_an_error(bench: Intake) -> None:
    bench.published -= 1
    with pytest.raises(ValueError, match="the counts of one slice differ"):
        await bench.slice(20)
    bench.published += 1
