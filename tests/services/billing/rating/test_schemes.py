"""Price schemes at, below and above each edge, with their derivation, and against an oracle in fractions."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import iso4217
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.billing.plans.plans import MeteredQuantity, Plan, PlanCharge, lines, missing
from services.billing.rating.currencies import DIGITS, nanos_per_minor, to_minor
from services.billing.rating.schemes import Fault, Scheme, SchemeTier, amount, check, half_even, part

T = SchemeTier
# 0–100 at 10, 101–1000 at 5, above at 1; a flat amount of 7 for entering the second tier.
TIERS = (T(100, Decimal(10)), T(1000, Decimal(5), 7), T(None, Decimal(1)))
CENTS = 10_000_000


@pytest.mark.parametrize(
    ("scheme", "quantity", "included", "expected", "derivation"),
    [
        ("per_unit", 0, 0, 0, "nothing used"),
        ("per_unit", 3, 0, 30, "3 × 10"),
        ("per_unit", 3, 3, 0, "all included"),
        ("per_unit", 4, 3, 10, "1 × 10"),
        ("flat", 0, 0, 0, "nothing used, so nothing is due"),
        ("flat", 1, 0, 500, "the flat amount"),
        ("flat", 999, 0, 500, "the flat amount once"),
        ("flat", 5, 5, 0, "all included"),
        ("graduated", 99, 0, 990, "99 × 10"),
        ("graduated", 100, 0, 1000, "100 × 10: the edge belongs to the lower tier"),
        ("graduated", 101, 0, 1012, "100 × 10 + 7 + 1 × 5"),
        ("graduated", 1000, 0, 5507, "100 × 10 + 7 + 900 × 5"),
        ("graduated", 1001, 0, 5508, "100 × 10 + 7 + 900 × 5 + 1 × 1"),
        ("graduated", 151, 50, 1012, "the allowance ends inside the first tier: 101 units remain"),
        ("graduated", 1050, 50, 5507, "the allowance straddles: 1000 units remain, the tiers count these"),
        ("volume", 99, 0, 990, "99 × 10"),
        ("volume", 100, 0, 1000, "100 × 10"),
        ("volume", 101, 0, 512, "101 × 5 + 7: cheaper than 100 units, which is how volume prices are"),
        ("volume", 1000, 0, 5007, "1000 × 5 + 7"),
        ("volume", 1001, 0, 1001, "1001 × 1"),
        ("volume", 1001, 1, 5007, "1000 units remain"),
    ],
)
def test_a_scheme_gives_the_amount_that_was_computed_by_hand(
    scheme: Scheme, quantity: int, included: int, expected: int, derivation: str
) -> None:
    tiers = (
        (T(None, Decimal(10)),) if scheme == "per_unit" else (T(None, Decimal(0), 500),) if scheme == "flat" else TIERS
    )
    assert amount(scheme, tiers, quantity, included=included) == expected, derivation


@pytest.mark.parametrize(
    ("quantity", "expected", "derivation"),
    [
        (0, 0, "nothing used"),
        (1, 900, "a package that was begun is paid"),
        (1000, 900, "exactly one package"),
        (1001, 1800, "two packages"),
        (2000, 1800, "exactly two: the tier ends at 2000"),
        (2001, 2500, "2 × 900 + 1 × 700"),
    ],
)
def test_packages_are_paid_whole(quantity: int, expected: int, derivation: str) -> None:
    tiers = (T(2000, Decimal(900)), T(None, Decimal(700)))
    assert amount("package", tiers, quantity, package_size=1000) == expected, derivation


def test_published_examples_are_reproduced() -> None:
    # docs.stripe.com/subscriptions/pricing-models/tiered-pricing: 1–5 units $7, 6–10 $6.50, above $6.
    stripe = (T(5, Decimal(700 * CENTS)), T(10, Decimal(650 * CENTS)), T(None, Decimal(600 * CENTS)))
    assert amount("volume", stripe, 6) == 3900 * CENTS
    assert amount("volume", stripe, 20) == 12000 * CENTS
    assert amount("volume", stripe, 25) == 15000 * CENTS
    # Graduated, the same page: 5 × 7 + 1 × 6.50 = 41.50; 5 × 7 + 5 × 6.50 + 10 × 6 = 127.50; … + 15 × 6 = 157.50.
    assert amount("graduated", stripe, 6) == 4150 * CENTS
    assert amount("graduated", stripe, 20) == 12750 * CENTS
    assert amount("graduated", stripe, 25) == 15750 * CENTS
    # getlago.com/docs/guide/plans/charges/charge-models/volume: 65,000 calls in a tier of $0.0006 and $10 cost $49.
    lago = (
        *(
            T(end, Decimal(unit), 1000 * CENTS)
            for end, unit in ((10_000, 10**6), (50_000, 800_000), (100_000, 600_000))
        ),
        T(None, Decimal(400_000), 1000 * CENTS),
    )
    assert amount("volume", lago, 65_000) == 4900 * CENTS
    # The page …/charge-models/package: $5 per 100 units, the first 100 free. 201 units cost $0 + $5 + $5.
    assert amount("package", (T(None, Decimal(500 * CENTS)),), 201, included=100, package_size=100) == 1000 * CENTS
    # zuplo.com/docs/articles/monetization/pricing-models (its rate cards are OpenMeter's): 15,000 units in tiers of
    # $0.10, $0.05 and $0.01 cost $100 + $450 + $50 graduated, and 15,000 × $0.01 by volume.
    zuplo = (T(1000, Decimal(10 * CENTS)), T(10_000, Decimal(5 * CENTS)), T(None, Decimal(CENTS)))
    assert amount("graduated", zuplo, 15_000) == 60_000 * CENTS
    assert amount("volume", zuplo, 15_000) == 15_000 * CENTS


@st.composite
def schemes(draw: st.DrawFn) -> tuple[Scheme, tuple[SchemeTier, ...], int]:
    scheme: Scheme = draw(st.sampled_from(("flat", "per_unit", "graduated", "volume", "package")))
    price = st.decimals(0, 10**6, places=6)
    flat = st.integers(0, 10**9)
    edges = sorted(draw(st.sets(st.integers(1, 5000), max_size=0 if scheme in ("flat", "per_unit") else 4)))
    tiers = tuple(T(edge, draw(price), draw(flat)) for edge in [*edges, None])
    return scheme, tiers, draw(st.integers(1, 700)) if scheme == "package" else 1


def oracle(scheme: Scheme, tiers: tuple[SchemeTier, ...], size: int, units: int) -> int:
    """Walks the units one by one (packages for the scheme package), in fractions."""
    if units <= 0:
        return 0
    if scheme == "flat":
        return tiers[0].flat_nanos
    total = Fraction(0)
    entered = set()
    if scheme == "volume":
        place = min(n for n, tier in enumerate(tiers) if tier.up_to is None or units <= tier.up_to)
        total = units * Fraction(tiers[place].unit_nanos) + tiers[place].flat_nanos
    else:
        for first in range(1, units + 1, size):
            # The first unit of a package decides its tier.
            place = min(n for n, tier in enumerate(tiers) if tier.up_to is None or first <= tier.up_to)
            total += Fraction(tiers[place].unit_nanos)
            entered.add(place)
        total += sum(tiers[n].flat_nanos for n in entered)
    return round(total)


@given(schemes(), st.integers(0, 6000), st.integers(0, 3000))
@settings(max_examples=600)
def test_every_scheme_equals_an_oracle_in_fractions(
    made: tuple[Scheme, tuple[SchemeTier, ...], int], quantity: int, included: int
) -> None:
    scheme, tiers, size = made
    check(scheme, tiers, size if scheme == "package" else None)
    found = amount(scheme, tiers, quantity, included=included, package_size=size)
    assert found == oracle(scheme, tiers, size, quantity - included)


@pytest.mark.parametrize(
    ("scheme", "tiers", "size", "field"),
    [
        ("graduated", (), None, "tiers"),
        ("per_unit", TIERS, None, "tiers"),
        ("graduated", (T(10, Decimal(1)), T(10, Decimal(1)), T(None, Decimal(1))), None, "tiers[1].up_to"),
        ("graduated", (T(10, Decimal(1)), T(5, Decimal(1)), T(None, Decimal(1))), None, "tiers[1].up_to"),
        ("volume", (T(None, Decimal(1)), T(None, Decimal(1))), None, "tiers[0].up_to"),
        ("volume", (T(10, Decimal(1)),), None, "tiers[0].up_to"),
        ("package", (T(None, Decimal(1)),), None, "package_size"),
        ("volume", (T(None, Decimal(1)),), 5, "package_size"),
    ],
)
def test_tiers_that_cannot_work_are_refused(
    scheme: Scheme, tiers: tuple[SchemeTier, ...], size: int | None, field: str
) -> None:
    with pytest.raises(Fault) as caught:
        check(scheme, tiers, size)
    assert caught.value.field == field


def test_minor_units_are_those_of_the_standard() -> None:
    # The package has list one of the maintenance agency, 2026. Funds, metals and codes for tests have no minor unit.
    theirs = {one.code: one.exponent for one in iso4217.Currency if one.exponent is not None}
    funds = {"BOV", "CHE", "CHW", "COU", "MXV", "USN"}
    # Replaced by EUR and XCG. Accounts may still have them.
    former = {"BGN": 2, "ANG": 2}
    assert {code: digits for code, digits in theirs.items() if code not in funds} | former == DIGITS


def test_halves_go_to_the_even_neighbour() -> None:
    assert [half_even(n, 2) for n in (-3, -1, 1, 3, 5)] == [-2, 0, 0, 2, 2]
    assert amount("per_unit", (T(None, Decimal("0.5")),), 1) == 0
    assert amount("per_unit", (T(None, Decimal("0.5")),), 3) == 2
    # Rounded once: 0.5 + 0.5 is 1, not 0 + 0.
    assert amount("graduated", (T(1, Decimal("0.5")), T(None, Decimal("0.5"))), 2) == 1


@given(st.integers(-(10**18), 10**18), st.integers(1, 10**12))
def test_rounding_equals_that_of_fractions(numerator: int, divisor: int) -> None:
    assert half_even(numerator, divisor) == round(Fraction(numerator, divisor))


def test_a_share_is_exact_to_the_second() -> None:
    # February 2028 has 29 days: 12 days 6 hours of 29 days of 29.00 is 12.25.
    assert part(29 * 10**9, 12 * 86_400 + 6 * 3600, 29 * 86_400) == 12_250_000_000
    assert part(100, 1, 3) + part(100, 2, 3) == 100


def test_minor_units_follow_the_currency() -> None:
    assert (DIGITS["JPY"], DIGITS["KWD"], DIGITS["USD"], DIGITS["CLF"]) == (0, 3, 2, 4)
    assert nanos_per_minor("JPY") == 10**9
    assert to_minor(1_500_000_000, "JPY") == 2
    assert to_minor(2_500_000_000, "JPY") == 2
    assert to_minor(1_234_500_000, "KWD") == 1234
    assert to_minor(-5_000_000, "USD") == 0
    assert to_minor(-15_000_000, "USD") == -2


@pytest.mark.parametrize(
    ("used", "days", "expected"),
    [
        # A whole month of 30 days: base 10 and 5 of usage; 35 are missing to 50.
        (5, 30, [10, 5, 35]),
        (40, 30, [10, 40]),
        (39, 30, [10, 39, 1]),
        # 12 of 30 days: base 4 and a commitment of 20.
        (1, 12, [4, 1, 15]),
        (16, 12, [4, 16]),
        (0, 12, [4, 0, 16]),
    ],
)
def test_a_commitment_fills_an_invoice_up(used: int, days: int, expected: list[int]) -> None:
    charge = PlanCharge("calls", "per_unit", [T(None, Decimal(1))])
    plan = Plan("Team", "USD", "month", base_nanos=10, charges=[charge], minimum_nanos=50)
    found = lines(
        plan, [MeteredQuantity("calls", "", "", "", False, used, 1)] if used else [], days * 86_400, 30 * 86_400
    )
    amounts = [line.amount_nanos for line in found]
    amounts.append(missing(plan, sum(amounts), days * 86_400, 30 * 86_400))
    assert [nanos for nanos in amounts if nanos] == [nanos for nanos in expected if nanos]
