"""How a figure is made that counts: paired slices in random order, a median ratio with its interval, a verdict.

Machines drift: another process, a warmer chip, a checkpoint. A slice of ours is therefore compared only with the
slice of the anchor (the work it is measured against) that ran next to it.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import msgspec

SLICE_SECONDS = 2.0
PAIRS = 11
# Where the anchor itself changes by more than this factor, something else than the code was measured.
MAX_DRIFT = 3.0
RESAMPLES = 10_000


class Slice(NamedTuple):
    """What one slice got done: durable and verified work only."""

    done: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.done / self.seconds


Contender = Callable[[], Awaitable[Slice]]


@dataclass(frozen=True)
class Anchor:
    """What ours is measured against. `goal`: the least ratio of our rate to its rate that is good enough."""

    name: str
    goal: float
    contender: Contender


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """`ratio`: the median of our rate divided by the anchor's, `low` to `high` its 95 % interval; rates are medians
    per second. A void run says nothing, so it meets no goal."""

    bench: str
    anchor: str
    ratio: float
    low: float
    high: float
    goal: float
    met: bool
    pairs: int
    anchor_rate: float
    our_rate: float
    void: bool


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds from the intended moment, in an open loop of `rate` per second."""

    bench: str
    measure: str
    p50_ms: float
    p99_ms: float
    goal_ms: float
    met: bool
    rate: float
    count: int


class Units(msgspec.Struct, frozen=True, kw_only=True):
    """`value` of some `unit`, of which `goal` is the most that is good enough; `made_of`: the figures behind it."""

    bench: str
    measure: str
    value: float
    unit: str
    goal: float
    met: bool
    made_of: dict[str, float]


Figure = Result | Latency | Units


async def run_pairs(
    bench: str,
    ours: Contender,
    anchors: Sequence[Anchor],
    progress: Callable[[int, int], None],
    *,
    pairs: int = PAIRS,
) -> list[Result]:
    """Runs a slice of ours and of each anchor, in random order, `pairs` times after a first time that is not counted.

    `progress` is called with how many slices are done, and of how many.
    """
    contenders: dict[str, Contender] = {"ours": ours, **{anchor.name: anchor.contender for anchor in anchors}}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    done, total = 0, (pairs + 1) * len(contenders)
    for number in range(pairs + 1):
        for name in random.sample(list(contenders), len(contenders)):
            slice_ = await contenders[name]()
            if number:
                rates[name].append(slice_.rate)
            done += 1
            progress(done, total)
    return [verdict(bench, anchor.name, anchor.goal, rates[anchor.name], rates["ours"]) for anchor in anchors]


def verdict(bench: str, anchor: str, goal: float, anchor_rates: Sequence[float], our_rates: Sequence[float]) -> Result:
    """What the rates of the pairs (same index, same pair) say."""
    ratios = [our / theirs for our, theirs in zip(our_rates, anchor_rates, strict=True)]
    low, high = interval(ratios)
    ratio = median(ratios)
    void = max(anchor_rates) > MAX_DRIFT * min(anchor_rates)
    return Result(
        bench=bench,
        anchor=anchor,
        ratio=ratio,
        low=low,
        high=high,
        goal=goal,
        met=not void and ratio >= goal,
        pairs=len(ratios),
        anchor_rate=median(anchor_rates),
        our_rate=median(our_rates),
        void=void,
    )


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of the median of `values`, by the percentile bootstrap (Efron); equal for equal values."""
    generator = random.Random(0)
    medians = sorted(median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[int(RESAMPLES * 0.025)], medians[int(RESAMPLES * 0.975)]


def latency(bench: str, measure: str, goal_ms: float, rate: float, seconds: Sequence[float]) -> Latency:
    """What the single latencies say; the p99 decides."""
    ordered = sorted(seconds)
    p99 = percentile(ordered, 0.99) * 1000
    return Latency(
        bench=bench,
        measure=measure,
        p50_ms=percentile(ordered, 0.5) * 1000,
        p99_ms=p99,
        goal_ms=goal_ms,
        met=p99 <= goal_ms,
        rate=rate,
        count=len(ordered),
    )


def units(bench: str, measure: str, goal: float, value: float, unit: str, **made_of: float) -> Units:
    return Units(bench=bench, measure=measure, value=value, unit=unit, goal=goal, met=value <= goal, made_of=made_of)


def percentile(ordered: Sequence[float], part: float) -> float:
    """The smallest of the sorted values that at least this part of them does not exceed (nearest rank)."""
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]


def check(what: str, expected: Mapping[str, int]) -> None:
    """All counts of the same work must be equal. Raises ValueError naming them: such a slice measured nothing."""
    if len(set(expected.values())) != 1:
        counts = ", ".join(f"{name} {count}" for name, count in expected.items())
        raise ValueError(f"{what}: the counts of one slice differ ({counts}); nothing is reported")
