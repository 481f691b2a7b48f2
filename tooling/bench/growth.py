"""``growth``: CPU time of a five-step run as the event store, the tenants and the worker processes become more.

The system is that of ``runs``: the real agent service with a model that answers immediately. Each row starts from an
empty database, runs until the event store has the wanted number of events, and then measures slices. The CPU is that of
all agent processes and of PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import NamedTuple

from tooling.bench import cpu
from tooling.bench.fixture import Fixture, bench_fixture, running_platform_on
from tooling.bench.protocol import Units, median_units
from tooling.bench.runs import Runs
from tooling.bench.runs_anchors import STEPS

SESSIONS = 200
FILL_SESSIONS = 1_000


class Case(NamedTuple):
    """One row of the result."""

    events: int
    tenants: int
    workers: int

    def __str__(self) -> str:
        return f"CPU of a run: {self.events:,} events, tenants {self.tenants}, worker processes {self.workers}"


CASES = (
    Case(1_000, 1, 1),
    Case(100_000, 1, 1),
    Case(1_000_000, 1, 1),
    Case(1_000, 200, 1),
    Case(100_000, 200, 1),
    Case(1_000_000, 200, 1),
    Case(1_000, 20, 1),
    Case(1_000, 20, 2),
    Case(1_000, 20, 4),
)


async def measure(
    place: Fixture, progress: Callable[[int, int], None], slices: int, cases: tuple[Case, ...] = CASES
) -> list[Units]:
    """Raises ValueError if a step is not on record."""
    found = []
    for number, case in enumerate(cases):
        async with bench_fixture(place.stack, []) as own:
            found.append(await _case(own, case, slices))
        progress(number + 1, len(cases))
    return found


async def _case(place: Fixture, case: Case, slices: int) -> Units:
    async with running_platform_on(place) as platform:
        bench = Runs(place, platform, tenants=case.tenants, workers=case.workers)
        await bench.prepare()
        bench.sessions = min(FILL_SESSIONS, max(1, case.events // 20))
        while (events := await _events(place)) < case.events:
            await bench.ours()
        bench.sessions = SESSIONS
        used, rates = [], []
        for _ in range(slices):
            before, began = cpu.of_all(place.stack, platform), perf_counter()
            done = await bench.ours()
            rates.append(done.done / STEPS / (perf_counter() - began))
            after = cpu.difference(before, cpu.of_all(place.stack, platform))
            seconds = sum(amount for name, amount in after.items() if name.startswith(("agent", "postgres")))
            used.append(seconds * 1000 * STEPS / done.done)
        return median_units(
            "growth", str(case), None, used, "ms", **{"events at the begin": events, "runs per s": max(rates)}
        )


async def _events(place: Fixture) -> int:
    return int(await place.admin.fetchval("SELECT count(*) FROM agent.event"))
