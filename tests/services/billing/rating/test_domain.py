"""Rating: cost, verdicts, and the state of an account."""

from __future__ import annotations

import itertools
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.messages.billing import UsageRecorded
from services.billing.invoices.booking import most_creditable, share
from services.billing.invoices.store import Invoice
from services.billing.rating.currencies import nanos_per_minor, to_minor
from services.billing.rating.domain import (
    MAX_AMOUNT_NANOS,
    MAX_QUANTITY,
    NO_ACCOUNT,
    Account,
    Price,
    Tier,
    UsageContent,
    Verdict,
    cost,
    estimate,
    judge,
    provisional,
    settle,
)

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)
LONG_AGO = datetime(1970, 1, 1, tzinfo=UTC)


def price(version: int = 1, since: datetime = LONG_AGO, currency: str = "USD", **nanos: str) -> Price:
    return Price("openai/m", version, currency, since, {unit: Decimal(text) for unit, text in nanos.items()})


CHAT = price(input_tokens="150", cached_tokens="75", output_tokens="600")


def used(
    usage_id: str = "run/1/1", occurred_at: datetime = NOW, tenant_id: str = "t", **quantities: int
) -> UsageRecorded:
    return UsageRecorded(
        tenant_id=tenant_id, usage_id=usage_id, resource="openai/m", quantities=quantities, occurred_at=occurred_at
    )


def verdict_on(record: UsageRecorded, *prices: Price, currency: str | None = "USD") -> Verdict:
    return judge(record, currency, prices or (CHAT,), NOW)


def test_cached_tokens_are_part_of_the_input_and_charged_at_their_own_price() -> None:
    assert cost(CHAT, {"input_tokens": 1000, "cached_tokens": 400, "output_tokens": 10}) == 600 * 150 + 400 * 75 + 6000


def test_cached_tokens_cost_as_much_as_other_input_if_they_have_no_price_or_are_not_reported() -> None:
    plain = price(input_tokens="150", output_tokens="600")
    assert cost(plain, {"input_tokens": 1000, "cached_tokens": 400, "output_tokens": 0}) == 150_000
    assert cost(CHAT, {"input_tokens": 1000, "output_tokens": 0}) == 150_000


def test_reasoning_is_part_of_the_output_and_not_charged_twice() -> None:
    assert cost(CHAT, {"input_tokens": 0, "output_tokens": 100, "reasoning_tokens": 90}) == 60_000
    apart = price(input_tokens="1", output_tokens="600", reasoning_tokens="100")
    assert cost(apart, {"input_tokens": 0, "output_tokens": 100, "reasoning_tokens": 90}) == 10 * 600 + 90 * 100


def test_a_large_request_goes_by_its_tier_with_all_of_its_tokens() -> None:
    tiered = Price("m", 1, "USD", LONG_AGO, CHAT.nanos, (Tier(200_000, {"input_tokens": Decimal(300)}),))
    assert cost(tiered, {"input_tokens": 200_000, "output_tokens": 0}) == 200_000 * 150
    assert cost(tiered, {"input_tokens": 200_001, "output_tokens": 0}) == 200_001 * 300


@pytest.mark.parametrize(("tokens", "nanos"), [(1, 0), (3, 2), (5, 2), (7, 4), (2, 1)])
def test_halves_are_rounded_to_even_once_per_record(tokens: int, nanos: int) -> None:
    half = price(input_tokens="0.5", output_tokens="0.5")
    assert cost(half, {"input_tokens": tokens, "output_tokens": 0}) == nanos
    # If each part were rounded alone, the sum would be 0.
    assert cost(half, {"input_tokens": 1, "output_tokens": 1}) == 1


def test_huge_counts_and_tiny_prices_stay_exact() -> None:
    tiny = price(input_tokens="0.000000000000000001", output_tokens="999999999999.999999999999999999")
    quantities = {"input_tokens": MAX_QUANTITY, "output_tokens": MAX_QUANTITY}
    assert cost(tiny, quantities) == 10**24


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (used(input_tokens=10), "output_tokens was not reported, and openai/m@1 needs it"),
        (used(), "input_tokens was not reported, and openai/m@1 needs it"),
        (used(input_tokens=1, output_tokens=1, frames=2), "no price has a unit 'frames'"),
    ],
)
def test_a_record_that_cannot_be_rated_is_held_and_never_free(record: UsageRecorded, reason: str) -> None:
    assert verdict_on(record) == Verdict("held", reason, None)


def test_a_unit_without_a_price_need_not_be_reported() -> None:
    assert verdict_on(used(input_tokens=1), price(input_tokens="2")).amount_nanos == 2
    assert verdict_on(used(calls=3, bytes=10**9), price(calls="7", bytes="0")).amount_nanos == 21


def test_an_unknown_model_and_an_unknown_tenant_are_held() -> None:
    record = used(input_tokens=1, output_tokens=1)
    assert judge(record, "USD", (), NOW) == Verdict("held", "the price book does not know openai/m", None)
    assert judge(record, None, (CHAT,), NOW) == Verdict("held", NO_ACCOUNT, None)


def test_without_an_exchange_rate_a_foreign_account_is_held_unless_the_book_has_its_currency() -> None:
    record = used(input_tokens=1, output_tokens=1)
    held = verdict_on(record, CHAT, currency="EUR")
    assert held.kind == "held"
    assert held.reason == "no exchange rate: openai/m is priced in USD, the account is in EUR"
    # Nothing needs no exchange rate, unless another currency has a price.
    free, tiered = price(calls="0"), Price("openai/m", 2, "USD", NOW, {}, (Tier(9, {"calls": Decimal(1)}),))
    assert verdict_on(used(calls=3), free, currency="EUR") == Verdict("counted", "", 0, "openai/m@1")
    for other in (price(2, currency="JPY", calls="1"), tiered):
        assert verdict_on(used(calls=3), free, other, currency="EUR").kind == "held"
    euros = price(2, currency="EUR", input_tokens="1", output_tokens="1")
    assert verdict_on(record, CHAT, euros, currency="EUR") == Verdict("counted", "", 2, "openai/m@2")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (used(input_tokens=-1, output_tokens=1), "implausible: quantities.input_tokens is -1"),
        (used(input_tokens=10**30, output_tokens=1), f"implausible: quantities.input_tokens is {10**30}"),
        (
            used(input_tokens=5, cached_tokens=6, output_tokens=1),
            "implausible: quantities.input_tokens is less than its cached_tokens",
        ),
        (
            used(input_tokens=5, output_tokens=1, reasoning_tokens=2),
            "implausible: quantities.output_tokens is less than its reasoning_tokens",
        ),
        (
            used(occurred_at=NOW + timedelta(hours=2), input_tokens=1, output_tokens=1),
            "implausible: occurred_at is in the future",
        ),
        (
            used(occurred_at=NOW - timedelta(days=365), input_tokens=1, output_tokens=1),
            "implausible: occurred_at is more than 45 days ago",
        ),
        (
            used(input_tokens=0, output_tokens=0),
            "no use was reported: all quantities are 0, and openai/m@1 has a price",
        ),
    ],
)
def test_an_implausible_record_is_held_with_the_reason(record: UsageRecorded, reason: str) -> None:
    assert verdict_on(record) == Verdict("held", reason, None)


def test_a_petabyte_of_stored_hours_is_billed() -> None:
    storage = price(storage_byte_hours="0.0001")
    counted = verdict_on(used(storage_byte_hours=10**16), storage)
    assert (counted.kind, counted.amount_nanos) == ("counted", 10**12)
    held = verdict_on(used(storage_byte_hours=10**16 + 1), storage)
    assert held == Verdict("held", f"implausible: quantities.storage_byte_hours is {10**16 + 1}", None)


def test_a_cost_beyond_the_limit_is_held() -> None:
    held = verdict_on(used(calls=10**10), price(calls="1000000"))
    assert held == Verdict("held", f"implausible: it would cost {10**16} nano-units by openai/m@1", None)


def test_a_resource_without_cost_may_report_zero() -> None:
    assert verdict_on(used(input_tokens=0), price(input_tokens="0")) == Verdict("counted", "", 0, "openai/m@1")


def test_the_provisional_amount_of_an_unpriced_resource_is_high() -> None:
    quantities = {"input_tokens": 1000, "output_tokens": 1000}
    assert provisional(quantities, "USD") == 400_000_000
    assert provisional(quantities, "JPY") == 400_000_000 * 3_000
    assert provisional(quantities, "XAU") == MAX_AMOUNT_NANOS
    assert provisional(quantities, "USD") > 500 * cost(CHAT, quantities)
    assert provisional({"calls": 1}, "USD") == 100_000_000


def test_the_version_counts_that_was_valid_when_the_use_occurred() -> None:
    first = price(1, input_tokens="10", output_tokens="0")
    second = price(2, NOW - timedelta(days=2), input_tokens="20", output_tokens="0")
    corrected = price(3, NOW - timedelta(days=2), input_tokens="30", output_tokens="0")

    def name(days_ago: int, *prices: Price) -> str | None:
        return verdict_on(used(occurred_at=NOW - timedelta(days=days_ago), input_tokens=1), *prices).price_version

    assert name(3, first, second, corrected) == "openai/m@1"
    assert name(2, second, first) == "openai/m@2"
    assert name(1, corrected, first, second) == "openai/m@3"
    assert name(5, second) is None, "before its first version a resource has no price"


def test_an_estimate_counts_missing_units_as_zero_and_refuses_implausible_quantities() -> None:
    assert estimate((CHAT,), "USD", {"output_tokens": 100}, NOW) == 60_000
    assert estimate((), "USD", {"output_tokens": 100}, NOW) is None
    with pytest.raises(ValueError, match="output_tokens is -1"):
        estimate((CHAT,), "USD", {"output_tokens": -1}, NOW)
    with pytest.raises(ValueError, match="would cost"):
        estimate((price(calls="1000000"),), "USD", {"calls": 10**10}, NOW)


def test_the_first_record_of_a_usage_id_counts_and_a_different_one_is_reported() -> None:
    records = [
        used(input_tokens=1, output_tokens=1),
        used(input_tokens=1, output_tokens=1),
        used(input_tokens=2, output_tokens=1),
        used("run/1/2", input_tokens=1, output_tokens=1),
        used(tenant_id="other", input_tokens=1, output_tokens=1),
    ]
    verdicts = settle(records, {}, {"t": "USD", "other": "USD"}, {"openai/m": (CHAT,)}, NOW)
    assert [verdict.kind for verdict in verdicts] == ["counted", "duplicate", "duplicate", "counted", "counted"]
    assert verdicts[1].reason == "reported before"
    assert "has other content; the earlier record counts" in verdicts[2].reason
    assert [verdict.amount_nanos for verdict in verdicts] == [750, 0, 0, 750, 750]


@pytest.mark.parametrize(
    ("debited", "amount", "passed"),
    [
        (0, 89, []),
        (0, 90, ["nearly_spent"]),
        (90, 9, []),
        (90, 10, ["exhausted"]),
        (0, 500, ["nearly_spent", "exhausted"]),
        (100, 50, []),
    ],
)
def test_a_threshold_of_the_credit_is_passed_once(debited: int, amount: int, passed: list[str]) -> None:
    after, found = Account(100, debited).debit(amount)
    assert found == passed
    assert after == Account(100, debited + amount)


def test_without_a_limit_nothing_is_ever_exhausted() -> None:
    assert Account(None, 0).debit(10**15) == (Account(None, 10**15), [])
    assert Account(None, 5).balance_nanos is None


RECORDS = st.lists(
    st.builds(
        UsageRecorded,
        tenant_id=st.sampled_from(["a", "b", "without account"]),
        usage_id=st.sampled_from([f"run/{n}" for n in range(12)]),
        resource=st.sampled_from(["openai/m", "unknown/m"]),
        quantities=st.dictionaries(
            st.sampled_from(["input_tokens", "cached_tokens", "output_tokens", "calls"]),
            st.one_of(st.integers(0, 10**6), st.just(MAX_QUANTITY + 1)),
        ),
        occurred_at=st.sampled_from([NOW, NOW + timedelta(days=2)]),
    ),
    max_size=40,
)


@given(records=RECORDS, cuts=st.lists(st.integers(0, 40)))
def test_however_records_are_batched_each_gets_one_verdict_and_each_debit_one_cause(
    records: list[UsageRecorded], cuts: list[int]
) -> None:
    currencies, prices = {"a": "USD", "b": "EUR"}, {"openai/m": (CHAT,)}
    at_once = settle(records, {}, currencies, prices, NOW)
    seen: dict[tuple[str, str], UsageContent] = {}
    edges = sorted({0, len(records), *(cut for cut in cuts if cut < len(records))})
    batched = [
        verdict
        for begin, end in itertools.pairwise(edges)
        for verdict in settle(records[begin:end], seen, currencies, prices, NOW)
    ]

    assert batched == at_once
    assert sum(Counter(verdict.kind for verdict in batched).values()) == len(records)
    firsts = [verdict for verdict in batched if verdict.kind != "duplicate"]
    assert len(firsts) == len({(record.tenant_id, record.usage_id) for record in records})
    accounts = {"a": Account(10**9, 0), "b": Account(None, 0)}
    ledger = {"a": 10**9, "b": 0}
    thresholds: list[str] = []
    for record, verdict in zip(records, batched, strict=True):
        assert (verdict.amount_nanos is None) == (verdict.kind == "held")
        assert (verdict.price_version is not None) == (verdict.kind == "counted")
        if verdict.amount_nanos:
            assert verdict.kind == "counted"
            accounts[record.tenant_id], passed = accounts[record.tenant_id].debit(verdict.amount_nanos)
            ledger[record.tenant_id] -= verdict.amount_nanos
            thresholds += passed
    assert ledger["a"] == accounts["a"].balance_nanos
    assert ledger["b"] == -accounts["b"].debited_nanos == 0, "an account in euros has no rate for dollars"
    assert len(thresholds) == len(set(thresholds))


@given(st.sampled_from(["USD", "JPY", "KWD"]), st.integers(1, 10**8), st.integers(0, 270), st.data())
def test_the_largest_credit_note_takes_back_at_most_the_unspent_credit(
    currency: str, net: int, per_mille: int, data: st.DataObject
) -> None:
    subtotal = net * nanos_per_minor(currency)
    total = to_minor(subtotal + subtotal * per_mille // 1000, currency)
    credited = data.draw(st.integers(0, total))
    sold = Invoice.model_construct(subtotal_nanos=subtotal, total_minor=total, credited_minor=credited)
    unspent = data.draw(st.integers(0, subtotal))
    most = most_creditable(sold, unspent)
    assert 0 <= most <= total - credited
    assert share(sold, subtotal, most) <= unspent
    assert most == total - credited or share(sold, subtotal, most + 1) > unspent
