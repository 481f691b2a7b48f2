"""The general ledger, in the tables ``journal_entry`` and ``journal_line``. It only grows.

A line debits an account above zero and credits it below zero. The database refuses an entry whose lines do not add up
to zero. A mistake is corrected by a new entry.

The table ``journal_balance`` has the sum of each account's lines, and changes with each entry.

The charges of single usage records are in ``ledger_entry``. They come into the journal as revenue when an invoice is
finalised or, for a tenant without a subscription, when a grant covers them.
"""

from __future__ import annotations

from typing import Literal

from infra.postgres.tx import Tx

JournalAccount = Literal[
    "cash",  # money that a payment provider or a bank has received for us
    "receivable",  # finalised and not paid
    "revenue",
    "tax",  # owed to the state
    "prepaid",  # owed to tenants: credit that they have paid for
    "purchased",  # owed to tenants: credit that they have bought; the tax on it is paid
    "promotional_credit",  # owed to tenants: credit that they were given
    "promotional_cost",
    "write_off",
    "disputed",  # taken back by a bank until the dispute is decided
    "rounding",  # the difference between exact amounts and minor units
]


CORRECTIONS = "corrections of earlier usage"
# The parts of a balance that are read by themselves: those of an entry `e`.
_PART = f"""
    CASE
        WHEN e.kind LIKE 'payment\\_%' THEN 'payments'
        WHEN e.kind = 'burn' AND e.reference = 'usage'
             OR e.kind = 'grant' AND e.reason = '{CORRECTIONS}' AND e.actor = 'billing' THEN 'usage'
        ELSE ''
    END
"""
# The balances, computed from the lines. It takes a condition on the entry `e`.
BALANCES = f"""
SELECT e.tenant_id, l.account, {_PART} AS part, sum(l.amount_nanos) AS nanos
FROM journal_entry AS e
JOIN journal_line AS l USING (tenant_id, entry)
WHERE {{}}
GROUP BY 1, 2, 3
ORDER BY 1, 2, 3
"""


async def post(
    tx: Tx, tenant_id: str, kind: str, reference: str, amounts: dict[JournalAccount, int], *, reason: str, actor: str
) -> None:
    """Books one entry: account → nano-units, debits above zero. Books nothing if all amounts are zero.

    The caller has locked the tenant's account.
    """
    lines = sorted((account, nanos) for account, nanos in amounts.items() if nanos)
    if not lines:
        return
    await tx.sql(
        f"""
        WITH e AS (
            INSERT INTO journal_entry (tenant_id, kind, reference, reason, actor)
            VALUES ($1, $2, $3, $4, $5)
            RETURNING *
        ),
        line AS (
            INSERT INTO journal_line (tenant_id, entry, account, amount_nanos)
            SELECT e.tenant_id, e.entry, n.account, n.amount
            FROM e, unnest($6::text[], $7::bigint[]) AS n(account, amount)
            RETURNING account, amount_nanos
        )
        INSERT INTO journal_balance AS b (tenant_id, account, part, nanos)
        SELECT e.tenant_id, line.account, {_PART}, line.amount_nanos
        FROM e, line
        ORDER BY line.account
        ON CONFLICT (tenant_id, account, part) DO UPDATE SET nanos = b.nanos + excluded.nanos
        """,
        tenant_id,
        kind,
        reference,
        reason,
        actor,
        [account for account, _ in lines],
        [nanos for _, nanos in lines],
    )


async def cash_entries(tx: Tx, tenant_id: str, reference: str) -> list[tuple[str, int]]:
    """Returns (reason, received nano-units) of the entries with a reference that moved cash."""
    rows = await tx.sql(
        """
        SELECT reason, amount_nanos
        FROM journal_entry
        JOIN journal_line USING (tenant_id, entry)
        WHERE tenant_id = $1 AND reference = $2 AND account = 'cash'
        ORDER BY entry
        """,
        tenant_id,
        reference,
    )
    return [(reason, nanos) for reason, nanos in rows]


async def balances(tx: Tx, tenant_id: str | None, part: Literal["payments", "usage"] | None = None) -> dict[str, int]:
    """Returns account → sum of its lines, of a tenant or of all tenants.

    part: only of the entries about payments by a provider, or of those by which grants cover usage outside of the time
    of a subscription.
    """
    rows = await tx.sql(
        """
        SELECT account, sum(nanos)::text
        FROM journal_balance
        WHERE ($1::text IS NULL OR tenant_id = $1) AND ($2::text IS NULL OR part = $2)
        GROUP BY account
        ORDER BY account
        """,
        tenant_id,
        part,
    )
    return {account: int(total) for account, total in rows}
