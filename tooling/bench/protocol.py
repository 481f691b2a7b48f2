"""The measuring protocol of the benches: paired slices in random order, a median ratio with its interval, a verdict.

Machines drift: another process starts, a chip warms up, a checkpoint runs. A slice of our code is therefore compared
only with the slice of the anchor (the work that it is measured against) that ran next to it.
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
# If the anchor itself changes by more than this factor, the run measured the machine and not the code.
MAX_DRIFT = 3.0
RESAMPLES = 10_000


class Slice(NamedTuple):
    """The work of one slice. Only durable and verified work counts."""

    done: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.done / self.seconds


Contender = Callable[[], Awaitable[Slice]]


@dataclass(frozen=True)
class Anchor:
    """The work that ours is measured against."""

    name: str
    goal: float
    """The smallest ratio of our rate to the anchor's rate that meets the goal."""
    contender: Contender


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A ratio of two rates."""

    bench: str
    anchor: str
    ratio: float
    """The median over the pairs of our rate divided by the anchor's rate."""
    low: float
    """With `high` the 95 % interval of `ratio`."""
    high: float
    goal: float
    met: bool
    pairs: int
    anchor_rate: float
    """Median, per second."""
    our_rate: float
    """Median, per second."""
    void: bool
    """The anchor drifted by more than MAX_DRIFT: the ratio says nothing, so no goal is met."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds from the moment at which a request was due to its answer, in an open loop of `rate` per second."""

    bench: str
    measure: str
    p50_ms: float
    p99_ms: float
    goal_ms: float
    met: bool
    rate: float
    count: int


class Units(msgspec.Struct, frozen=True, kw_only=True):
    """An amount of `unit` that should be small."""

    bench: str
    measure: str
    value: float
    unit: str
    goal: float | None
    """The largest value that meets the goal; None if the figure is only recorded."""
    met: bool
    low: float | None = None
    """With `high` the 95 % interval of `value`; None if it was measured once only."""
    high: float | None = None
    made_of: dict[str, float]
    """The figures from which `value` was calculated, and others that explain it."""


Figure = Result | Latency | Units


async def run_pairs(
    bench: str,
    ours: Contender,
    anchors: Sequence[Anchor],
    progress: Callable[[int, int], None],
    *,
    pairs: int = PAIRS,
) -> list[Result]:
    """Runs a slice of ours and of each anchor, in random order, `pairs` times after a first round that is not counted.

    `progress` is called with the number of slices that are done and the number of all slices.
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
    """The result of these rates; rates with the same index are a pair."""
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
    """The 95 % interval of the median of `values`, by the percentile bootstrap (Efron); no chance is in it."""
    generator = random.Random(0)
    medians = sorted(median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return medians[int(RESAMPLES * 0.025)], medians[int(RESAMPLES * 0.975)]


def latency(bench: str, measure: str, goal_ms: float, rate: float, seconds: Sequence[float]) -> Latency:
    """The result of these latencies, in seconds. The p99 decides."""
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


def units(bench: str, measure: str, goal: float | None, value: float, unit: str, **made_of: float) -> Units:
    """An amount that was measured once."""
    met = goal is None or value <= goal
    return Units(bench=bench, measure=measure, value=value, unit=unit, goal=goal, met=met, made_of=made_of)


def median_units(
    bench: str, measure: str, goal: float | None, values: Sequence[float], unit: str, **made_of: float
) -> Units:
    """The median of `values`, each of a slice of its own, with its interval."""
    low, high = interval(values)
    found = units(bench, measure, goal, median(values), unit, **made_of)
    return msgspec.structs.replace(found, low=low, high=high)


def percentile(ordered: Sequence[float], part: float) -> float:
    """The nearest-rank percentile of sorted values: the smallest value that at least `part` of them do not exceed."""
    return ordered[max(0, -int(-part * len(ordered) // 1) - 1)]


def check(what: str, expected: Mapping[str, int]) -> None:
    """Compares counts of the same work, which must be equal. Raises ValueError with all of them if they differ."""
    if len(set(expected.values())) != 1:
        counts = ", ".join(f"{name} {count}" for name, count in expected.items())
        raise ValueError(f"{what}: the counts of one slice differ ({counts}); no figure is reported")
