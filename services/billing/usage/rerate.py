"""Re-rating: rates counted usage again with the current versions of its prices, and books the signed differences.

A record keeps its charge. Each difference is a correction, kept once for a record and a price version, so a repeated
run books nothing. Corrections are debited in the account's ledger, and are summed in the open period of the usage's
subscription, so that they are on its next invoice.

A record is left out if its invoice is void, was written off or has credit notes, or if a charge of it was corrected by
hand: the difference of its prices is not the amount that is owed. So is one that has no cost by the new price. The
operator decides about those records.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from pydantic import BaseModel

from infra.clock import utcnow
from infra.errors import InvalidMessage, NotFound
from infra.postgres.database import Database
from infra.postgres.tx import Tx
from services.billing.credit import accounts, budgets
from services.billing.credit.accounts import Entry
from services.billing.plans import subscriptions
from services.billing.rating import price_book
from services.billing.rating.domain import MAX_AMOUNT_NANOS, NotReported, Price, cost, valid_at
from services.billing.usage import aggregates, retention

# Records of one transaction.
PAGE = 2_000


class PriceDifference(BaseModel):
    """All records of a tenant and resource that go from one price version to another."""

    tenant_id: str
    resource: str
    from_version: str
    to_version: str
    records: int
    difference_nanos: int
    """Above zero: charged in addition. Below zero: given back."""


class UnbookedDifference(PriceDifference):
    """Records whose difference is not booked. A credit note or a correction can give an amount back. `difference_nanos`
    is 0 if they have no cost by the new price."""

    invoice_number: str | None
    """Null: no invoice is the reason."""
    reason: str


class Rerated(BaseModel):
    dry_run: bool
    records: int
    """Records that were looked at."""
    changed: int
    difference_nanos: int
    items: list[PriceDifference]
    left_out: list[UnbookedDifference]
    """Not in `changed`, `difference_nanos` and `items`."""


class _Use(NamedTuple):
    usage_id: str
    resource: str
    quantities: dict[str, int]
    occurred_at: datetime
    version: str
    """The version of the last correction, or of the charge."""
    booked: int
    """The charge and all corrections by re-rating."""
    period: int
    """0: none."""
    later_periods: list[int]
    """Of the corrections."""
    corrected_by_hand: bool


class _Obstacle(NamedTuple):
    """Why a difference is not booked."""

    invoice_number: str | None
    reason: str


class _Change(NamedTuple):
    use: _Use
    version: str
    nanos: int
    obstacle: _Obstacle | None


async def rerate(
    database: Database, since: datetime, until: datetime, tenant_id: str | None, *, dry_run: bool, actor: str
) -> Rerated:
    """Rates the records from `since` (inclusive) until `until` (exclusive) again, in pages of one transaction each.

    Raises InvalidMessage if records since then may be deleted: they cannot be rated again. Raises NotFound if the
    tenant has no account.
    """
    if since < (kept := retention.kept_since(utcnow())):
        raise InvalidMessage("from", f"must be at or after {kept.isoformat()}; older records are deleted")
    async with database.begin() as tx:
        tenants = await tx.sql(
            """
            SELECT tenant_id
            FROM account
            WHERE $1::text IS NULL OR tenant_id = $1
            ORDER BY tenant_id
            """,
            tenant_id,
        )
    if tenant_id is not None and not tenants:
        raise NotFound(f"tenant {tenant_id} has no account")
    looked = 0
    found: dict[tuple[str, str, str, str, _Obstacle | None], list[int]] = {}
    for (tenant,) in tenants:
        after = (since, "")
        while True:
            async with database.begin(tenant_id=tenant) as tx:
                currency, _ = await accounts.lock_one(tx, tenant)
                uses = await _page(tx, tenant, after, until)
                changes = await _changes(tx, tenant, uses, currency)
                if not dry_run and (free := [change for change in changes if not change.obstacle]):
                    await _book(tx, tenant, free, actor)
            looked += len(uses)
            for use, version, nanos, obstacle in changes:
                found.setdefault((tenant, use.resource, use.version, version, obstacle), []).append(nanos)
            if len(uses) < PAGE:
                break
            after = (uses[-1].occurred_at, uses[-1].usage_id)
    items: list[PriceDifference] = []
    left_out: list[UnbookedDifference] = []
    for (tenant, resource, before, now, obstacle), all_nanos in sorted(found.items(), key=lambda item: item[0][:4]):
        difference = PriceDifference(
            tenant_id=tenant,
            resource=resource,
            from_version=before,
            to_version=now,
            records=len(all_nanos),
            difference_nanos=sum(all_nanos),
        )
        if obstacle:
            left_out.append(UnbookedDifference(**difference.model_dump(), **obstacle._asdict()))
        else:
            items.append(difference)
    return Rerated(
        dry_run=dry_run,
        records=looked,
        changed=sum(item.records for item in items),
        difference_nanos=sum(item.difference_nanos for item in items),
        items=items,
        left_out=left_out,
    )


async def _page(tx: Tx, tenant_id: str, after: tuple[datetime, str], until: datetime) -> list[_Use]:
    rows = await tx.sql(
        """
        SELECT u.usage_id, u.resource, u.quantities, u.occurred_at,
               coalesce((SELECT c.price_version FROM usage_correction AS c
                         WHERE c.tenant_id = u.tenant_id AND c.usage_id = u.usage_id
                         ORDER BY c.made_at DESC LIMIT 1), u.price_version, ''),
               u.amount_nanos + coalesce((SELECT sum(c.nanos) FROM usage_correction AS c
                                          WHERE c.tenant_id = u.tenant_id AND c.usage_id = u.usage_id), 0)::bigint,
               u.period,
               ARRAY(SELECT c.period FROM usage_correction AS c
                     WHERE c.tenant_id = u.tenant_id AND c.usage_id = u.usage_id),
               EXISTS (SELECT FROM ledger_entry AS l
                       WHERE l.tenant_id = u.tenant_id AND l.usage_id = u.usage_id AND l.kind = 'correction'
                         AND l.price_version IS NULL)
        FROM usage AS u
        WHERE u.tenant_id = $1 AND u.verdict = 'counted' AND (u.occurred_at, u.usage_id) > ($2, $3)
          AND u.occurred_at < $4
        ORDER BY u.occurred_at, u.usage_id
        LIMIT $5
        """,
        tenant_id,
        *after,
        until,
        PAGE,
    )
    return [_Use(*row) for row in rows]


async def _changes(tx: Tx, tenant_id: str, uses: Sequence[_Use], currency: str) -> list[_Change]:
    prices = await price_book.versions(tx, {use.resource for use in uses})
    obstacles = await _obstacles(tx, tenant_id)
    found = []
    for use in uses:
        price = valid_at(prices.get(use.resource, ()), currency, use.occurred_at)
        if price is None or price.name == use.version:
            continue
        now, obstacle = _cost(price, use)
        if obstacle is None and now == use.booked:
            continue
        if obstacle is None:
            periods = (use.period, *use.later_periods)
            obstacle = next((obstacles[period] for period in periods if period in obstacles), None)
        if use.corrected_by_hand:
            obstacle = _Obstacle(None, "a charge of it was corrected by hand")
        found.append(_Change(use, price.name, now - use.booked, obstacle))
    return found


async def _obstacles(tx: Tx, tenant_id: str) -> dict[int, _Obstacle]:
    """Returns the periods whose invoices were ended, or taken back in part."""
    rows = await tx.sql(
        """
        SELECT period, number, CASE status
            WHEN 'void' THEN 'the invoice is void'
            WHEN 'uncollectible' THEN 'the invoice was written off'
            ELSE 'the invoice has credit notes'
        END
        FROM invoice AS i
        WHERE tenant_id = $1 AND purpose = 'usage' AND (status IN ('void', 'uncollectible') OR credited_minor > (
            -- Those that give corrections by re-rating are in the booked amounts.
            SELECT coalesce(sum(n.amount_minor), 0)
            FROM credit_note AS n
            WHERE n.tenant_id = i.tenant_id AND n.invoice_id = i.invoice_id AND n.corrections_nanos <> 0
        ))
        """,
        tenant_id,
    )
    return {period: _Obstacle(number, reason) for period, number, reason in rows}


def _cost(price: Price, use: _Use) -> tuple[int, _Obstacle | None]:
    """Returns the cost by the price. With an obstacle the record has none, and keeps its charge."""
    try:
        amount = cost(price, use.quantities)
    except NotReported as unit:
        return use.booked, _Obstacle(None, f"{unit} was not reported, and the price needs it")
    if amount > MAX_AMOUNT_NANOS:
        return use.booked, _Obstacle(None, f"it would cost more than {MAX_AMOUNT_NANOS} nano-units")
    return amount, None


async def _book(tx: Tx, tenant_id: str, changes: Sequence[_Change], actor: str) -> None:
    periods = await subscriptions.place_corrections(tx, tenant_id, [change.use.period for change in changes])
    await tx.sql(
        """
        INSERT INTO usage_correction (tenant_id, usage_id, price_version, nanos, period)
        SELECT $1, n.usage_id, n.version, n.nanos, n.period
        FROM unnest($2::text[], $3::text[], $4::bigint[], $5::bigint[]) AS n(usage_id, version, nanos, period)
        """,
        tenant_id,
        [change.use.usage_id for change in changes],
        [change.version for change in changes],
        [change.nanos for change in changes],
        periods,
    )
    await tx.sql(
        """
        INSERT INTO period_correction AS c (tenant_id, period, usage_period, nanos)
        SELECT $1, n.period, n.usage_period, sum(n.nanos)::bigint
        FROM unnest($2::bigint[], $3::bigint[], $4::bigint[]) AS n(period, usage_period, nanos)
        GROUP BY n.period, n.usage_period
        ORDER BY n.period, n.usage_period
        ON CONFLICT (tenant_id, period, usage_period) DO UPDATE SET nanos = c.nanos + excluded.nanos
        """,
        tenant_id,
        periods,
        [change.use.period for change in changes],
        [change.nanos for change in changes],
    )
    await budgets.correct(tx, tenant_id, [(change.use.usage_id, change.nanos) for change in changes])
    await aggregates.add_corrections(tx, tenant_id, [(change.use.usage_id, change.version) for change in changes])
    await accounts.debit(
        tx,
        [
            Entry(
                tenant_id,
                "correction",
                -change.nanos,
                change.use.usage_id,
                change.version,
                reason=f"rated again: {change.use.version} is now {change.version}",
                actor=actor,
                period=period,
            )
            for change, period in zip(changes, periods, strict=True)
        ],
    )
