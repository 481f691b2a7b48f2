"""The proof of an invoice line: its buckets, compared with the records that they sum, down to one record. Of deleted
records there are the sums that were computed from them when they were deleted."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec
from pydantic import BaseModel

from infra.errors import NotFound
from infra.postgres.tx import Tx
from services.billing.rating import price_book
from services.billing.rating.domain import PART_OF
from services.billing.usage import reports, retention
from services.billing.usage.aggregates import shown
from services.billing.usage.reports import UsageVerdict

# More records than that are not read again for one answer.
MAX_COMPARED = 200_000
SHOWN = 20

_MEASURES = "SELECT period, meter, resource, agent_id, channel_id FROM {} WHERE tenant_id = $1 AND usage_id = $2"
_COLUMNS = {"model": "resource", "agent": "agent_id", "channel": "channel_id"}
_SAME_GROUP = " AND ".join(
    f"coalesce(groups ->> '{name}', m.{column}) = m.{column}" for name, column in _COLUMNS.items()
)


class Records(BaseModel):
    """Usage records together."""

    count: int
    sum: int
    hash: str
    """The digests of the records, combined by exclusive or; 16 hexadecimal digits."""


class Proof(BaseModel):
    """The buckets of a line and the records."""

    line_id: UUID
    invoice_id: UUID
    invoice_number: str | None
    description: str
    amount_nanos: int
    meter: str | None
    """Null: a fee that does not depend on usage."""
    buckets: Records
    without: dict[str, int]
    """Meter → the sum of its buckets, which is taken off the quantity: the meter has a charge of its own."""
    records: Records | None
    """Computed from the records: again for the stored ones, at their deletion for the deleted ones. Null: there are too
    many for one answer."""
    deleted_records: int
    """The part of `records` that is deleted."""
    equal: bool | None
    """The buckets equal the records. Null: they were not compared."""
    first: UsageVerdict | None
    last: UsageVerdict | None
    price_versions: list[str]
    runs: list[UUID]
    """Some of the runs that used it, the newest first."""
    record: RecordProof | None
    """The record that the request names."""


class AmountPart(BaseModel):
    """A part of a record's amount."""

    unit: str
    quantity: int
    """Without the parts of it that have prices of their own."""
    nanos_per_unit: str
    """Decimal."""
    nanos: str
    """Exact. The sum of all parts is rounded once, half to even."""


class RecordProof(BaseModel):
    """One usage record: its content, the prices that apply to it, and the run that has the answer."""

    usage: UsageVerdict
    parts: list[AmountPart]
    run_id: UUID | None
    step: int | None
    answer: str | None
    """The path of the run with its reply."""
    rated_at: datetime


async def explain(tx: Tx, tenant_id: str, line_id: UUID, usage_id: str | None) -> Proof:
    """Raises NotFound for an unknown line, and for a record that is not in it."""
    rows = await tx.sql(
        """
        SELECT l.invoice_id, i.number, l.description, l.amount_nanos, l.source, i.period
        FROM invoice_line AS l
        JOIN invoice AS i USING (tenant_id, invoice_id)
        WHERE l.tenant_id = $1 AND l.line_id = $2
        """,
        tenant_id,
        line_id,
    )
    if not rows:
        raise NotFound(f"line {line_id}: not found")
    [(invoice_id, number, description, amount, text, period)] = rows
    source = msgspec.json.decode(text, type=dict[str, str])
    meter = source.pop("meter", None)
    taken_off = source.pop("without", "").split()
    source.pop("usage_period", None)
    group = "".join(f" AND {_COLUMNS[name]} = ${n}" for n, name in enumerate(source, 4))
    where = f"tenant_id = $1 AND period = $2 AND meter = $3{group}"
    place = (tenant_id, period, meter or "", *source.values())
    view = "correction_measure" if meter == "correction_nanos" else "measure"
    [(count, total, hash_, first, last, versions)] = await tx.sql(
        f"""
        SELECT coalesce(sum(records), 0)::bigint, coalesce(sum(quantity), 0)::text, coalesce(bit_xor(hash), 0),
               min(first_arrival), max(last_arrival), coalesce(array_agg(DISTINCT price_version), ARRAY[]::text[])
        FROM usage_bucket
        WHERE {where}
        """,
        *place,
    )
    buckets = Records(count=count, sum=int(total), hash=shown(hash_))
    without = await tx.sql(
        f"""
        SELECT meter, sum(quantity)::text
        FROM usage_bucket
        WHERE tenant_id = $1 AND period = $2 AND meter = ANY($3::text[]){group}
        GROUP BY meter
        ORDER BY meter
        """,
        tenant_id,
        period,
        taken_off,
        *source.values(),
    )
    records, deleted = None, 0
    if count <= MAX_COMPARED:
        [(count, total, hash_, deleted)] = await tx.sql(
            f"""
            SELECT coalesce(sum(records), 0)::bigint, coalesce(sum(quantity), 0)::text, coalesce(bit_xor(hash), 0),
                   coalesce(sum(records) FILTER (WHERE deleted), 0)::bigint
            FROM (
                SELECT 1 AS records, quantity, digest AS hash, false AS deleted FROM {view} WHERE {where}
                UNION ALL
                SELECT records, quantity, hash, true FROM deleted_usage WHERE {where}
            ) AS r
            """,
            *place,
        )
        records = Records(count=count, sum=int(total), hash=shown(hash_))
    runs = await tx.sql(
        f"""
        SELECT run_id
        FROM (SELECT run_id, arrival FROM {view} WHERE {where} AND run_id IS NOT NULL
              ORDER BY arrival DESC LIMIT 1000) AS newest
        GROUP BY run_id
        ORDER BY max(arrival) DESC
        LIMIT {SHOWN}
        """,
        *place,
    )
    record = None
    if usage_id is not None:
        if not await tx.sql(f"SELECT 1 FROM {view} WHERE {where} AND usage_id = ${len(place) + 1}", *place, usage_id):
            kept = f"records are kept for {retention.KEPT.days} days"
            raise NotFound(f"usage {usage_id}: is not a record of this line; {kept}")
        record = await _record(tx, tenant_id, usage_id)
    return Proof(
        line_id=line_id,
        invoice_id=invoice_id,
        invoice_number=number,
        description=description,
        amount_nanos=amount,
        meter=meter,
        buckets=buckets,
        without={name: int(total) for name, total in without},
        records=records,
        deleted_records=deleted,
        equal=None if records is None else records == buckets,
        first=await _at(tx, tenant_id, first),
        last=await _at(tx, tenant_id, last),
        price_versions=sorted(version for version in versions if version),
        runs=[run_id for (run_id,) in runs],
        record=record,
    )


class LineOfUse(BaseModel):
    """A line of an invoice that sums a record."""

    id: UUID
    """`/api/v1/billing/lines/{id}/explain` proves it."""
    invoice_id: UUID
    invoice_number: str | None
    """Null: a draft."""
    description: str


class InvoicedUse(UsageVerdict):
    """The verdict on a record, and the way from it to the invoices."""

    lines: list[LineOfUse]
    """One for each meter that is charged. Empty: its period is not closed, or it is paid by grants."""


async def invoiced(tx: Tx, tenant_id: str, usage_id: str) -> InvoicedUse:
    """Raises NotFound if no record with that id has arrived."""
    found = await reports.verdict(tx, tenant_id, usage_id)
    rows = await tx.sql(
        f"""
        SELECT DISTINCT l.line_id, i.invoice_id, i.number, l.description
        FROM (
            {_MEASURES.format("measure")}
            UNION ALL
            {_MEASURES.format("correction_measure")}
        ) AS m
        JOIN invoice AS i ON i.tenant_id = $1 AND i.period = m.period
        JOIN invoice_line AS l ON l.tenant_id = $1 AND l.invoice_id = i.invoice_id
        CROSS JOIN LATERAL (SELECT l.source::jsonb) AS s(groups)
        WHERE groups ->> 'meter' = m.meter
          AND {_SAME_GROUP}
        ORDER BY l.line_id
        """,
        tenant_id,
        usage_id,
    )
    lines = [LineOfUse(**dict(zip(LineOfUse.model_fields, row, strict=True))) for row in rows]
    return InvoicedUse(**found.model_dump(), lines=lines)


async def _at(tx: Tx, tenant_id: str, arrival: int | None) -> UsageVerdict | None:
    """The record with an arrival number. None if it was deleted."""
    rows = await tx.sql("SELECT usage_id FROM usage WHERE tenant_id = $1 AND arrival = $2", tenant_id, arrival)
    return await reports.verdict(tx, tenant_id, rows[0][0]) if rows else None


async def _record(tx: Tx, tenant_id: str, usage_id: str) -> RecordProof:
    found = await reports.verdict(tx, tenant_id, usage_id)
    versions = (await price_book.versions(tx, [found.resource])).get(found.resource, ())
    price = next((price for price in versions if price.name == found.price_version), None)
    parts = []
    if price:
        size = found.quantities.get("input_tokens", 0)
        prices = next((t.nanos for t in reversed(price.tiers) if size > t.above), price.nanos)
        for unit, nanos in sorted(prices.items()):
            counted = found.quantities.get(unit, 0) - sum(
                found.quantities.get(part, 0) for part, whole in PART_OF.items() if whole == unit and part in prices
            )
            if counted:
                parts.append(
                    AmountPart(unit=unit, quantity=counted, nanos_per_unit=f"{nanos:f}", nanos=f"{nanos * counted:f}")
                )
    # The id of a model call is <run>/<step>/<attempt>.
    names = usage_id.split("/")
    step = int(names[1]) if found.run_id and len(names) == 3 and names[1].isdecimal() else None
    return RecordProof(
        usage=found,
        parts=parts,
        run_id=found.run_id,
        step=step,
        answer=f"/api/v1/runs/{found.run_id}" if found.run_id else None,
        rated_at=found.rated_at,
    )


Proof.model_rebuild()
