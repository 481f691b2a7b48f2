"""Usage records: the first record of each usage_id with its verdict in ``usage``, repeated ones in ``duplicate``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import msgspec
from sqlalchemy.exc import IntegrityError

from infra.clock import utcnow
from infra.errors import InvalidMessage, Transient
from infra.postgres.tx import Tx
from protos.messages.billing import UsageRecorded
from services.billing import accounts, holds, price_book
from services.billing.accounts import Entry
from services.billing.domain import UsageContent, Verdict, judge, settle

_encoder = msgspec.json.Encoder(order="sorted")


@dataclass(frozen=True)
class Judged:
    """A record with its verdict."""

    record: UsageRecorded
    verdict: Verdict
    message_id: UUID
    span_id: str
    """The span in which the record was rated. Empty: not traced."""


async def verdicts(tx: Tx, records: Sequence[UsageRecorded]) -> list[Verdict]:
    """Rates new records, and finds the ones whose usage_id was recorded before.

    Raises InvalidMessage for ids that cannot be stored.
    """
    for record in records:
        for name in ("tenant_id", "usage_id", "resource"):
            # PostgreSQL's text cannot hold a NUL, and a record without an id could not be looked up.
            if not (value := getattr(record, name)) or "\x00" in value:
                raise InvalidMessage(name, "must not be empty or contain a NUL")
    currencies = await accounts.currencies(tx, (record.tenant_id for record in records))
    prices = await price_book.versions(tx, (record.resource for record in records))
    rows = await tx.sql(
        "SELECT u.tenant_id, u.usage_id, u.resource, u.quantities FROM usage AS u "
        "JOIN unnest($1::text[], $2::text[]) AS n(tenant_id, usage_id) USING (tenant_id, usage_id)",
        [record.tenant_id for record in records],
        [record.usage_id for record in records],
    )
    seen = {(tenant_id, id_): UsageContent(resource, counts) for tenant_id, id_, resource, counts in rows}
    return settle(records, seen, currencies, prices, utcnow())


async def record(tx: Tx, judged: Sequence[Judged]) -> None:
    """Stores records with their verdicts, debits the counted ones and closes the holds that they name."""
    fresh = [item for item in judged if item.verdict.kind != "duplicate"]
    repeats = [item for item in judged if item.verdict.kind == "duplicate"]
    if fresh:
        try:
            await _insert(tx, fresh)
        except IntegrityError as error:
            raise Transient("another transaction recorded one of these usage_ids at the same time") from error
    if repeats:
        await _insert_duplicates(tx, repeats)
    await _charge(
        tx, [(item.record.tenant_id, item.record.usage_id, item.record.hold_id, item.verdict) for item in fresh]
    )


async def _insert(tx: Tx, judged: Sequence[Judged]) -> None:
    now = utcnow()
    # Rows are inserted in the order of their key. Two transactions with the same new keys would otherwise deadlock. The
    # arrival numbers are drawn before that, in the order of the records.
    await tx.sql(
        """
        INSERT INTO usage (tenant_id, usage_id, message_id, resource, quantities, occurred_at, estimated, run_id,
                           hold_id, verdict, reason, amount_nanos, price_version, span_id, rated_at, arrival)
        SELECT t, u, m, r, q::jsonb, o, e, run, hold, v, why, a, p, s, $15, arrival
        FROM (
            SELECT *, nextval('arrival') AS arrival
            FROM unnest($1::text[], $2::text[], $3::uuid[], $4::text[], $5::text[], $6::timestamptz[], $7::bool[],
                        $8::uuid[], $9::uuid[], $10::text[], $11::text[], $12::bigint[], $13::text[], $14::text[])
                AS n(t, u, m, r, q, o, e, run, hold, v, why, a, p, s)
        ) AS arrived
        ORDER BY t, u
        """,
        [item.record.tenant_id for item in judged],
        [item.record.usage_id for item in judged],
        [item.message_id for item in judged],
        [item.record.resource for item in judged],
        [_encoder.encode(item.record.quantities).decode() for item in judged],
        [item.record.occurred_at for item in judged],
        [item.record.estimated for item in judged],
        [item.record.run_id for item in judged],
        [item.record.hold_id for item in judged],
        [item.verdict.kind for item in judged],
        [item.verdict.reason for item in judged],
        [item.verdict.amount_nanos for item in judged],
        [item.verdict.price_version for item in judged],
        [item.span_id for item in judged],
        now,
    )


async def _insert_duplicates(tx: Tx, judged: Sequence[Judged]) -> None:
    await tx.sql(
        "INSERT INTO duplicate (tenant_id, usage_id, message_id, resource, quantities, occurred_at, run_id, reason, "
        "rated_at) SELECT t, u, m, r, q::jsonb, o, run, why, $9 FROM unnest($1::text[], $2::text[], $3::uuid[], "
        "$4::text[], $5::text[], $6::timestamptz[], $7::uuid[], $8::text[]) AS n(t, u, m, r, q, o, run, why)",
        [item.record.tenant_id for item in judged],
        [item.record.usage_id for item in judged],
        [item.message_id for item in judged],
        [item.record.resource for item in judged],
        [_encoder.encode(item.record.quantities).decode() for item in judged],
        [item.record.occurred_at for item in judged],
        [item.record.run_id for item in judged],
        [item.verdict.reason for item in judged],
        utcnow(),
    )


async def _charge(tx: Tx, rated: Sequence[tuple[str, str, UUID | None, Verdict]]) -> None:
    """Debits the counted ones of (tenant, usage_id, hold, verdict) and closes their holds."""
    counted = [item for item in rated if item[3].kind == "counted"]
    if not counted:
        return
    entries = []
    for tenant_id, usage_id, _, verdict in counted:
        assert verdict.amount_nanos is not None
        entries.append(Entry(tenant_id, "charge", -verdict.amount_nanos, usage_id, verdict.price_version))
    await accounts.debit(tx, entries)
    if named := [(tenant_id, hold_id) for tenant_id, _, hold_id, _ in counted if hold_id is not None]:
        await holds.close(tx, named)


async def held(
    tx: Tx, tenant_id: str, *, reason: str | None = None, usage_id: str | None = None
) -> list[UsageRecorded]:
    """Locks and returns the tenant's held records: all of them, or the ones with a reason or an id."""
    rows = await tx.sql(
        "SELECT usage_id, resource, quantities, occurred_at, estimated, run_id, hold_id FROM usage "
        "WHERE tenant_id = $1 AND verdict = 'held' AND ($2::text IS NULL OR reason = $2) "
        "AND ($3::text IS NULL OR usage_id = $3) ORDER BY arrival FOR UPDATE",
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
    prices = await price_book.versions(tx, (record.resource for record in records))
    now = utcnow()
    found = [judge(r, currencies.get(r.tenant_id), prices.get(r.resource, ()), now) for r in records]
    for record, verdict in zip(records, found, strict=True):
        await decide(tx, record, verdict)
    return found


async def decide(tx: Tx, record: UsageRecorded, verdict: Verdict) -> None:
    """Stores a new verdict on a held record, and charges the record if it is counted."""
    await tx.sql(
        "UPDATE usage SET quantities = $3::text::jsonb, estimated = $4, verdict = $5, reason = $6, amount_nanos = $7, "
        "price_version = $8, rated_at = $9 WHERE tenant_id = $1 AND usage_id = $2",
        record.tenant_id,
        record.usage_id,
        _encoder.encode(record.quantities).decode(),
        record.estimated,
        verdict.kind,
        verdict.reason,
        verdict.amount_nanos,
        verdict.price_version,
        utcnow(),
    )
    await _charge(tx, [(record.tenant_id, record.usage_id, record.hold_id, verdict)])
