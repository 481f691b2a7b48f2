"""Sums of counted usage by hour, in the table ``usage_bucket``.

A bucket is one meter of one resource, agent, channel, member, tag and price version in one hour (UTC) of one period.
It keeps the number of its records, their sum, the largest and the latest one, the range of their arrival numbers and a
hash, so it can be compared with its records, and rebuilt from them. `retention` deletes old records and keeps their
sums, in the same form, in ``deleted_usage``. The meter ``cost_nanos`` is the cost of the records. A reader of buckets
never reads records.

A bucket also keeps the 128 smallest hashes of its sessions. Those of several buckets together are the smallest ones of
their union, so the number of different sessions is exact below 128 and estimated above, at a fixed size (Bar-Yossef and
others, "Counting distinct elements in a data stream", 2002).
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple

from pydantic import BaseModel

from infra.errors import InvalidMessage
from infra.postgres.tx import Tx

METERS = {
    "input_tokens": "tokens that a model read, cached ones included",
    "cached_tokens": "the part of input_tokens that the provider had in its cache",
    "cache_write_tokens": "the part of input_tokens that the provider put into its cache",
    "output_tokens": "tokens that a model wrote, reasoning included",
    "reasoning_tokens": "the part of output_tokens that is reasoning",
    "embedding_tokens": "tokens that were embedded",
    "calls": "calls of a model",
    "messages": "messages that channels delivered",
    "tool_calls": "calls of tools",
    "documents": "documents that were indexed",
    "bytes": "bytes that were transferred",
    "storage_byte_hours": "stored bytes times hours",
    "run_seconds": "duration of runs in seconds",
    "correction_nanos": "differences that re-rating has booked, in nano-units of the account's currency",
    "cost_nanos": "the price of the usage by the price book, in nano-units of the account's currency",
}
# Group → SQL expression over a bucket.
GROUPS = {
    "meter": "meter",
    "model": "resource",
    "agent": "agent_id",
    "channel": "channel_id",
    "member": "member_id",
    "tag": "tag",
    "price_version": "price_version",
    "day": "to_char(hour AT TIME ZONE 'UTC', 'YYYY-MM-DD')",
    "hour": "to_char(hour AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"')",
}
KEY = (
    "tenant_id",
    "period",
    "hour",
    "meter",
    "resource",
    "agent_id",
    "channel_id",
    "price_version",
    "late",
    "member_id",
    "tag",
)
COLUMNS = ("records", "quantity", "first_arrival", "last_arrival", "hash", "largest", "latest", "sessions")
_KEY = ", ".join(KEY)
_ALL = ", ".join((*KEY, *COLUMNS))
SESSIONS = 128
"""The most hashes of sessions that a bucket keeps. The function ``smallest`` of the schema has the same number."""


def summed(rows: str) -> str:
    """The statement that sums rows of the view ``measure`` to buckets."""
    return f"""
        SELECT {_KEY}, count(*) AS records, sum(quantity) AS quantity, min(arrival) AS first_arrival,
               max(arrival) AS last_arrival, bit_xor(digest) AS hash, max(quantity) AS largest, max(latest) AS latest,
               coalesce((array_agg(DISTINCT session) FILTER (WHERE session IS NOT NULL))[1:{SESSIONS}], '{{}}')
                   AS sessions
        FROM {rows}
        GROUP BY {_KEY}
    """


def added(table: str, sums: str) -> str:
    """The statement that adds sums, such as `summed`, to those of `table` that have the same key, in the order of their
    keys."""
    return f"""
        INSERT INTO {table} AS b ({_ALL})
        {sums}
        ORDER BY {_KEY}
        ON CONFLICT ({_KEY}) DO UPDATE
        SET records = b.records + excluded.records,
            quantity = b.quantity + excluded.quantity,
            first_arrival = least(b.first_arrival, excluded.first_arrival),
            last_arrival = greatest(b.last_arrival, excluded.last_arrival),
            hash = b.hash # excluded.hash,
            largest = greatest(b.largest, excluded.largest),
            latest = greatest(b.latest, excluded.latest),
            sessions = CASE
                -- Most sessions are known. The function costs more than all other columns.
                WHEN excluded.sessions <@ b.sessions THEN b.sessions
                ELSE smallest(b.sessions, excluded.sessions)
            END
    """


# The buckets of the tenants $1, from their records and corrections, and from the sums of the deleted ones.
REBUILT = f"""
    SELECT {_KEY}, sum(records)::bigint AS records, sum(quantity) AS quantity, min(first_arrival) AS first_arrival,
           max(last_arrival) AS last_arrival, bit_xor(hash) AS hash, max(largest) AS largest, max(latest) AS latest,
           smallest_of(sessions) AS sessions
    FROM (
        {summed("measure WHERE tenant_id = ANY($1::text[])")}
        UNION ALL
        {summed("correction_measure WHERE tenant_id = ANY($1::text[])")}
        UNION ALL
        SELECT {_ALL} FROM deleted_usage WHERE tenant_id = ANY($1::text[])
    ) AS m
    GROUP BY {_KEY}
"""


# Adds counted records to their buckets. The parameters are the tenants and the usage_ids, joined by U+001F. The caller
# has locked the accounts. OFFSET keeps one look-up by key for each record: a plan that was made while the table was
# small, or had no statistics, would read the whole table for every batch.
ADDED = added(
    "usage_bucket",
    summed(
        """
        unnest(string_to_array($1, E'\\x1f'), string_to_array($2, E'\\x1f')) AS n(tenant, id)
        CROSS JOIN LATERAL (SELECT * FROM measure WHERE tenant_id = n.tenant AND usage_id = n.id OFFSET 0) AS m
        """
    ),
)
# As ADDED, with the columns of `batch_sums`, joined by U+001F, as parameters from $3 on.
_BATCH_TYPES = {
    "period": "bigint",
    "hour": "float8",
    "late": "boolean",
    "records": "bigint",
    "quantity": "numeric",
    "first_arrival": "bigint",
    "last_arrival": "bigint",
    "hash": "bigint",
    "largest": "numeric",
}
_BATCH = ", ".join(
    f"string_to_array((SELECT ${n}), E'\\x1f')::{_BATCH_TYPES.get(name, 'text')}[]"
    for n, name in enumerate((*KEY, *COLUMNS), 3)
)
BATCH_ADDED = added(
    "usage_bucket",
    f"""
    SELECT tenant_id, period, to_timestamp(hour) AS hour, meter, resource, coalesce(agent_id, '') AS agent_id,
           coalesce(channel_id, '') AS channel_id, coalesce(price_version, '') AS price_version, late,
           coalesce(member_id, '') AS member_id, coalesce(tag, '') AS tag, records, quantity, first_arrival,
           last_arrival, hash, largest, latest::numeric[], sessions::bigint[]
    FROM unnest({_BATCH}) AS n({_ALL})
    """,
)


class Meter(BaseModel):
    name: str
    description: str


class Sum(BaseModel):
    """The sum of a meter over one group of buckets."""

    group: dict[str, str]
    """Group → value. An empty value: the records do not name it."""
    quantity: int
    records: int
    max: int | None
    """The quantity of the largest record. Null: all records were deleted before this was kept."""
    latest: int | None
    """The quantity of the record that was used last."""
    latest_at: datetime | None
    sessions: int
    """The number of different sessions that the records name."""
    sessions_exact: bool
    """False: `sessions` is an estimate, with a standard error of 9 %."""
    first_arrival: int
    last_arrival: int
    hash: str
    """The digests of the records, combined by exclusive or; 16 hexadecimal digits. It finds faults, not forgery."""


class Window(NamedTuple):
    """The buckets of a tenant from hour `since` (inclusive) until hour `until` (exclusive)."""

    tenant_id: str
    since: datetime
    until: datetime


async def add_corrections(tx: Tx, tenant_id: str, keys: Sequence[tuple[str, str]]) -> None:
    """Adds corrections (usage_id, price version) to their buckets. The caller has locked the account."""
    await tx.sql(
        added(
            "usage_bucket",
            summed(
                """
                unnest($2::text[], $3::text[]) AS n(usage_id, price_version)
                JOIN correction_measure USING (usage_id, price_version)
                WHERE tenant_id = $1
                """
            ),
        ),
        tenant_id,
        [usage_id for usage_id, _ in keys],
        [version for _, version in keys],
    )


async def sums(tx: Tx, window: Window, groups: Sequence[str], *, after: Sequence[str], limit: int) -> list[Sum]:
    """Returns the sums by `groups` after the group `after`, in the order of their groups."""
    parts = ", ".join(GROUPS[group] for group in groups)
    rows = await tx.sql(
        f"""
        SELECT ARRAY[{parts}], sum(quantity)::text, sum(records)::bigint, min(first_arrival), max(last_arrival),
               bit_xor(hash), max(largest)::text, max(latest)::text[], smallest_of(sessions)
        FROM usage_bucket
        WHERE tenant_id = $1 AND hour >= $2 AND hour < $3
        GROUP BY {parts}
        HAVING $4::text[] IS NULL OR ARRAY[{parts}] > $4
        ORDER BY 1
        LIMIT $5
        """,
        *window,
        list(after) or None,
        limit,
    )
    return [_sum(dict(zip(groups, row[0], strict=True)), row[1:]) for row in rows]


def _sum(group: dict[str, str], row: Sequence[Any]) -> Sum:
    quantity, records, first, last, hash_, largest, latest, sessions = row
    return Sum(
        group=group,
        quantity=int(quantity),
        records=records,
        max=None if largest is None else int(largest),
        latest=int(latest[2]) if latest else None,
        latest_at=datetime.fromtimestamp(0, UTC) + timedelta(microseconds=int(Decimal(latest[0]) * 10**6))
        if latest
        else None,
        sessions=different(sessions),
        sessions_exact=len(sessions) < SESSIONS,
        first_arrival=first,
        last_arrival=last,
        hash=shown(hash_),
    )


def different(hashes: Sequence[int]) -> int:
    """The number of different values whose smallest hashes are these, in ascending order."""
    if len(hashes) < SESSIONS:
        return len(hashes)
    # The hashes are evenly spread over 2⁶³ numbers.
    return (SESSIONS - 1) * 2**63 // max(1, hashes[-1])


def shown(hash_: int) -> str:
    """A hash as 16 hexadecimal digits."""
    return f"{hash_ & (2**64 - 1):016x}"


def read_groups(text: str) -> list[str]:
    """Reads ``meter,model,day``. The meter is always a group, because quantities of two meters cannot be added."""
    wanted = list(dict.fromkeys(["meter", *text.split(",")]))
    if unknown := [name for name in wanted if name not in GROUPS]:
        raise InvalidMessage("group_by", f"{unknown[0]} is not a group; must be one of {', '.join(GROUPS)}")
    return wanted


def full_hour(field: str, moment: datetime) -> datetime:
    """Returns `moment`. Raises InvalidMessage if it is not a full hour."""
    if moment.minute or moment.second or moment.microsecond:
        raise InvalidMessage(field, "must be a full hour, such as 2026-03-01T00:00:00Z; usage is summed by hour")
    return moment


class RebuiltBuckets(BaseModel):
    """The result of a rebuild. The buckets were replaced only if they were not equal."""

    buckets: int
    hash_before: str
    hash_after: str
    equal: bool


async def rebuild(tx: Tx, tenant_id: str) -> RebuiltBuckets:
    """Computes the tenant's buckets again from its records and replaces them. The caller has locked the account."""
    before = await _fingerprint(tx, tenant_id)
    await tx.sql("DELETE FROM usage_bucket WHERE tenant_id = $1", tenant_id)
    await tx.sql(f"INSERT INTO usage_bucket ({_ALL}) {REBUILT}", [tenant_id])
    after = await _fingerprint(tx, tenant_id)
    return RebuiltBuckets(buckets=after[0], hash_before=before[1], hash_after=after[1], equal=before == after)


async def _fingerprint(tx: Tx, tenant_id: str) -> tuple[int, str]:
    """Returns the number of the tenant's buckets and a hash over all their columns."""
    rows: Any = await tx.sql(
        """
        SELECT count(*), encode(sha256(convert_to(coalesce(string_agg(b::text, E'\\n' ORDER BY b::text), ''), 'UTF8')),
                                'hex')
        FROM usage_bucket AS b
        WHERE tenant_id = $1
        """,
        tenant_id,
    )
    [(count, digest)] = rows
    return count, digest
