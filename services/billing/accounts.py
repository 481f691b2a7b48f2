"""Accounts and their ledger, in the tables ``account`` and ``ledger_entry``.

Whatever moves an account locks its row first, then its holds: all that changes one tenant's money takes turns. For
every account, the sum of its entries is its credit less what was debited.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from infra.errors import Conflict, InvalidMessage, NotFound
from infra.postgres.tx import Tx
from protos.catalog import NOTIFICATION_EMAIL, PLATFORM_EVENTS
from protos.messages.billing import QuotaExhausted
from protos.messages.notification import SendEmail
from services.billing.domain import Account

# 10¹⁸ nano-units are a thousand million: beyond it, sums would leave the database's integers.
MAX_CREDIT_NANOS = 10**18


@dataclass(frozen=True)
class Entry:
    """A line of the ledger. amount_nanos: above zero in the tenant's favour, as credit is; a charge is below."""

    tenant_id: str
    kind: str
    amount_nanos: int
    usage_id: str | None = None
    price_version: str | None = None
    reason: str = ""
    actor: str = "billing"


async def currencies(tx: Tx, tenant_ids: Iterable[str]) -> Mapping[str, str]:
    """The currency by tenant, of those that have an account.

    A tenant that has none gets none before this transaction ends: whoever opens it waits, and then sees what this
    transaction left for it.
    """
    wanted = sorted(set(tenant_ids))
    rows = await tx.sql("SELECT tenant_id, currency FROM account WHERE tenant_id = ANY($1::text[])", wanted)
    found = {tenant_id: code for tenant_id, code in rows}
    for tenant_id in wanted:
        if tenant_id not in found:
            await _wait_for_opening(tx, tenant_id)
            if code := await currency(tx, tenant_id):
                found[tenant_id] = code
    return found


async def currency(tx: Tx, tenant_id: str) -> str | None:
    """None where the tenant has no account."""
    rows = await tx.sql("SELECT currency FROM account WHERE tenant_id = $1", tenant_id)
    return str(rows[0][0]) if rows else None


async def _wait_for_opening(tx: Tx, tenant_id: str) -> None:
    await tx.sql("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"billing account {tenant_id}")


async def open_account(tx: Tx, tenant_id: str, code: str, credit_nanos: int | None) -> bool:
    """Opens the tenant's account with its first credit; False where it is open already, and nothing is changed."""
    if credit_nanos is not None and not 0 <= credit_nanos <= MAX_CREDIT_NANOS:
        raise InvalidMessage("credit_nanos", f"must be from 0 to {MAX_CREDIT_NANOS}")
    await _wait_for_opening(tx, tenant_id)
    if not await tx.sql(
        "INSERT INTO account (tenant_id, currency, credit_nanos) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING "
        "RETURNING tenant_id",
        tenant_id,
        code,
        credit_nanos,
    ):
        return False
    if credit_nanos:
        await write_entries(tx, [Entry(tenant_id, "credit", credit_nanos, reason="first credit")])
    return True


async def lock(tx: Tx, tenant_ids: Iterable[str]) -> dict[str, tuple[str, Account]]:
    """Locks these accounts until the transaction ends; currency and state by tenant, of those that exist."""
    rows = await tx.sql(
        # In one order: two batches that share tenants wait for each other, never in a circle.
        "SELECT tenant_id, currency, credit_nanos, debited_nanos FROM account WHERE tenant_id = ANY($1::text[]) "
        "ORDER BY tenant_id FOR UPDATE",
        sorted(set(tenant_ids)),
    )
    return {tenant_id: (code, Account(credit, debited)) for tenant_id, code, credit, debited in rows}


async def lock_one(tx: Tx, tenant_id: str) -> tuple[str, Account]:
    """As `lock`. Raises NotFound where the tenant has no account."""
    locked = await lock(tx, [tenant_id])
    if tenant_id not in locked:
        raise NotFound(f"tenant {tenant_id} has no account")
    return locked[tenant_id]


async def add_credit(tx: Tx, tenant_id: str, amount_nanos: int, *, reason: str, actor: str) -> None:
    """Raises NotFound without an account, Conflict where it is without limit, InvalidMessage beyond any sense."""
    _, account = await lock_one(tx, tenant_id)
    if account.credit_nanos is None:
        raise Conflict(f"tenant {tenant_id} may spend without limit, there is no credit to add to")
    if account.credit_nanos + amount_nanos > MAX_CREDIT_NANOS:
        raise InvalidMessage("amount_nanos", f"the credit would exceed {MAX_CREDIT_NANOS}")
    await tx.sql("UPDATE account SET credit_nanos = credit_nanos + $2 WHERE tenant_id = $1", tenant_id, amount_nanos)
    await write_entries(tx, [Entry(tenant_id, "credit", amount_nanos, reason=reason, actor=actor)])


async def debit(tx: Tx, entries: Sequence[Entry]) -> None:
    """Books entries (charges and corrections) on their accounts, and tells once whose credit runs out or has run out.

    The accounts exist. Holds that the charges close are closed after this: the accounts are locked from here on.
    """
    due: dict[str, int] = {}
    for entry in entries:
        due[entry.tenant_id] = due.get(entry.tenant_id, 0) - entry.amount_nanos
    locked = await lock(tx, due)
    await tx.sql(
        "UPDATE account AS a SET debited_nanos = a.debited_nanos + n.amount "
        "FROM unnest($1::text[], $2::bigint[]) AS n(tenant_id, amount) WHERE a.tenant_id = n.tenant_id",
        list(due),
        list(due.values()),
    )
    await write_entries(tx, entries)
    for tenant_id, amount in due.items():
        code, before = locked[tenant_id]
        after, passed = before.debit(amount)
        for mark in passed:
            _tell(tx, tenant_id, code, after, exhausted=mark == "exhausted")


async def write_entries(tx: Tx, entries: Sequence[Entry]) -> None:
    await tx.sql(
        "INSERT INTO ledger_entry (tenant_id, kind, amount_nanos, usage_id, price_version, reason, actor) "
        "SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[])",
        [entry.tenant_id for entry in entries],
        [entry.kind for entry in entries],
        [entry.amount_nanos for entry in entries],
        [entry.usage_id for entry in entries],
        [entry.price_version for entry in entries],
        [entry.reason for entry in entries],
        [entry.actor for entry in entries],
    )


def _tell(tx: Tx, tenant_id: str, code: str, account: Account, *, exhausted: bool) -> None:
    balance = account.balance_nanos
    assert balance is not None
    # A batch has records of many tenants: what it sends belongs to the one it is about.
    former, tx.tenant_id = tx.tenant_id, tenant_id
    if exhausted:
        event = QuotaExhausted(tenant_id=tenant_id, currency=code, balance_nanos=balance)
        tx.publish(PLATFORM_EVENTS, event, key=tenant_id)
    else:
        text = (
            f"90 % of your credit has been used. What is left: {in_units(balance)} {code}.\n\n"
            "When nothing is left, your agents refuse new work until credit is added.\n"
        )
        tx.send(NOTIFICATION_EMAIL, SendEmail(to="", subject="Your budget is nearly spent", text=text))
    tx.tenant_id = former


def in_units(nanos: int) -> str:
    """Nano-units as a decimal number of units: ``12.5``."""
    whole, rest = divmod(abs(nanos), 10**9)
    return f"{'-' if nanos < 0 else ''}{whole}.{rest:09}".rstrip("0").rstrip(".")
