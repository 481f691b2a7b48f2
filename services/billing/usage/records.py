"""Usage records: the first record of each usage_id with its verdict in ``usage``, repeated ones in ``duplicate``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import msgspec
from sqlalchemy.exc import IntegrityError

from infra.clock import utcnow
from infra.errors import InvalidMessage, Transient
from infra.postgres.tx import Tx
from protos.messages.billing import UsageRecorded
from services.billing.credit import accounts, budgets, holds
from services.billing.credit.accounts import Entry
from services.billing.plans import subscriptions
from services.billing.plans.subscriptions import NOWHERE, Place
from services.billing.rating import price_book
from services.billing.rating.domain import UsageContent, Verdict, judge, settle
from services.billing.usage import aggregates, batch_sums
from services.billing.usage import labels as usage_labels
from services.billing.usage.batch_sums import Counted

# Reads only, in one round trip. OFFSET keeps one look-up by key for each record, as in `aggregates.ADDED`.
_RATE = f"""
SELECT ARRAY({accounts.CURRENCIES.format("$1")}),
       ARRAY({price_book.PRICES.format("$2")}),
       ARRAY(
           SELECT ROW(u.tenant_id, u.usage_id, u.resource, u.quantities)
           FROM unnest(string_to_array((SELECT $3), E'\\x1f'), string_to_array($4, E'\\x1f')) AS n(tenant, id)
           CROSS JOIN LATERAL (SELECT * FROM usage WHERE tenant_id = n.tenant AND usage_id = n.id OFFSET 0) AS u
       )
"""
# Adds counted records to their buckets and budgets, which no other transaction changes: the accounts are locked.
_ADD = f"WITH bucketed AS ({aggregates.ADDED}), used AS ({budgets.USED}) {budgets.SPENT}"
_ADD_BATCH = f"WITH bucketed AS ({aggregates.BATCH_ADDED}), used AS ({budgets.USED}) {budgets.SPENT}"
_RECORD = Path(__file__).with_name("record_usage.sql").read_text()
# Separates the values of a column in a parameter. JSON text never contains it unescaped.
_SEPARATOR = "\x1f"
_UNSTORABLE = str.maketrans({"\x00": "\\x00", _SEPARATOR: "\\x1f"})
_encoder = msgspec.json.Encoder(order="sorted")


async def rate(tx: Tx, records: Sequence[UsageRecorded]) -> list[Verdict]:
    """Rates new records, and finds the ones whose usage_id was recorded before.

    Raises InvalidMessage for ids that cannot be stored.
    """
    tenant_ids = _column("tenant_id", [record.tenant_id for record in records])
    usage_ids = _column("usage_id", [record.usage_id for record in records])
    _column("resource", [record.resource for record in records])
    tenants, resources = sorted({record.tenant_id for record in records}), {record.resource for record in records}
    [(accounts_found, prices, used)] = await tx.sql(
        _RATE, tenants, price_book.names_of(resources), tenant_ids, usage_ids
    )
    currencies = await accounts.with_opened(tx, tenants, dict(accounts_found))
    seen = {(tenant_id, id_): UsageContent(resource, counts) for tenant_id, id_, resource, counts in used}
    return settle(records, seen, currencies, price_book.versions_of(resources, prices), utcnow())


async def record(
    tx: Tx, records: Sequence[UsageRecorded], verdicts: Sequence[Verdict], span_ids: Sequence[str]
) -> list[tuple[str, int]]:
    """Stores records with their verdicts, debits the counted ones and closes the holds that they name.

    span_ids: the spans in which the records were rated. Empty: not traced.
    Returns the currency and the debit in nano-units of each account that was debited.
    """
    places = await _places(tx, records, verdicts)
    now = utcnow()
    found = await usage_labels.bounded(tx, records, now)
    session_keys = [(item.session_key or "").translate(_UNSTORABLE) for item in records]
    columns: tuple[Sequence[str], ...] = (
        [item.tenant_id for item in records],
        [item.usage_id for item in records],
        [tx.origins[id(item)]["ce_id"] for item in records],
        [item.resource for item in records],
        [_encoder.encode(item.quantities).decode() for item in records],
        [item.occurred_at.isoformat() for item in records],
        ["t" if item.estimated else "f" for item in records],
        [item.run_id.hex if item.run_id else "" for item in records],
        [item.hold_id.hex if item.hold_id else "" for item in records],
        [verdict.kind for verdict in verdicts],
        [verdict.reason and verdict.reason.translate(_UNSTORABLE) for verdict in verdicts],
        ["" if verdict.amount_nanos is None else str(verdict.amount_nanos) for verdict in verdicts],
        [verdict.price_version or "" for verdict in verdicts],
        span_ids,
        ["" if item.agent_id is None else str(item.agent_id) for item in records],
        ["" if item.channel_id is None else str(item.channel_id) for item in records],
        session_keys,
        [(item.api_key_id or "").translate(_UNSTORABLE) for item in records],
        [str(place.period) for place in places],
        ["t" if place.late else "f" for place in places],
        [label.member for label in found],
        [label.tag for label in found],
    )
    try:
        [(arrivals, debited)] = await tx.sql(_RECORD, *map(_SEPARATOR.join, columns), now)
    except IntegrityError as error:
        raise Transient("another transaction recorded one of these usage_ids at the same time") from error
    for tenant_id, currency, credit_nanos, debited_nanos, amount_nanos in debited:
        before = accounts.as_account(credit_nanos, debited_nanos - amount_nanos)
        accounts.notify(tx, tenant_id, currency, before, accounts.as_account(credit_nanos, debited_nanos))
    if counted := [
        Counted(item, session_key, verdict.amount_nanos or 0, verdict.price_version or "", place, labels, arrival)
        for item, session_key, verdict, place, labels, arrival in zip(
            records, session_keys, verdicts, places, found, arrivals, strict=True
        )
        if verdict.kind == "counted"
    ]:
        keys = [item.record.tenant_id for item in counted], [item.record.usage_id for item in counted]
        sums = batch_sums.columns(counted)
        await budgets.notify(tx, await tx.sql(_ADD_BATCH, *map(_SEPARATOR.join, (*keys, *sums))))
    return [(currency, amount_nanos) for _, currency, _, _, amount_nanos in debited]


async def _places(tx: Tx, records: Sequence[UsageRecorded], verdicts: Sequence[Verdict]) -> Sequence[Place]:
    """Locks the accounts of all counted records, ends expired grants, and returns the period of each record."""
    counted = [verdict.kind == "counted" for verdict in verdicts]
    # Before any other statement: a period that another transaction closes meanwhile must be seen as closed.
    # Locks the accounts in the order of their key.
    rows = await tx.sql(
        """
        SELECT tenant_id, next_expiry <= clock_timestamp()
        FROM account
        WHERE tenant_id = ANY((SELECT $1::text[])::text[])
        ORDER BY tenant_id
        FOR UPDATE
        """,
        sorted({item.tenant_id for item, counts in zip(records, counted, strict=True) if counts}),
    )
    for tenant_id, expired in rows:
        if expired:
            await accounts.lock_one(tx, tenant_id)
    found = iter(
        await subscriptions.place(
            tx, [(item.tenant_id, item.occurred_at) for item, counts in zip(records, counted, strict=True) if counts]
        )
    )
    return [next(found) if counts else NOWHERE for counts in counted]


def _column(name: str, values: Sequence[str]) -> str:
    """Joins the values of an id to the parameter of a statement. Raises InvalidMessage if one cannot be stored."""
    column = _SEPARATOR.join(values)
    # PostgreSQL's text cannot hold a NUL, and a record without an id could not be looked up.
    if not all(values) or "\x00" in column or column.count(_SEPARATOR) != len(values) - 1:
        raise InvalidMessage(name, "must not be empty or contain the characters U+0000 or U+001F")
    return column


async def _charge(tx: Tx, record: UsageRecorded, verdict: Verdict, period: int) -> None:
    """Debits a record that is counted now, and closes its hold."""
    assert verdict.amount_nanos is not None
    entry = Entry(
        record.tenant_id, "charge", -verdict.amount_nanos, record.usage_id, verdict.price_version, period=period
    )
    await accounts.debit(tx, [entry])
    await budgets.notify(tx, await tx.sql(_ADD, record.tenant_id, record.usage_id))
    if record.hold_id:
        await holds.close(tx, [(record.tenant_id, record.hold_id)])


async def held(
    tx: Tx, tenant_id: str, *, reason: str | None = None, usage_id: str | None = None
) -> list[UsageRecorded]:
    """Locks and returns the tenant's held records: all of them, or the ones with a reason or an id."""
    rows = await tx.sql(
        """
        SELECT usage_id, resource, quantities, occurred_at, estimated, run_id, hold_id
        FROM usage
        WHERE tenant_id = $1 AND verdict = 'held' AND ($2::text IS NULL OR reason = $2)
          AND ($3::text IS NULL OR usage_id = $3)
        ORDER BY arrival
        FOR UPDATE
        """,
        tenant_id,
        reason,
        usage_id,
    )
    return [
        UsageRecorded(
            tenant_id=tenant_id,
            usage_id=id_,
            resource=resource,
            quantities=quantities,
            occurred_at=occurred_at,
            estimated=estimated,
            run_id=run_id,
            hold_id=hold_id,
        )
        for id_, resource, quantities, occurred_at, estimated, run_id, hold_id in rows
    ]


async def rate_again(tx: Tx, records: Sequence[UsageRecorded]) -> list[Verdict]:
    """Rates held records again with the current prices and quantities, and charges the ones that are counted now."""
    currencies = await accounts.currencies(tx, (record.tenant_id for record in records))
    prices = await price_book.versions(tx, {record.resource for record in records})
    # Their age counts at their arrival. A record that waited for review is not late.
    arrived = await _arrivals(tx, records)
    found = [
        judge(r, currencies.get(r.tenant_id), prices.get(r.resource, ()), arrived[r.tenant_id, r.usage_id])
        for r in records
    ]
    for record, verdict in zip(records, found, strict=True):
        await decide(tx, record, verdict)
    return found


async def _arrivals(tx: Tx, records: Sequence[UsageRecorded]) -> dict[tuple[str, str], datetime]:
    rows = await tx.sql(
        """
        SELECT u.tenant_id, u.usage_id, u.rated_at
        FROM unnest($1::text[], $2::text[]) AS n(tenant_id, usage_id)
        JOIN usage AS u USING (tenant_id, usage_id)
        """,
        [record.tenant_id for record in records],
        [record.usage_id for record in records],
    )
    return {(tenant_id, usage_id): rated_at for tenant_id, usage_id, rated_at in rows}


async def decide(tx: Tx, record: UsageRecorded, verdict: Verdict) -> None:
    """Stores a new verdict on a held record. Charges the record if it is counted, gives its hold back if rejected."""
    [place] = await _places(tx, [record], [verdict])
    await tx.sql(
        """
        UPDATE usage
        SET quantities = $3::text::jsonb, estimated = $4, verdict = $5, reason = $6, amount_nanos = $7,
            price_version = $8, rated_at = CASE WHEN $5 = 'held' THEN rated_at ELSE $9 END, occurred_at = $10,
            period = $11, late = $12
        WHERE tenant_id = $1 AND usage_id = $2
        """,
        record.tenant_id,
        record.usage_id,
        _encoder.encode(record.quantities).decode(),
        record.estimated,
        verdict.kind,
        verdict.reason,
        verdict.amount_nanos,
        verdict.price_version,
        utcnow(),
        record.occurred_at,
        *place,
    )
    if verdict.kind == "rejected" and record.hold_id:
        await holds.release(tx, record.tenant_id, [record.hold_id])
    if verdict.kind == "counted":
        await _charge(tx, record, verdict, place.period)
