"""Billing periods: from one anchor to the next, at local midnight. Pure."""

from __future__ import annotations

from calendar import monthrange
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

Interval = Literal["month", "year"]


class TimeSpan(NamedTuple):
    """From `begins` (inclusive) until `ends` (exclusive), UTC."""

    begins: datetime
    ends: datetime

    @property
    def seconds(self) -> int:
        return int((self.ends - self.begins) / timedelta(seconds=1))


def full_period(
    moment: datetime, anchor_day: int, interval: Interval, zone: ZoneInfo, anchor_month: int = 1
) -> TimeSpan:
    """Returns the period that contains `moment`.

    A period begins at local midnight of the anchor day. In a month without that day it begins on the month's last day.
    A yearly period begins in `anchor_month`.
    """
    local = moment.astimezone(zone)
    year, month = local.year, (local.month if interval == "month" else anchor_month)
    begins = _anchor(year, month, anchor_day, zone)
    if begins > moment:
        year, month = _shift(year, month, interval, -1)
        begins = _anchor(year, month, anchor_day, zone)
    return TimeSpan(begins, _anchor(*_shift(year, month, interval, 1), anchor_day, zone))


def _shift(year: int, month: int, interval: Interval, by: int) -> tuple[int, int]:
    if interval == "year":
        return year + by, month
    years, month0 = divmod(month - 1 + by, 12)
    return year + years, month0 + 1


def _anchor(year: int, month: int, day: int, zone: ZoneInfo) -> datetime:
    # A midnight that the clocks skip is read with the offset before the change, which is the first moment after it.
    local = datetime(year, month, min(day, monthrange(year, month)[1]), tzinfo=zone)
    return local.astimezone(UTC)
