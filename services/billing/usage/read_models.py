"""The sums that follow from usage, the ledger and the journal. Their writers are `aggregates`, `deliveries`, `accounts`
and `journal`, in the transaction of the rows that they sum. A scope is a tenant."""

from __future__ import annotations

from infra.postgres.read_models import ReadModel, rebuilt_by_query
from services.billing.credit import journal
from services.billing.rating.domain import MESSAGE
from services.billing.usage.aggregates import COLUMNS, KEY, REBUILT


def _of_tenants(name: str, table: str, key: tuple[str, ...], columns: tuple[str, ...], rows: str) -> ReadModel:
    return ReadModel(
        name=name,
        table=table,
        key=key,
        columns=columns,
        scopes="SELECT tenant_id FROM account WHERE tenant_id > $1 ORDER BY tenant_id LIMIT $2",
        total="SELECT count(*) FROM account",
        # Usage is held until its tenant has an account, but its messages are counted at once.
        strays=f"""
            SELECT DISTINCT tenant_id FROM "{table}" AS l
            WHERE NOT EXISTS (SELECT FROM account AS a WHERE a.tenant_id = l.tenant_id)
            LIMIT $1
        """,
        in_scope="l.tenant_id = ANY($1::text[])",
        rebuild=rebuilt_by_query(rows),
        whole=table != "account",
        # A tenant may have millions of records.
        batch=1,
    )


READ_MODELS = (
    _of_tenants(
        "usage_buckets",
        "usage_bucket",
        KEY,
        COLUMNS,
        REBUILT,
    ),
    _of_tenants(
        "delivered",
        "delivered",
        ("tenant_id", "day", "channel_id"),
        ("messages",),
        f"""
        SELECT tenant_id, (occurred_at AT TIME ZONE 'UTC')::date AS day,
               channel_id, count(*) AS messages
        FROM (
            SELECT tenant_id, occurred_at, channel_id FROM usage WHERE resource = '{MESSAGE}'
            UNION ALL
            SELECT d.tenant_id, d.occurred_at, u.channel_id
            FROM duplicate AS d JOIN usage AS u USING (tenant_id, usage_id)
            WHERE d.resource = '{MESSAGE}'
            UNION ALL
            SELECT tenant_id, hour, channel_id
            FROM deleted_usage, generate_series(1, records)
            WHERE resource = '{MESSAGE}' AND meter = 'messages'
        ) AS message
        WHERE tenant_id = ANY($1::text[]) AND channel_id <> ''
        GROUP BY 1, 2, 3
        """,
    ),
    _of_tenants(
        "balances",
        "account",
        ("tenant_id",),
        ("credit_nanos", "debited_nanos"),
        """
        SELECT a.tenant_id,
               -- null: the tenant has no limit, and its credit has no entries
               CASE WHEN a.credit_nanos IS NOT NULL THEN
                   coalesce(sum(e.amount_nanos) FILTER (WHERE e.kind IN ('credit', 'expiry')), 0)
               END AS credit_nanos,
               coalesce(-sum(e.amount_nanos) FILTER (WHERE e.kind IN ('charge', 'correction')), 0) AS debited_nanos
        FROM account AS a LEFT JOIN ledger_entry AS e USING (tenant_id)
        WHERE a.tenant_id = ANY($1::text[])
        GROUP BY a.tenant_id
        """,
    ),
    _of_tenants(
        "journal_balances",
        "journal_balance",
        ("tenant_id", "account", "part"),
        ("nanos",),
        journal.BALANCES.format("e.tenant_id = ANY($1::text[])"),
    ),
)
