"""The general ledger, in the tables ``journal_entry`` and ``journal_line``. It only grows.

A line debits an account above zero and credits it below zero. The database refuses an entry whose lines do not add up
to zero. A mistake is corrected by a new entry.

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


async def post(
    tx: Tx, tenant_id: str, kind: str, reference: str, amounts: dict[JournalAccount, int], *, reason: str, actor: str
) -> None:
    """Books one entry: account → nano-units, debits above zero. Books nothing if all amounts are zero."""
    lines = sorted((account, nanos) for account, nanos in amounts.items() if nanos)
    if not lines:
        return
    await tx.sql(
        """
        WITH made AS (
            INSERT INTO journal_entry (tenant_id, kind, reference, reason, actor)
            VALUES ($1, $2, $3, $4, $5)
            RETURNING tenant_id, entry
        )
        INSERT INTO journal_line (tenant_id, entry, account, amount_nanos)
        SELECT made.tenant_id, made.entry, n.account, n.amount
        FROM made, unnest($6::text[], $7::bigint[]) AS n(account, amount)
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


async def balances(tx: Tx, tenant_id: str | None) -> dict[str, int]:
    """Returns account → sum of its lines, of a tenant or of all tenants."""
    rows = await tx.sql(
        """
        SELECT account, sum(amount_nanos)::text
        FROM journal_line
        WHERE $1::text IS NULL OR tenant_id = $1
        GROUP BY account
        ORDER BY account
        """,
        tenant_id,
    )
    return {account: int(total) for account, total in rows}
