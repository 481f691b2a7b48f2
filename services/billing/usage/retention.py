"""Deletes old holds and old usage records. The sums of the records stay in ``deleted_usage``, by the key of the buckets
and with the hash of the records, so that a bucket can still be compared, and rebuilt: it equals its deleted and its
stored records together.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from infra.postgres.tx import Tx
from services.billing.credit import accounts
from services.billing.rating.domain import MAX_AGE, MESSAGE
from services.billing.usage.aggregates import added, summed

KEPT = MAX_AGE + timedelta(days=1)
"""A record that is delivered again after its deletion is older than MAX_AGE. It is held for review, so it is not
counted twice."""
# Records of one transaction, which keeps the account locked for about a quarter of a second.
PAGE = 2_000

# Records of `u` that may be deleted. Held ones are not decided yet. The number of delivered messages is verified by all
# their records, and the sums have only the counted ones. Repeats of the last weeks belong to the reconciliation.
_OLD = f"""
    u.occurred_at < $1 AND u.rated_at < $1 AND (u.verdict = 'counted' OR u.verdict = 'rejected' AND
    u.resource <> '{MESSAGE}') AND NOT EXISTS (
        SELECT FROM duplicate AS d
        WHERE d.tenant_id = u.tenant_id AND d.usage_id = u.usage_id
          AND (d.rated_at >= $1 OR u.resource = '{MESSAGE}')
    )
"""

_MEASURES = """(
    SELECT * FROM measure WHERE tenant_id = $2 AND usage_id = ANY(ARRAY(TABLE old))
    UNION ALL
    SELECT * FROM correction_measure WHERE tenant_id = $2 AND usage_id = ANY(ARRAY(TABLE old))
) AS m"""


def kept_since(now: datetime) -> datetime:
    """The midnight (UTC) before which records are deleted."""
    return now.replace(hour=0, minute=0, second=0, microsecond=0) - KEPT


async def due(tx: Tx, before: datetime, most: int) -> list[str]:
    """Returns tenants that have records to delete."""
    rows = await tx.sql(
        f"""
        SELECT tenant_id
        FROM account AS a
        WHERE EXISTS (SELECT FROM usage AS u WHERE u.tenant_id = a.tenant_id AND {_OLD})
        LIMIT $2
        """,
        before,
        most,
    )
    return [tenant_id for (tenant_id,) in rows]


async def delete(tx: Tx, tenant_id: str, before: datetime) -> int:
    """Deletes up to PAGE records that occurred and were decided before a time, with their repeats. Returns their
    number."""
    # No re-rating may book a correction of one of these records at the same time: the sums would not have it.
    await accounts.lock(tx, [tenant_id])
    [(deleted,)] = await tx.sql(
        # Arrays keep one look-up by key for each record, also while the tables have no statistics.
        f"""
        WITH old AS MATERIALIZED (
            SELECT u.usage_id
            FROM usage AS u
            WHERE u.tenant_id = $2 AND {_OLD}
            ORDER BY u.occurred_at
            LIMIT {PAGE}
        ),
        summed AS (
            {added("deleted_usage", summed(_MEASURES))}
        ),
        repeats AS (
            DELETE FROM duplicate WHERE tenant_id = $2 AND usage_id = ANY(ARRAY(TABLE old))
        ),
        corrections AS (
            UPDATE usage_correction SET summed = true WHERE tenant_id = $2 AND usage_id = ANY(ARRAY(TABLE old))
        ),
        deleted AS (
            DELETE FROM usage WHERE tenant_id = $2 AND usage_id = ANY(ARRAY(TABLE old)) RETURNING 1
        )
        SELECT count(*) FROM deleted
        """,
        before,
        tenant_id,
    )
    return int(deleted)


async def delete_holds(tx: Tx, before: datetime) -> None:
    """Deletes up to PAGE holds, of all tenants, that ended or expired before a time. An open one of a record that is
    held for review never expires."""
    await tx.sql(
        # Skips rows that a request for a hold or a charge has locked: those lock them in another order.
        f"""
        DELETE FROM hold
        WHERE (tenant_id, hold_id) IN (
            SELECT tenant_id, hold_id FROM hold
            WHERE least(expires_at, ended_at) < $1
            LIMIT {PAGE}
            FOR UPDATE SKIP LOCKED
        )
        """,
        before,
    )
