"""Amounts of parts of a period, by hand: leap days, ends of months, changed clocks, allowances, corrections."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

import pytest

from services.billing.plans.calendar import Interval, TimeSpan, full_period
from services.billing.plans.plans import Included, MeteredQuantity, Plan, PlanCharge, lines
from services.billing.rating.currencies import format_minor, to_minor
from services.billing.rating.schemes import SchemeTier

UNIT = 10**9


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)


def fee(base: int, begins: str, ends: str, day: int, zone: str = "UTC", interval: Interval = "month") -> int:
    """The base fee of a plan for a part of the period that contains its beginning, in nano-units."""
    full = full_period(at(begins), day, interval, ZoneInfo(zone), at(begins).astimezone(ZoneInfo(zone)).month)
    assert at(ends) <= full.ends
    found = lines(Plan("P", "USD", interval, base * UNIT), [], TimeSpan(at(begins), at(ends)).seconds, full.seconds)
    return sum(line.amount_nanos for line in found)


@pytest.mark.parametrize(
    ("base", "begins", "ends", "day", "expected", "derivation"),
    [
        (29, "2028-02-01T00:00Z", "2028-03-01T00:00Z", 1, "29.00", "all of February 2028"),
        (29, "2028-02-15T00:00Z", "2028-03-01T00:00Z", 1, "15.00", "15 of 29 days"),
        (28, "2027-02-15T00:00Z", "2027-03-01T00:00Z", 1, "14.00", "14 of 28 days: no leap day"),
        (29, "2028-02-29T00:00Z", "2028-03-01T00:00Z", 1, "1.00", "the leap day alone"),
        (31, "2026-01-31T00:00Z", "2026-02-28T00:00Z", 31, "31.00", "anchor 31: January 31 to February 28 is whole"),
        (31, "2026-02-28T00:00Z", "2026-03-31T00:00Z", 31, "31.00", "February 28 to March 31 is whole"),
        (31, "2026-03-01T00:00Z", "2026-03-31T00:00Z", 31, "30.00", "30 of the 31 days from February 28"),
        (30, "2026-04-15T00:00Z", "2026-04-30T00:00Z", 30, "14.52", "anchor 30: 15 of 31 days from March 30"),
        (28, "2027-02-10T00:00Z", "2027-02-28T00:00Z", 29, "16.80", "anchor 29: 18 of 30 days from January 29"),
        (10, "2026-06-01T00:00Z", "2026-06-01T00:00Z", 1, "0.00", "no time"),
        (30, "2026-06-01T00:00Z", "2026-06-01T00:00:01Z", 1, "0.00", "one second: 30 / 2,592,000"),
        # getlago.com/docs/guide/plans/plan-model: a plan of $50, 25 of the 30 days of April cost $41.67.
        (50, "2026-04-06T00:00Z", "2026-05-01T00:00Z", 1, "41.67", "50 × 25 / 30"),
    ],
)
def test_a_part_of_a_period_costs_its_share(
    base: int, begins: str, ends: str, day: int, expected: str, derivation: str
) -> None:
    assert format_minor(to_minor(fee(base, begins, ends, day), "USD"), "USD") == expected, derivation


def test_a_leap_year_has_a_day_more() -> None:
    year = fee(366, "2028-01-01T00:00Z", "2029-01-01T00:00Z", 1, interval="year")
    until_march = fee(366, "2028-01-01T00:00Z", "2028-03-01T00:00Z", 1, interval="year")
    assert (year, until_march) == (366 * UNIT, 60 * UNIT), "31 days of January and 29 of February"


def test_a_change_of_the_clock_makes_a_month_an_hour_longer_or_shorter() -> None:
    # Berlin, March 2026: 31 days less one hour are 743 hours; the hour after midnight of the 1st is one of them.
    march = "2026-03-01T00:00+01:00", "2026-03-01T01:00+01:00"
    assert fee(743, *march, 1, "Europe/Berlin") == UNIT
    # October 2026: 745 hours.
    october = "2026-10-01T00:00+02:00", "2026-10-01T01:00+02:00"
    assert fee(745, *october, 1, "Europe/Berlin") == UNIT
    # The night of the change itself: from midnight to midnight of October 25 are 25 hours.
    night = "2026-10-25T00:00+02:00", "2026-10-26T00:00+01:00"
    assert fee(745, *night, 1, "Europe/Berlin") == 25 * UNIT


def test_a_change_of_the_plan_costs_each_plan_for_its_time() -> None:
    # docs.stripe.com/billing/subscriptions/prorations: from 10 to 20 USD halfway through the period costs 5 more.
    halves = ("2026-06-01T00:00Z", "2026-06-16T00:00Z"), ("2026-06-16T00:00Z", "2026-07-01T00:00Z")
    assert fee(10, *halves[0], 1) + fee(20, *halves[1], 1) == (10 + 5) * UNIT


@pytest.mark.parametrize(
    ("used", "days", "expected", "derivation"),
    [
        (100, 30, 0, "all included"),
        (110, 30, 100, "10 × 10: the first tier"),
        (150, 30, 500, "50 × 10: the edge of the first tier"),
        (151, 30, 501, "50 × 10 + 1 × 1: the allowance and the tiers are counted one after the other"),
        (60, 15, 100, "half of the period: 50 are included, 10 × 10"),
        (101, 15, 501, "50 are included, 50 × 10 + 1 × 1: edges of tiers are not shares"),
        (1, 0, 10, "no time: nothing is included"),
    ],
)
def test_the_allowance_is_a_share_and_the_tiers_are_not(used: int, days: int, expected: int, derivation: str) -> None:
    tiers = [SchemeTier(50, Decimal(10)), SchemeTier(None, Decimal(1))]
    plan = Plan("P", "USD", "month", 0, [Included("calls", 100)], [PlanCharge("calls", "graduated", tiers)])
    found = lines(plan, [MeteredQuantity("calls", "", "", "", False, used, used)], days * 86_400, 30 * 86_400)
    assert sum(line.amount_nanos for line in found) == expected, derivation


PARTS = {"input_tokens": 100, "cached_tokens": 90, "output_tokens": 100, "reasoning_tokens": 80}


@pytest.mark.parametrize(
    ("prices", "expected", "derivation"),
    [
        ({"input_tokens": 200, "cached_tokens": 50}, 6500, "10 × 200 + 90 × 50"),
        ({"input_tokens": 200}, 20_000, "100 × 200: the part has no price of its own"),
        ({"cached_tokens": 50}, 4500, "90 × 50"),
        ({"output_tokens": 800, "reasoning_tokens": 800}, 80_000, "20 × 800 + 80 × 800"),
        ({"input_tokens": 200, "reasoning_tokens": 800}, 84_000, "100 × 200 + 80 × 800: a part of another whole"),
    ],
)
@pytest.mark.parametrize("by", [None, "model"])
def test_a_part_with_a_charge_of_its_own_is_charged_once(
    prices: dict[str, int], expected: int, derivation: str, by: str | None
) -> None:
    charges = [PlanCharge(meter, "per_unit", [SchemeTier(None, Decimal(n))], by) for meter, n in prices.items()]
    metered = [MeteredQuantity(meter, model, "", "", False, n, 1) for model in "ab" for meter, n in PARTS.items()]
    found = lines(Plan("P", "USD", "month", 0, charges=charges), metered, 1, 1)
    assert sum(line.amount_nanos for line in found) == 2 * expected, derivation


@pytest.mark.parametrize(
    ("nanos", "markup", "expected", "derivation"),
    [
        (-1000, "0", -1000, "as it is"),
        (-1000, "10", -1100, "the markup of the charge is given back too"),
        (-5, "10", -6, "-5.5 is halfway: the even neighbour"),
        (-15, "10", -16, "-16.5 is halfway: the even neighbour"),
        (0, "10", 0, "corrections that cancel each other"),
    ],
)
def test_a_negative_correction_is_a_negative_line(nanos: int, markup: str, expected: int, derivation: str) -> None:
    plan = Plan("P", "USD", "month", 0, usage_markup_percent=Decimal(markup))
    [line] = lines(plan, [MeteredQuantity("correction_nanos", "acme/m", "", "", True, nanos, 3)], 1, 1)
    assert (line.amount_nanos, line.quantity) == (expected, 3), derivation


@pytest.mark.parametrize(
    ("currency", "nanos", "expected"),
    [
        ("JPY", 1_499_999_999, "1"),
        ("JPY", 1_500_000_000, "2"),
        ("JPY", 2_500_000_000, "2"),
        ("JPY", 2_500_000_001, "3"),
        ("JPY", -1_500_000_000, "-2"),
        ("KWD", 1_500_000, "0.002"),
        ("KWD", 2_500_000, "0.002"),
        ("CLF", 150_000, "0.0002"),
        ("USD", 5_000_000, "0.00"),
        ("USD", -15_000_000, "-0.02"),
    ],
)
def test_a_total_is_rounded_once_to_the_minor_unit(currency: str, nanos: int, expected: str) -> None:
    assert format_minor(to_minor(nanos, currency), currency) == expected
