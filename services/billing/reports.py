"""What a tenant may ask about its money: balance, usage, ledger, verdicts."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

from pydantic import BaseModel

from infra.errors import NotFound
from infra.postgres.tx import Tx
from services.billing import accounts, holds

_VERDICT = (
    "SELECT tenant_id, usage_id, verdict, reason, price_version, amount_nanos, resource, quantities, estimated, "
    "run_id, occurred_at, rated_at, (SELECT count(*) FROM duplicate AS d WHERE d.tenant_id = u.tenant_id "
    "AND d.usage_id = u.usage_id) FROM usage AS u "
)
_WHERE = (
    "WHERE tenant_id = $1 AND ($2::timestamptz IS NULL OR occurred_at >= $2) "
    "AND ($3::timestamptz IS NULL OR occurred_at < $3) AND ($4::text IS NULL OR resource = $4) "
    "AND ($5::uuid IS NULL OR run_id = $5)"
)

Grouping = Literal["resource", "day", "run"]
# What is added to the resource to make a group.
_GROUPS = {"resource": "NULL::text", "day": "(occurred_at AT TIME ZONE 'UTC')::date::text", "run": "run_id::text"}


class Balance(BaseModel):
    """Nano-units (10⁻⁹) of `currency`. credit_nanos, balance_nanos and available_nanos are null without a limit.

    credit_nanos: all that was ever granted. balance_nanos: credit less what was debited. available_nanos: balance less
    what is held for work under way.
    """

    tenant_id: str
    currency: str
    credit_nanos: int | None
    debited_nanos: int
    balance_nanos: int | None
    held_nanos: int
    available_nanos: int | None


class Used(BaseModel):
    """What was used of a resource. group: the day (UTC) or the run; null where it is by resource alone.

    units: unit → count, of counted records. records: all but duplicates. held: of them, waiting for review.
    """

    resource: str
    group: str | None
    records: int
    held: int
    units: dict[str, int]
    amount_nanos: int


class Messages(BaseModel):
    """Messages that a type of channel delivered; they have no price. channel_type: ``unknown`` where none was told."""

    channel_type: str
    delivered: int


class Summary(BaseModel):
    currency: str | None
    amount_nanos: int
    items: list[Used]
    messages: list[Messages]


class LedgerEntry(BaseModel):
    """amount_nanos: above zero in the tenant's favour. An entry never changes; a mistake gets a further one."""

    id: str
    at: datetime
    kind: Literal["credit", "charge", "correction"]
    amount_nanos: int
    usage_id: str | None
    price_version: str | None
    reason: str
    actor: str


class VerdictOf(BaseModel):
    """What became of a usage_id. amount_nanos: null while it is held. duplicates: how often it was reported again."""

    tenant_id: str
    usage_id: str
    verdict: Literal["counted", "rejected", "held"]
    reason: str
    price_version: str | None
    amount_nanos: int | None
    resource: str
    quantities: dict[str, int]
    estimated: bool
    run_id: UUID | None
    occurred_at: datetime
    rated_at: datetime
    duplicates: int


class UsageList(BaseModel):
    items: list[VerdictOf]
    next: str | None


class Where(NamedTuple):
    """Which usage: from `since` (inclusive) until `until` (exclusive), by the time of use."""

    tenant_id: str
    since: datetime | None
    until: datetime | None
    resource: str | None
    run_id: UUID | None = None


async def balance(tx: Tx, tenant_id: str) -> Balance:
    """Raises NotFound without an account."""
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


async def usage(tx: Tx, where: Where, *, after: tuple[datetime, str] | None, limit: int) -> list[VerdictOf]:
    """The records behind `after`, by the time of use and their id."""
    rows = await tx.sql(
        f"{_VERDICT}{_WHERE} AND ($6::timestamptz IS NULL OR (occurred_at, usage_id) > ($6, $7)) "
        "ORDER BY occurred_at, usage_id LIMIT $8",
        *where,
        *(after or (None, None)),
        limit,
    )
    return [_verdict(row) for row in rows]


async def summary(tx: Tx, where: Where, group: Grouping) -> Summary:
    by = f"resource, {_GROUPS[group]} AS part"
    units: dict[tuple[str, str | None], dict[str, int]] = {}
    for name, part, unit, count in await tx.sql(
        f"SELECT resource, part, unit, sum(n::numeric) FROM (SELECT {by}, q.key AS unit, q.value AS n "
        f"FROM usage AS u, jsonb_each_text(quantities) AS q {_WHERE} AND verdict = 'counted') AS found "
        "GROUP BY resource, part, unit",
        *where,
    ):
        units.setdefault((name, part), {})[unit] = int(count)
    rows = await tx.sql(
        "SELECT resource, part, count(*), count(*) FILTER (WHERE verdict = 'held'), coalesce(sum(amount_nanos), 0) "
        f"FROM (SELECT {by}, verdict, amount_nanos FROM usage AS u {_WHERE}) AS found GROUP BY resource, part "
        "ORDER BY resource, part",
        *where,
    )
    items = [
        Used(
            resource=name,
            group=part,
            records=records,
            held=held,
            units=units.get((name, part), {}),
            amount_nanos=int(amount),
        )
        for name, part, records, held, amount in rows
    ]
    return Summary(
        currency=await accounts.currency(tx, where.tenant_id),
        amount_nanos=sum(item.amount_nanos for item in items),
        items=items,
        messages=await _messages(tx, where),
    )


async def _messages(tx: Tx, where: Where) -> list[Messages]:
    rows = await tx.sql(
        "SELECT coalesce(c.type, 'unknown') AS type, sum(d.messages) FROM delivered AS d "
        "LEFT JOIN channel AS c USING (channel_id) WHERE d.tenant_id = $1 "
        "AND ($2::timestamptz IS NULL OR d.day >= ($2 AT TIME ZONE 'UTC')::date) "
        "AND ($3::timestamptz IS NULL OR d.day < ($3 AT TIME ZONE 'UTC')) GROUP BY 1 ORDER BY 1",
        *where[:3],
    )
    return [Messages(channel_type=type_, delivered=int(count)) for type_, count in rows]


async def ledger(tx: Tx, tenant_id: str, *, after: int, limit: int) -> list[LedgerEntry]:
    rows = await tx.sql(
        "SELECT entry::text, made_at, kind, amount_nanos, usage_id, price_version, reason, actor FROM ledger_entry "
        # By the number, not by its text of the same name.
        "WHERE tenant_id = $1 AND entry > $2 ORDER BY ledger_entry.entry LIMIT $3",
        tenant_id,
        after,
        limit,
    )
    names = LedgerEntry.model_fields
    return [LedgerEntry(**dict(zip(names, row, strict=True))) for row in rows]


async def verdict(tx: Tx, tenant_id: str, usage_id: str) -> VerdictOf:
    """Raises NotFound where no record with that id has arrived."""
    rows = await tx.sql(f"{_VERDICT}WHERE tenant_id = $1 AND usage_id = $2", tenant_id, usage_id)
    if not rows:
        raise NotFound(f"usage {usage_id}: no record with this id has arrived")
    return _verdict(rows[0])


async def held(tx: Tx, tenant_id: str | None, *, after: tuple[str, str], limit: int) -> list[VerdictOf]:
    """What waits for review, of a tenant or of all, behind `after` (tenant, usage_id)."""
    rows = await tx.sql(
        f"{_VERDICT}WHERE verdict = 'held' AND ($1::text IS NULL OR tenant_id = $1) "
        "AND (tenant_id, usage_id) > ($2, $3) ORDER BY tenant_id, usage_id LIMIT $4",
        tenant_id,
        *after,
        limit,
    )
    return [_verdict(row) for row in rows]


def _verdict(row: tuple[Any, ...]) -> VerdictOf:
    return VerdictOf(**dict(zip(VerdictOf.model_fields, row, strict=True)))
