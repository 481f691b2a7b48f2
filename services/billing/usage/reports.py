"""Reports to a tenant about its money: balance, usage, ledger, verdicts."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

from pydantic import BaseModel

from infra.errors import NotFound
from infra.postgres.tx import Tx
from services.billing.credit import accounts, holds
from services.billing.rating.domain import OTHER_CONTENT

_REPEATS = "SELECT count(*) FROM duplicate AS d WHERE d.tenant_id = u.tenant_id AND d.usage_id = u.usage_id"
_VERDICT = f"""
    SELECT tenant_id, usage_id, verdict, reason, price_version, amount_nanos, resource, quantities, estimated,
    run_id, occurred_at, rated_at, ({_REPEATS}), ({_REPEATS} AND d.reason = '{OTHER_CONTENT}') FROM usage AS u
    """
_WHERE = (
    "WHERE tenant_id = $1 AND ($2::timestamptz IS NULL OR occurred_at >= $2) "
    "AND ($3::timestamptz IS NULL OR occurred_at < $3) AND ($4::text IS NULL OR resource = $4) "
    "AND ($5::uuid IS NULL OR run_id = $5)"
)

Grouping = Literal["resource", "day", "run"]
# Grouping → SQL expression by which records are grouped in addition to their resource.
_GROUPS = {"resource": "NULL::text", "day": "(occurred_at AT TIME ZONE 'UTC')::date::text", "run": "run_id::text"}


class Balance(BaseModel):
    """Amounts in nano-units (10⁻⁹) of `currency`."""

    tenant_id: str
    currency: str
    credit_nanos: int | None
    """The sum of all credit ever granted, less the expired part and the differences between invoices that grants have
    paid and their usage. Null: no limit."""
    debited_nanos: int
    balance_nanos: int | None
    """Credit minus debits. Null: no limit."""
    held_nanos: int
    """Credit that is reserved for work in progress and for held records."""
    available_nanos: int | None
    """Balance minus holds. Null: no limit."""


class UsageSum(BaseModel):
    """The usage of a resource, or of one group of its records."""

    resource: str
    group: str | None
    """The day (UTC) or the run. Null if grouped by resource alone."""
    records: int
    """Number of records without duplicates."""
    held: int
    units: dict[str, int]
    """Unit → quantity of the counted records."""
    amount_nanos: int


class Messages(BaseModel):
    """Number of messages that channels of one type delivered. They have no price."""

    channel_type: str
    """``unknown`` if no message of the channel has arrived yet."""
    delivered: int


class UsageSummary(BaseModel):
    currency: str | None
    amount_nanos: int
    items: list[UsageSum]
    messages: list[Messages]
    deleted_records: int
    """Counted records of this time and resource that are deleted. They are not in these sums, but in those of
    ``usage?group_by=…``."""


class LedgerEntry(BaseModel):
    """An entry never changes. A mistake is corrected by a new entry."""

    id: str
    at: datetime
    kind: Literal["credit", "charge", "correction", "expiry"]
    amount_nanos: int
    """Above zero: in the tenant's favour."""
    usage_id: str | None
    price_version: str | None
    reason: str
    actor: str


class UsageVerdict(BaseModel):
    """The verdict on the first usage record with a usage_id."""

    tenant_id: str
    usage_id: str
    verdict: Literal["counted", "rejected", "held"]
    reason: str
    price_version: str | None
    amount_nanos: int | None
    """Null while the record is held."""
    resource: str
    quantities: dict[str, int]
    estimated: bool
    run_id: UUID | None
    occurred_at: datetime
    rated_at: datetime
    duplicates: int
    """Number of further records with the same usage_id."""
    conflicts: int
    """The part of them whose content was another one. They were not counted."""


class UsageList(BaseModel):
    items: list[UsageVerdict]
    next: str | None


class UsageFilter(NamedTuple):
    """Selects usage records that occurred from `since` (inclusive) until `until` (exclusive)."""

    tenant_id: str
    since: datetime | None
    until: datetime | None
    resource: str | None
    run_id: UUID | None = None


async def balance(tx: Tx, tenant_id: str) -> Balance:
    """Raises NotFound if the tenant has no account."""
    currency, account = await accounts.lock_one(tx, tenant_id)
    held = await holds.open_nanos(tx, tenant_id)
    left = account.balance_nanos
    return Balance(
        tenant_id=tenant_id,
        currency=currency,
        credit_nanos=account.credit_nanos,
        debited_nanos=account.debited_nanos,
        balance_nanos=left,
        held_nanos=held,
        available_nanos=None if left is None else left - held,
    )


async def usage(tx: Tx, wanted: UsageFilter, *, after: tuple[datetime, str] | None, limit: int) -> list[UsageVerdict]:
    """Returns the records after the position `after`, by time of use and id."""
    rows = await tx.sql(
        f"{_VERDICT}{_WHERE} AND ($6::timestamptz IS NULL OR (occurred_at, usage_id) > ($6, $7)) "
        "ORDER BY occurred_at, usage_id LIMIT $8",
        *wanted,
        *(after or (None, None)),
        limit,
    )
    return [_verdict(row) for row in rows]


async def summary(tx: Tx, wanted: UsageFilter, group: Grouping) -> UsageSummary:
    by = f"resource, {_GROUPS[group]} AS part"
    units: dict[tuple[str, str | None], dict[str, int]] = {}
    for name, part, unit, count in await tx.sql(
        f"""
        SELECT resource, part, unit, sum(n::numeric) FROM (SELECT {by}, q.key AS unit, q.value AS n
        FROM usage AS u, jsonb_each_text(quantities) AS q {_WHERE} AND verdict = 'counted') AS found
        GROUP BY resource, part, unit
        """,
        *wanted,
    ):
        units.setdefault((name, part), {})[unit] = int(count)
    rows = await tx.sql(
        f"""
        SELECT resource, part, count(*), count(*) FILTER (WHERE verdict = 'held'), coalesce(sum(amount_nanos), 0)
        FROM (SELECT {by}, verdict, amount_nanos FROM usage AS u {_WHERE}) AS found GROUP BY resource, part
        ORDER BY resource, part
        """,
        *wanted,
    )
    items = [
        UsageSum(
            resource=name,
            group=part,
            records=records,
            held=held,
            units=units.get((name, part), {}),
            amount_nanos=int(amount),
        )
        for name, part, records, held, amount in rows
    ]
    return UsageSummary(
        currency=await accounts.currency(tx, wanted.tenant_id),
        amount_nanos=sum(item.amount_nanos for item in items),
        items=items,
        messages=await _messages(tx, wanted),
        deleted_records=await _deleted(tx, wanted),
    )


async def _deleted(tx: Tx, wanted: UsageFilter) -> int:
    [(count,)] = await tx.sql(
        """
        SELECT coalesce(sum(records), 0)::bigint
        FROM deleted_usage
        WHERE tenant_id = $1 AND meter = 'cost_nanos' AND ($2::timestamptz IS NULL OR hour > $2 - interval '1 hour')
          AND ($3::timestamptz IS NULL OR hour < $3) AND ($4::text IS NULL OR resource = $4)
        """,
        *wanted[:4],
    )
    return int(count)


async def _messages(tx: Tx, wanted: UsageFilter) -> list[Messages]:
    rows = await tx.sql(
        """
        SELECT coalesce(c.type, 'unknown') AS type, sum(d.messages) FROM delivered AS d
        LEFT JOIN channel AS c USING (channel_id) WHERE d.tenant_id = $1
        AND ($2::timestamptz IS NULL OR d.day >= ($2 AT TIME ZONE 'UTC')::date)
        AND ($3::timestamptz IS NULL OR d.day < ($3 AT TIME ZONE 'UTC')) GROUP BY 1 ORDER BY 1
        """,
        *wanted[:3],
    )
    return [Messages(channel_type=type_, delivered=int(count)) for type_, count in rows]


async def ledger(tx: Tx, tenant_id: str, *, after: int, limit: int) -> list[LedgerEntry]:
    rows = await tx.sql(
        "SELECT entry::text, made_at, kind, amount_nanos, usage_id, price_version, reason, actor FROM ledger_entry "
        # By the column, which is a number. The name alone would mean the text column of the result.
        "WHERE tenant_id = $1 AND entry > $2 ORDER BY ledger_entry.entry LIMIT $3",
        tenant_id,
        after,
        limit,
    )
    names = LedgerEntry.model_fields
    return [LedgerEntry(**dict(zip(names, row, strict=True))) for row in rows]


async def verdict(tx: Tx, tenant_id: str, usage_id: str) -> UsageVerdict:
    """Raises NotFound if no record with that id has arrived."""
    rows = await tx.sql(f"{_VERDICT}WHERE tenant_id = $1 AND usage_id = $2", tenant_id, usage_id)
    if not rows:
        raise NotFound(f"usage {usage_id}: not found")
    return _verdict(rows[0])


async def held(tx: Tx, tenant_id: str | None, *, after: tuple[str, str], limit: int) -> list[UsageVerdict]:
    """Returns the held records of a tenant, or of all tenants, after the position `after` (tenant, usage_id)."""
    rows = await tx.sql(
        f"{_VERDICT}WHERE verdict = 'held' AND ($1::text IS NULL OR tenant_id = $1) "
        "AND (tenant_id, usage_id) > ($2, $3) ORDER BY tenant_id, usage_id LIMIT $4",
        tenant_id,
        *after,
        limit,
    )
    return [_verdict(row) for row in rows]


def _verdict(row: tuple[Any, ...]) -> UsageVerdict:
    return UsageVerdict(**dict(zip(UsageVerdict.model_fields, row, strict=True)))
