"""``burst``: a minute with ten times the normal load; each accepted message is answered, and memory is bounded.

The system is that of ``message`` with a channel without limits of a vendor, and each message comes from another
person. A normal load is half of the rate that a burst of webhooks has shown. The minute is an open loop, whose refusals
(429, 503) are not sent again. Then the bench waits until each accepted message has its reply, and counts: an accepted
one has exactly one reply, one call of the model and its usage, and a refused one has nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from statistics import median
from time import perf_counter

from tooling.bench import memory
from tooling.bench.http_load import flood
from tooling.bench.overhead import WARM, WARM_RATE, Overhead
from tooling.bench.protocol import Units, check, percentile, units

TIMES, SECONDS = 10, 60.0
ROUNDS, ROUND = 3, 200
STALL_SECONDS = 60.0
REFUSALS = (429, 503)
GOAL_DRAIN, GOAL_MIB = 1.5, 256.0


async def measure(bench: Overhead, progress: Callable[[int, int], None], seconds: float = SECONDS) -> list[Units]:
    """Raises ValueError unless exactly the accepted messages were answered, each once."""
    await bench.answer(WARM, WARM_RATE)
    capacity = median([await _rate(bench) for _ in range(ROUNDS)])
    offered = TIMES * capacity / 2
    numbers = range(bench.sent, bench.sent + round(offered * seconds))
    before = sum(memory.of_services(bench.platform).values())
    seen = [before]
    watching = asyncio.create_task(_watch(bench, seen))
    began = time.time()
    answers = await flood(bench.platform.ports["channel"], [bench.webhook(n, n) for n in numbers], offered)
    accepted = {f"You said: message {n}" for n, (status, _) in zip(numbers, answers, strict=True) if status == 200}
    if odd := {status for status, _ in answers} - {200, *REFUSALS}:
        raise ValueError(f"burst: webhooks were answered {sorted(odd)}, must be 200, 429 or 503")
    bench.sent += len(accepted)
    await _drained(bench, progress)
    watching.cancel()
    check("burst", await bench.counts())
    arrived = [reply.at for reply in bench.vendor.ledger if reply.text in accepted]
    if len(arrived) != len(accepted):
        raise ValueError(f"burst: {len(arrived)} of {len(accepted)} accepted messages have a reply")
    took = max(arrived) - began
    ideal = len(accepted) / capacity
    times = sorted(wait for status, wait in answers if status == 200)
    return [
        units(
            "burst",
            "time from the first webhook to the last reply, part of the ideal",
            GOAL_DRAIN,
            took / ideal,
            "",
            **{
                "capacity per s": capacity,
                "offered per s": offered,
                "accepted": len(accepted),
                "refused": len(answers) - len(accepted),
                "lost": 0,
                "seconds": took,
                "accepted p99 ms": percentile(times, 0.99) * 1000,
            },
        ),
        units("burst", "memory grown", GOAL_MIB, max(seen) - before, "MiB", before=before, most=max(seen)),
    ]


async def _rate(bench: Overhead) -> float:
    """Answered messages per second if many come at once, each from another person."""
    numbers = range(bench.sent, bench.sent + ROUND)
    bench.sent += ROUND
    began = perf_counter()
    for status, _ in await flood(bench.platform.ports["channel"], [bench.webhook(n, n) for n in numbers], 1e6):
        if status != 200:
            raise ValueError(f"burst: a webhook was answered {status} before the burst")
    await _drained(bench, lambda *_: None)
    return ROUND / (perf_counter() - began)


async def _drained(bench: Overhead, progress: Callable[[int, int], None]) -> None:
    """Returns when all are answered and counted, or after a while without another one."""
    seen, since = -1, perf_counter()
    while perf_counter() - since < STALL_SECONDS:
        counts = await bench.counts()
        if (done := min(counts.values())) >= bench.sent:
            return
        if sum(counts.values()) != seen:
            seen, since = sum(counts.values()), perf_counter()
        progress(done, bench.sent)
        await asyncio.sleep(0.1 if bench.sent < TIMES * ROUND else 1)


async def _watch(bench: Overhead, seen: list[float]) -> None:
    while True:
        seen.append(sum(memory.of_services(bench.platform).values()))
        await asyncio.sleep(1)
