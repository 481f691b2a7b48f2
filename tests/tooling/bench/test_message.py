"""CPU of a message: real services between a fake vendor and a fake model, and the share of each process."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tooling.bench import message, overhead
from tooling.bench.consume import TOPICS
from tooling.bench.fixture import bench_fixture
from tooling.bench.overhead import Overhead, running
from tooling.bench.protocol import run_pairs
from tooling.testing.stack import Stack


@pytest.fixture(scope="module")
async def bench(stack: Stack) -> AsyncIterator[Overhead]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (message, overhead):
            patch.setattr(module, "WARM", 2)
            patch.setattr(module, "BURST", 20)
        async with bench_fixture(stack, TOPICS) as place, running(place) as found:
            yield found


async def test_the_cpu_of_a_message_is_the_sum_of_its_services(bench: Overhead) -> None:
    shown: list[tuple[int, int]] = []
    full, engines, half, _ = await message.measure(bench, lambda *at: shown.append(at), 1)
    assert (full.unit, full.goal, full.low, full.high) == ("ms", 30, full.value, full.value)
    assert full.value == pytest.approx(sum(full.made_of[name] for name in ("channel", "agent", "billing")))
    assert engines.value == pytest.approx(
        sum(full.made_of[name] for name in bench.fixture.stack.pids() if name in full.made_of)
    )
    assert full.made_of["postgres"] > 0
    assert full.made_of["per_s"] > 0
    assert (engines.goal, engines.met) == (None, True)
    assert half.value > 0
    assert shown == [(1, 1)]


async def test_tracing_on_is_paired_with_tracing_off(bench: Overhead, stack: Stack) -> None:
    async with bench_fixture(stack, TOPICS) as place, running(place, traced=False) as untraced:
        ours, anchor = message.telemetry(bench, untraced)
        [result] = await run_pairs("message-telemetry", ours, [anchor], lambda *_: None, pairs=1)
    assert (result.anchor, result.goal) == ("CPU of a message, tracing off", 0.97)
    assert result.our_rate > 0
    assert result.anchor_rate > 0
