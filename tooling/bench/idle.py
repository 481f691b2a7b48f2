"""``idle``: CPU of a system without traffic, by process, in cores.

All services run as real processes with the settings of production, on all engines that they need. After they have
settled, several windows are measured, together a minute.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from statistics import median
from time import perf_counter

from protos.catalog import SERVICES
from tooling.bench import cpu
from tooling.bench.fixture import PRODUCTION, Fixture, running_platform_on
from tooling.bench.protocol import Units, median_units

SETTLE_SECONDS = 20.0
WINDOW_SECONDS = 6.0
WINDOWS = 10
SERVICES_GOAL, ALL_GOAL = 0.1, 0.25


async def measure(
    place: Fixture, progress: Callable[[int, int], None], services: Sequence[str] = SERVICES, windows: int = WINDOWS
) -> list[Units]:
    async with running_platform_on(place) as platform:
        await platform.prepare(*services)
        await platform.start(*services, OTEL_EXPORTER_OTLP_ENDPOINT=place.otlp, **PRODUCTION)
        await asyncio.sleep(SETTLE_SECONDS)
        found: list[dict[str, float]] = []
        for number in range(windows):
            before, began = cpu.of_all(place.stack, platform), perf_counter()
            await asyncio.sleep(WINDOW_SECONDS)
            used, seconds = cpu.difference(before, cpu.of_all(place.stack, platform)), perf_counter() - began
            found.append({name: amount / seconds for name, amount in used.items()})
            progress(number + 1, windows)
    of_services = [sum(used for name, used in one.items() if name in services) for one in found]
    of_all = [sum(one.values()) for one in found]
    each = {name: median(one[name] for one in found) for name in found[0]}
    return [
        median_units("idle", f"{len(services)} services", SERVICES_GOAL, of_services, "cores", **each),
        median_units("idle", "services and engines", ALL_GOAL, of_all, "cores"),
    ]
