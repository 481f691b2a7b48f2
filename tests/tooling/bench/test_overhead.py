"""Overhead: real services between a fake vendor and a fake model. Counts that do not add up give an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from time import perf_counter

import pytest

from tooling.bench import overhead
from tooling.bench.consume import TOPICS
from tooling.bench.fixture import bench_fixture
from tooling.bench.overhead import Overhead, running
from tooling.testing.model_server import Says
from tooling.testing.stack import Stack


@pytest.fixture(scope="module")
async def bench(stack: Stack) -> AsyncIterator[Overhead]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(overhead, "WARM", 2)
        patch.setattr(overhead, "BURST", 20)
        async with bench_fixture(stack, TOPICS) as place, running(place) as found:
            yield found


async def test_the_time_to_the_reply_is_counted_in_commits(bench: Overhead) -> None:
    shown: list[tuple[int, int]] = []
    result, middle = await bench.measure(lambda *at: shown.append(at), 1)
    assert (result.bench, result.unit, result.goal) == ("overhead", "commits", 150)
    assert (middle.unit, middle.goal) == ("commits", 60)
    assert middle.value == pytest.approx(result.made_of["p50 ms"] / result.made_of["commit ms"])
    assert result.value == pytest.approx(result.made_of["p95 ms"] / result.made_of["commit ms"])
    assert result.made_of["webhooks"] >= 1
    assert shown == [(1, 1)]


async def test_the_models_own_time_is_subtracted(bench: Overhead) -> None:
    released = asyncio.Event()
    bench.models.script("gpt-4o-mini", Says(f"You said: message {bench.sent}", waits=released))
    asyncio.get_running_loop().call_later(3, released.set)
    began = perf_counter()
    [wait] = await bench.answer(1, 10)
    _, took = bench.models.took[-1]
    assert 0 < wait <= perf_counter() - began - took


async def test_a_second_reply_to_a_webhook_is_an_error(bench: Overhead) -> None:
    await bench.answer(1, 10)
    bench.vendor.record("1", f"You said: message {bench.sent - 1}", "0", {})
    with pytest.raises(ValueError, match="the counts of one slice differ"):
        await bench.answer(0, 10)
    del bench.vendor.ledger[[reply.id for reply in bench.vendor.ledger].index("0")]


async def test_a_request_that_the_vendor_refused_is_an_error(bench: Overhead) -> None:
    bench.vendor.refusals.append("400")
    with pytest.raises(ValueError, match="refused"):
        await bench.answer(1, 10)
    bench.vendor.refusals.clear()


async def test_a_dead_letter_is_an_error(bench: Overhead) -> None:
    admin = bench.fixture.admin
    await admin.execute(
        "INSERT INTO billing.dead_letter (id, consumer, source, destination, place, message_id, state, attempts, "
        "error, headers, payload) VALUES (uuidv7(), 'c', 'kafka', 't', '0', 'm', 'failed', 1, 'e', '{}', '')"
    )
    with pytest.raises(ValueError, match="dead letters"):
        await bench.answer(1, 10)
    await admin.execute("DELETE FROM billing.dead_letter")
