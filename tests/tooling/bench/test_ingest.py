"""Ingest: the channel's route, traced as in production; rows that are missing give an error."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from tooling.bench import ingest
from tooling.bench.fixture import bench_fixture
from tooling.bench.ingest import IngestBench
from tooling.bench.protocol import Contender
from tooling.testing.otlp import OtlpReceiver
from tooling.testing.stack import Stack


@pytest.fixture(scope="module")
async def receiver() -> AsyncIterator[OtlpReceiver]:
    async with OtlpReceiver() as running:
        yield running


@pytest.fixture(scope="module")
async def bench(stack: Stack, receiver: OtlpReceiver) -> AsyncIterator[IngestBench]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "SLICE_SECONDS", 0.3)
        patch.setattr(ingest, "REQUESTS", 5_000)
        async with bench_fixture(stack, []) as place:
            found = IngestBench(replace(place, otlp=receiver.endpoint))
            async with found.running():
                yield found


async def until_answered(contender: Contender) -> None:
    """On a loaded machine a slice can end before the first answer."""
    while not (await contender()).done:
        pass


async def test_acknowledged_webhooks_are_stored_and_traced(bench: IngestBench, receiver: OtlpReceiver) -> None:
    await until_answered(bench.ours)
    used = bench.cpu_time()
    assert (used.unit, set(used.made_of)) == ("µs", {"server", "postgres", "drained_in_the_slice"})
    assert used.value > 0
    await receiver.wait_for(lambda spans: any(s.service == "channel" and s.kind == "server" for s in spans))


async def test_the_anchors_answer(bench: IngestBench) -> None:
    assert [anchor.goal for anchor in bench.anchors()] == [0.4, 15]
    for anchor in bench.anchors():
        await until_answered(anchor.contender)


async def test_the_tail_is_measured_against_the_empty_server_at_the_same_rate(
    bench: IngestBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "TAIL_SECONDS", 0.2)
    monkeypatch.setattr(ingest, "TAIL_ROUNDS", 2)
    tail = await bench.tail(200)
    assert (tail.rate, tail.count) == (100, 40)
    assert 0 < tail.p50_ms <= tail.p99_ms
    assert tail.goal_ms > 0


async def test_a_fact_that_is_missing_is_an_error(bench: IngestBench, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, calls = bench._rows, 0

    async def one_fact_less_after_the_slice() -> tuple[int, int, int]:
        nonlocal calls
        calls += 1
        seen, facts, messages = await rows()
        return seen, facts - (calls > 1), messages

    monkeypatch.setattr(bench, "_rows", one_fact_less_after_the_slice)
    with pytest.raises(ValueError, match="the counts of one slice differ"):
        await bench.ours()
