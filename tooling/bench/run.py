"""All benches by name, and how each is run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from statistics import median

from infra.service.process import freeze_loaded_modules
from tooling.bench import (
    bill,
    burst,
    consume,
    fanout,
    growth,
    idle,
    ingest,
    intake,
    invoice,
    message,
    overhead,
    recover,
    relay,
    remember,
    reserve,
    retrieve,
    retrieve_quality,
    runs,
    soak,
)
from tooling.bench.fixture import Fixture, bench_fixture
from tooling.bench.protocol import PAIRS, Anchor, Figure, run_pairs
from tooling.testing.stack import Stack
from tooling.testing.vendors import WebhookStandIn

# Called with the number of slices that are done and the number of all slices.
Progress = Callable[[int, int], None]


async def run_consume(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    bench = consume.Consume(place)
    await bench.prepare()
    return await run_pairs("consume", bench.traced, bench.anchors(), progress, pairs=pairs)


async def run_telemetry(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    """The work of ``consume`` by the kernel's reader, with every message in a recorded trace and with tracing off."""
    bench = consume.Consume(place)
    await bench.prepare()
    off = Anchor("tracing off", 0.97, bench.untraced)
    return await run_pairs("telemetry", bench.traced, [off], progress, pairs=pairs)


async def run_relay(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    bench = relay.RelayBench(place)
    results = await run_pairs("relay", bench.ours, bench.anchors(), progress, pairs=pairs)
    return [*results, await bench.latency()]


async def run_bill(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    bench = bill.Bill(place)
    await bench.prepare()
    return await run_pairs("bill", bench.ours, bench.anchors(), progress, pairs=pairs)


async def run_reserve(place: Fixture, progress: Progress, _: int) -> Sequence[Figure]:
    return await reserve.measure(place, progress)


async def run_invoice(place: Fixture, progress: Progress, _: int) -> Sequence[Figure]:
    return await invoice.measure(place, progress)


async def run_ingest(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    bench = ingest.IngestBench(place)
    async with bench.running():
        results = await run_pairs("ingest", bench.ours, bench.anchors(), progress, pairs=pairs)
        return [*results, bench.cpu_time()]


async def run_ingest_tail(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    bench = ingest.IngestBench(place)
    async with bench.running():
        rates = []
        for number in range(pairs):
            rates.append((await bench.ours()).rate)
            progress(number + 1, pairs)
        return [await bench.tail(median(rates))]


async def run_runs(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    async with runs.running(place) as bench, runs.others(bench) as others:
        anchors = [Anchor("steps: single-row commits, 8 connections", 0.2, bench.commits), *others]
        commits, *results = await run_pairs("runs", bench.ours, anchors, progress, pairs=pairs)
        return [commits, *map(runs.in_runs, results), *bench.costs()]


async def run_overhead(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    async with overhead.running(place) as bench:
        return await bench.measure(progress, pairs)


async def run_message(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    async with overhead.running(place) as bench:
        return await message.measure(bench, progress, pairs)


async def run_message_telemetry(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    async with (
        bench_fixture(place.stack, []) as other,
        overhead.running(place) as traced,
        overhead.running(other, traced=False) as untraced,
    ):
        ours, anchor = message.telemetry(traced, untraced)
        return await run_pairs("message-telemetry", ours, [anchor], progress, pairs=pairs)


async def run_intake(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    async with intake.running(place) as bench:
        return await bench.measure(progress, pairs)


async def run_idle(place: Fixture, progress: Progress, _: int) -> Sequence[Figure]:
    return await idle.measure(place, progress)


async def run_recover(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    async with recover.running(place.stack) as bench:
        return await bench.measure(progress, pairs)


async def run_growth(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    return await growth.measure(place, progress, pairs)


async def run_burst(place: Fixture, progress: Progress, _: int) -> Sequence[Figure]:
    async with overhead.running(place, WebhookStandIn()) as bench:
        return await burst.measure(bench, progress)


async def run_soak(place: Fixture, progress: Progress, _: int) -> Sequence[Figure]:
    async with soak.running(place) as bench:
        return await soak.measure(bench, progress)


async def run_retrieve(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    return await retrieve.measure(place, progress, pairs)


async def run_retrieve_quality(place: Fixture, progress: Progress, _: int) -> Sequence[Figure]:
    return await retrieve_quality.measure(place, progress)


async def run_remember(place: Fixture, progress: Progress, _: int) -> Sequence[Figure]:
    return await remember.measure(place, progress)


async def run_fanout(place: Fixture, progress: Progress, pairs: int) -> Sequence[Figure]:
    async with fanout.running(place) as bench:
        results = await run_pairs("fanout", bench.ours, bench.anchors(), progress, pairs=pairs)
        return [*results, bench.memory()]


BENCHES: dict[str, Callable[[Fixture, Progress, int], Awaitable[Sequence[Figure]]]] = {
    "consume": run_consume,
    "relay": run_relay,
    "telemetry": run_telemetry,
    "bill": run_bill,
    "reserve": run_reserve,
    "invoice": run_invoice,
    "ingest": run_ingest,
    "ingest-tail": run_ingest_tail,
    "runs": run_runs,
    "overhead": run_overhead,
    "fanout": run_fanout,
    "message": run_message,
    "message-telemetry": run_message_telemetry,
    "intake": run_intake,
    "idle": run_idle,
    "recover": run_recover,
    "growth": run_growth,
    "burst": run_burst,
    "soak": run_soak,
    "retrieve": run_retrieve,
    "retrieve-quality": run_retrieve_quality,
    "remember": run_remember,
}
# These run only if they are named: `growth`, `retrieve`, `burst` and `soak` take very long; `reserve`, `invoice`,
# `remember` and `retrieve-quality` have no anchor; the others start all services.
ON_DEMAND = (
    "burst",
    "growth",
    "idle",
    "invoice",
    "recover",
    "remember",
    "reserve",
    "retrieve",
    "retrieve-quality",
    "soak",
)
ENGINES = ("postgres", "valkey", "kafka", "rabbitmq")


async def run(name: str, stack: Stack, progress: Progress, *, pairs: int = PAIRS) -> Sequence[Figure]:
    """Runs one bench on running engines. Raises ValueError if the rows of a slice are not those that it reported."""
    freeze_loaded_modules()  # as every service does; the anchors do it too
    async with bench_fixture(stack, [*consume.TOPICS, *bill.TOPICS]) as place:
        return await BENCHES[name](place, progress, pairs)
