"""``message``: CPU time of one message from the vendor's webhook to the charge, by service and by engine.

The system is that of ``overhead``: channel, agent and billing as real processes on real engines with tracing on, and
fakes of vendor and model, whose CPU is not counted. A slice is a burst of webhooks, and ends when every reply is at the
vendor and every usage record is counted. The CPU of a slice is all that the processes use in it, so their polling is
part of it; at half load a message therefore costs more.

``message-telemetry``: messages per CPU second of the services with tracing on, against the same system without it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from time import perf_counter

from tooling.bench import cpu
from tooling.bench.overhead import AT_ONCE, BURST, SERVICES, SLICE_SECONDS, WARM, WARM_RATE, Overhead
from tooling.bench.protocol import Anchor, Contender, Slice, Units, median_units

GOAL_MS = 30.0


async def measure(bench: Overhead, progress: Callable[[int, int], None], slices: int) -> list[Units]:
    """Raises ValueError unless each webhook had exactly one reply and one usage record."""
    await bench.answer(WARM, WARM_RATE)
    full: list[dict[str, float]] = []
    half: list[dict[str, float]] = []
    rates: list[float] = []
    for number in range(slices):
        began = perf_counter()
        full.append(await _slice(bench, BURST, AT_ONCE))
        rates.append(BURST / (perf_counter() - began))
        half.append(await _slice(bench, max(1, int(rates[-1] / 2 * SLICE_SECONDS)), rates[-1] / 2))
        progress(number + 1, slices)
    services, engines = _split(full)
    at_half, engines_at_half = _split(half)
    return [
        median_units(
            "message", "CPU of the services, full load", GOAL_MS, services, "ms", per_s=median(rates), **_each(full)
        ),
        median_units("message", "CPU of the engines, full load", None, engines, "ms"),
        median_units("message", "CPU of the services, half load", None, at_half, "ms", **_each(half)),
        median_units("message", "CPU of the engines, half load", None, engines_at_half, "ms"),
    ]


def telemetry(traced: Overhead, untraced: Overhead) -> tuple[Contender, Anchor]:
    """Messages per CPU second of the services with tracing on, and the anchor with tracing off."""

    async def slice_of(bench: Overhead) -> Slice:
        used = await _slice(bench, BURST, AT_ONCE)
        return Slice(BURST, sum(used[name] for name in SERVICES) * BURST / 1000)

    return partial(slice_of, traced), Anchor("CPU of a message, tracing off", 0.97, partial(slice_of, untraced))


async def _slice(bench: Overhead, count: int, rate: float) -> dict[str, float]:
    """Milliseconds of CPU per message of each process."""
    stack = bench.fixture.stack
    before = cpu.of_all(stack, bench.platform)
    await bench.answer(count, rate)
    used = cpu.difference(before, cpu.of_all(stack, bench.platform))
    return {name: seconds * 1000 / count for name, seconds in used.items()}


def _split(slices: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    """The sums of each slice over the services and over the engines."""
    return (
        [sum(used for name, used in one.items() if name in SERVICES) for one in slices],
        [sum(used for name, used in one.items() if name not in SERVICES) for one in slices],
    )


def _each(slices: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median over the slices of each process."""
    found: dict[str, list[float]] = defaultdict(list)
    for one in slices:
        for name, used in one.items():
            found[name].append(used)
    return {name: median(used) for name, used in found.items()}
