"""Members and tags of usage. They are parts of the key of the sums by hour, and clients choose tags freely. So only the
first ones that a tenant uses in a month are kept, in the table ``usage_label``; all others are counted as OTHER."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from infra.postgres.tx import Tx
from protos.messages.billing import UsageRecorded

MOST = {"member": 1_000, "tag": 100}
"""Kind → the number of values of a tenant in a month (UTC)."""
LONGEST_TAG = 100
OTHER = "(other)"


class Labels(NamedTuple):
    member: str
    tag: str


_NONE = Labels("", "")


class _Value(NamedTuple):
    tenant_id: str
    kind: str
    value: str


async def bounded(tx: Tx, records: Sequence[UsageRecorded], now: datetime) -> list[Labels]:
    """Returns the member and the tag of each record, as they are counted. The caller has locked the accounts."""
    if not any(record.member_id or record.tag for record in records):
        return [_NONE] * len(records)
    found = [Labels(str(record.member_id or ""), _tag(record.tag or "")) for record in records]
    values = [
        [_Value(record.tenant_id, kind, value) for kind, value in zip(MOST, labels, strict=True)]
        for record, labels in zip(records, found, strict=True)
    ]
    wanted = {value for pair in values for value in pair if value.value not in ("", OTHER)}
    if not wanted:
        return found
    refused = await _refused(tx, sorted(wanted), now)
    return [Labels(*(OTHER if value in refused else value.value for value in pair)) for pair in values]


def _tag(text: str) -> str:
    return text if len(text) <= LONGEST_TAG and text.isprintable() else OTHER


async def _refused(tx: Tx, wanted: Sequence[_Value], now: datetime) -> set[_Value]:
    """Keeps new values while there is room for them. Returns those that are not kept."""
    rows = await tx.sql(
        # Locks new rows in the order of their key.
        """
        WITH missing AS MATERIALIZED (
            SELECT tenant_id, kind, value, most.most,
                   row_number() OVER (PARTITION BY tenant_id, kind ORDER BY value)
                   + (SELECT count(*) FROM usage_label AS l
                      WHERE l.tenant_id = n.tenant_id AND l.month = $1 AND l.kind = n.kind) AS number
            FROM unnest($2::text[], $3::text[], $4::text[]) AS n(tenant_id, kind, value)
            JOIN unnest($5::text[], $6::bigint[]) AS most(kind, most) USING (kind)
            WHERE NOT EXISTS (
                SELECT
                FROM usage_label AS l
                WHERE l.tenant_id = n.tenant_id AND l.month = $1 AND l.kind = n.kind AND l.value = n.value
            )
        ),
        kept AS (
            INSERT INTO usage_label (tenant_id, month, kind, value)
            SELECT tenant_id, $1, kind, value
            FROM missing
            WHERE number <= most
            ORDER BY tenant_id, kind, value
            ON CONFLICT DO NOTHING
        )
        SELECT tenant_id, kind, value
        FROM missing
        WHERE number > most
        """,
        now.date().replace(day=1),
        *map(list, zip(*wanted, strict=True)),
        list(MOST),
        list(MOST.values()),
    )
    return {_Value(*row) for row in rows}
