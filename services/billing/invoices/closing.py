"""Closes periods of subscriptions: each becomes the draft of an invoice.

A period is closed once, under the lock of the tenant's account; its draft has all its lines at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from zoneinfo import ZoneInfo

import msgspec

from infra.clock import utcnow, uuid7
from infra.errors import Conflict
from infra.postgres.tx import Tx
from services.billing.credit import accounts
from services.billing.credit.accounts import MAX_CREDIT_NANOS
from services.billing.invoices import store as invoices
from services.billing.invoices import tax
from services.billing.invoices.store import Invoice
from services.billing.plans import plans, subscriptions
from services.billing.plans.plans import DraftLine, MeteredQuantity, Plan
from services.billing.plans.subscriptions import Period
from services.billing.rating.currencies import to_minor


async def close(tx: Tx, tenant_id: str, until: datetime, seller_country: str) -> list[Invoice]:
    """Closes the tenant's periods that have ended at or before `until` and makes their drafts."""
    currency, _ = await accounts.lock_one(tx, tenant_id)
    await subscriptions.extend(tx, tenant_id, utcnow())
    found = []
    for period in await subscriptions.due(tx, tenant_id, min(until, utcnow())):
        found.append(await _draft(tx, tenant_id, currency, period, seller_country))
    return found


async def _draft(tx: Tx, tenant_id: str, currency: str, period: Period, seller_country: str) -> Invoice:
    plan = await plans.version(tx, period.plan_id, period.plan_version)
    usage = await metered(tx, tenant_id, period.period)
    lines = plans.lines(plan, usage, period.seconds, period.full_seconds)
    # Also before the sum is stored: the database would refuse it without the period.
    subtotal = _subtotal(period, lines)
    lines += await _commitments(tx, tenant_id, period, plan, subtotal)
    # After the commitment, which would take back the amounts that they give.
    lines += await _by_hand(tx, tenant_id, period.period)
    subtotal = _subtotal(period, lines)
    invoice_id = uuid7()
    found = await tax.at(tx, await tax.buyer(tx, tenant_id), seller_country, period.ends)
    tax_nanos = tax.on(subtotal, found.percent)
    await tx.sql(
        """
        INSERT INTO invoice (tenant_id, invoice_id, period, status, currency, begins, ends, subtotal_nanos, tax_nanos,
                             tax_note, total_minor, time_zone)
        VALUES ($1, $2, $3, 'draft', $4, $5, $6, $7, $8, $9, $10, $11)
        """,
        tenant_id,
        invoice_id,
        period.period,
        currency,
        period.begins,
        period.ends,
        subtotal,
        tax_nanos,
        found.note,
        to_minor(subtotal + tax_nanos, currency),
        (await subscriptions.get(tx, tenant_id, period.subscription_id)).time_zone,
    )
    await tx.sql(
        """
        INSERT INTO invoice_line (tenant_id, invoice_id, line, line_id, description, quantity, unit_nanos, amount_nanos,
                                  begins, ends, source)
        SELECT $1, $2, n.line, n.line_id, n.description, n.quantity::numeric, n.unit_nanos, n.amount_nanos, $3, $4,
               n.source
        FROM unnest($5::int[], $6::uuid[], $7::text[], $8::text[], $9::text[], $10::bigint[], $11::text[])
             AS n(line, line_id, description, quantity, unit_nanos, amount_nanos, source)
        """,
        tenant_id,
        invoice_id,
        period.begins,
        period.ends,
        list(range(1, len(lines) + 1)),
        [uuid7() for _ in lines],
        [line.description for line in lines],
        [str(line.quantity) for line in lines],
        [line.unit_nanos for line in lines],
        [line.amount_nanos for line in lines],
        [msgspec.json.encode(line.source).decode() for line in lines],
    )
    await tx.sql(
        "UPDATE period SET closed_at = clock_timestamp() WHERE tenant_id = $1 AND period = $2", tenant_id, period.period
    )
    return await invoices.get(tx, tenant_id, invoice_id)


def _subtotal(period: Period, lines: Sequence[DraftLine]) -> int:
    """The sum of the lines. Raises Conflict if it, or one of them, is above the largest amount of the books."""
    amounts = [line.amount_nanos for line in lines]
    if max(sum(amounts), *amounts, 0) > MAX_CREDIT_NANOS:
        raise Conflict(
            f"the invoice of the period from {period.begins.isoformat()} is above {MAX_CREDIT_NANOS} nano-units"
        )
    return sum(amounts)


async def _commitments(tx: Tx, tenant_id: str, period: Period, plan: Plan, amount_nanos: int) -> list[DraftLine]:
    """Returns the line up to the period's commitment, and the changes of those of earlier periods by corrections of
    their usage, which are on this invoice. `amount_nanos`: the sum of the other lines."""
    corrected: list[tuple[int, int]] = []
    if plan.usage_markup_percent is not None:
        rows = await tx.sql(
            """
            SELECT usage_period, nanos
            FROM period_correction
            WHERE tenant_id = $1 AND period = $2 AND usage_period <> $2
            ORDER BY usage_period
            """,
            tenant_id,
            period.period,
        )
        corrected = [(number, plans.with_markup(nanos, plan.usage_markup_percent)) for number, nanos in rows]
    counted = amount_nanos - sum(nanos for _, nanos in corrected)
    await _count(tx, tenant_id, period.period, counted)
    found = []
    if missing := plans.missing(plan, counted, period.seconds, period.full_seconds):
        share = plans.share(period.seconds, period.full_seconds)
        found.append(DraftLine(f"{plan.name}: up to the commitment{share}", 1, str(missing), missing, {}))
    for number, nanos in corrected:
        before = await subscriptions.by_number(tx, tenant_id, number) if number else None
        if before is None or before.counted_nanos is None:
            continue
        committed = await plans.version(tx, before.plan_id, before.plan_version)
        was, now = (
            plans.missing(committed, amount, before.seconds, before.full_seconds)
            for amount in (before.counted_nanos, before.counted_nanos + nanos)
        )
        await _count(tx, tenant_id, number, before.counted_nanos + nanos)
        if now != was:
            zone = ZoneInfo((await subscriptions.get(tx, tenant_id, before.subscription_id)).time_zone)
            begins = before.begins.astimezone(zone)
            text = f"{committed.name}: commitment from {begins:%Y-%m-%d} on, after corrections"
            found.append(DraftLine(text, 1, "", now - was, {"usage_period": str(number)}))
    return found


async def _by_hand(tx: Tx, tenant_id: str, period: int) -> list[DraftLine]:
    """Returns the corrections by hand of a period."""
    rows = await tx.sql(
        """
        SELECT reason, -amount_nanos
        FROM ledger_entry
        WHERE tenant_id = $1 AND period = $2 AND kind = 'correction' AND price_version IS NULL
        ORDER BY entry
        """,
        tenant_id,
        period,
    )
    return [DraftLine(f"Correction: {reason}", 1, str(nanos), nanos, {}) for reason, nanos in rows]


async def _count(tx: Tx, tenant_id: str, number: int, nanos: int) -> None:
    await tx.sql("UPDATE period SET counted_nanos = $3 WHERE tenant_id = $1 AND period = $2", tenant_id, number, nanos)


async def metered(tx: Tx, tenant_id: str, period: int) -> list[MeteredQuantity]:
    """Returns the sums of the period's usage. It reads buckets only, so its cost does not grow with the records."""
    rows = await tx.sql(
        """
        SELECT meter, resource, agent_id, channel_id, late, sum(quantity)::text, sum(records)::bigint
        FROM usage_bucket
        WHERE tenant_id = $1 AND period = $2
        GROUP BY 1, 2, 3, 4, 5
        ORDER BY 1, 2, 3, 4, 5
        """,
        tenant_id,
        period,
    )
    return [
        MeteredQuantity(meter, model, agent, channel, late, int(quantity), records)
        for meter, model, agent, channel, late, quantity, records in rows
    ]
