"""Billing periods: month ends, leap years, clock changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.billing.plans.calendar import Interval, full_period


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


@pytest.mark.parametrize(
    ("moment", "day", "interval", "zone", "begins", "ends"),
    [
        ("2026-03-15T00:00:00Z", 15, "month", "UTC", "2026-03-15T00:00:00Z", "2026-04-15T00:00:00Z"),
        ("2026-03-14T23:59:59Z", 15, "month", "UTC", "2026-02-15T00:00:00Z", "2026-03-15T00:00:00Z"),
        ("2026-02-28T12:00:00Z", 31, "month", "UTC", "2026-02-28T00:00:00Z", "2026-03-31T00:00:00Z"),
        ("2028-02-28T12:00:00Z", 31, "month", "UTC", "2028-01-31T00:00:00Z", "2028-02-29T00:00:00Z"),
        ("2026-04-29T12:00:00Z", 30, "month", "UTC", "2026-03-30T00:00:00Z", "2026-04-30T00:00:00Z"),
        ("2026-01-01T00:00:00Z", 29, "month", "UTC", "2025-12-29T00:00:00Z", "2026-01-29T00:00:00Z"),
        # Berlin: one hour less in March 2026, one more in October.
        ("2026-03-15T12:00:00Z", 1, "month", "Europe/Berlin", "2026-02-28T23:00:00Z", "2026-03-31T22:00:00Z"),
        ("2026-10-15T12:00:00Z", 1, "month", "Europe/Berlin", "2026-09-30T22:00:00Z", "2026-10-31T23:00:00Z"),
        ("2026-06-01T00:00:00Z", 1, "month", "Asia/Kolkata", "2026-05-31T18:30:00Z", "2026-06-30T18:30:00Z"),
        ("2026-06-01T00:00:00Z", 1, "year", "UTC", "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z"),
    ],
)
def test_a_period_begins_at_local_midnight_of_its_anchor(
    moment: str, day: int, interval: Interval, zone: str, begins: str, ends: str
) -> None:
    assert full_period(at(moment), day, interval, ZoneInfo(zone)) == (at(begins), at(ends))


@given(
    st.datetimes(datetime(2020, 1, 1), datetime(2040, 1, 1)),  # noqa: DTZ001
    st.integers(1, 31),
    st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Pacific/Apia", "America/Sao_Paulo"]),
)
def test_periods_follow_each_other_without_gap_or_overlap(naive: datetime, day: int, zone_name: str) -> None:
    moment, zone = naive.replace(tzinfo=UTC), ZoneInfo(zone_name)
    found = full_period(moment, day, "month", zone)
    assert found.begins <= moment < found.ends
    assert full_period(found.ends, day, "month", zone).begins == found.ends
    assert full_period(found.begins - timedelta(seconds=1), day, "month", zone).ends == found.begins
    assert timedelta(days=27) < found.ends - found.begins < timedelta(days=32)
