"""Stored byte-hours: the integral of the stored bytes is exact, also if samples are missed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.memory.metering.storage import StorageMeter, advance

START = datetime(2026, 3, 29, 0, 59, 59, 999_999, tzinfo=UTC)
HOUR = timedelta(hours=1)

# (microseconds until the next change or sample, change of the bytes)
steps = st.lists(st.tuples(st.integers(0, 5 * 3_600_000_000), st.integers(-(10**9), 10**12)), min_size=1, max_size=20)


def hour_of(moment: datetime) -> datetime:
    return moment.replace(minute=0, second=0, microsecond=0)


def run(changes: Sequence[tuple[int, int]], sampled: Sequence[bool]) -> tuple[list[tuple[datetime, int]], StorageMeter]:
    """Makes the changes, and takes the samples in the middle of the waits."""
    now, meter, hours = START, StorageMeter(0, 0, START), []
    for (wait, difference), sample in zip(changes, sampled, strict=False):
        if sample:
            found, meter = advance(meter, now + timedelta(microseconds=wait // 2))
            hours += found
        now += timedelta(microseconds=wait)
        found, meter = advance(meter, now)
        hours += found
        meter = meter._replace(bytes=max(0, meter.bytes + difference))
    return hours, meter


@given(steps, st.lists(st.booleans(), min_size=20, max_size=20))
def test_missed_samples_are_made_up_exactly(changes: Sequence[tuple[int, int]], sampled: Sequence[bool]) -> None:
    hours, meter = run(changes, sampled)
    assert (hours, meter) == run(changes, [False] * 20)
    exact, stored = 0, 0
    for wait, difference in changes:
        exact += stored * wait
        stored = max(0, stored + difference)
    assert sum(quantity for _, quantity in hours) * 3_600_000_000 + meter.rest == exact
    assert len({hour for hour, _ in hours}) == len(hours), "an hour is reported once"
    assert all(hour == hour_of(hour) and hour + HOUR <= meter.since for hour, _ in hours)


def test_a_clock_that_was_set_back_reports_nothing_twice() -> None:
    hours, meter = advance(StorageMeter(10, 0, START), START + 2 * HOUR)
    # The microsecond of the first hour is less than a byte-hour, and is carried over.
    assert hours == [(datetime(2026, 3, 29, 1, tzinfo=UTC), 10)]
    assert advance(meter, START) == ([], meter)
