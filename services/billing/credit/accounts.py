"""Accounts and their ledger, in the tables ``account`` and ``ledger_entry``.

Every transaction that moves money locks the account's row first, then its holds, so changes of one tenant's money
take turns. For every account, the sum of its entries equals its credit minus its debits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from uuid import UUID

from infra.errors import InvalidMessage, NotFound
from infra.postgres.tx import Tx
from protos.catalog import NOTIFICATION_EMAIL, PLATFORM_EVENTS
from protos.messages.billing import BudgetThresholdPassed, QuotaExhausted
from protos.messages.notification import Attachment, SendEmail
from services.billing.credit import grants
from services.billing.credit.journal import JournalAccount
from services.billing.rating.domain import Account

# 10¹⁸ nano-units are one thousand million units. A grant is a bigint, which would overflow at nine times that.
MAX_CREDIT_NANOS = 10**18


@dataclass(frozen=True)
class Entry:
    """A line of the ledger."""

    tenant_id: str
    kind: str
    amount_nanos: int
    """Above zero: in the tenant's favour, such as credit. Below zero: against the tenant, such as a charge."""
    usage_id: str | None = None
    price_version: str | None = None
    reason: str = ""
    actor: str = "billing"
    period: int = 0
    """The period whose invoice has it. 0: none, so grants cover it."""


CURRENCIES = "SELECT ROW(tenant_id, currency) FROM account WHERE tenant_id = ANY((SELECT {}::text[])::text[])"


async def currencies(tx: Tx, tenant_ids: Iterable[str]) -> Mapping[str, str]:
    """Returns tenant → currency, for the tenants that have an account.

    For a tenant without an account it locks the opening of the account until this transaction ends. The transaction
    that opens the account waits for that lock, and then finds the records that this transaction held.
    """
    wanted = sorted(set(tenant_ids))
    rows = await tx.sql(CURRENCIES.format("$1"), wanted)
    return await with_opened(tx, wanted, dict(row for (row,) in rows))


async def with_opened(tx: Tx, wanted: Sequence[str], found: dict[str, str]) -> Mapping[str, str]:
    """Completes `found`, which is from `CURRENCIES`, as `currencies` does for tenants without an account. `wanted` is
    sorted."""
    for tenant_id in wanted:
        if tenant_id not in found:
            await _lock_opening(tx, tenant_id)
            if code := await currency(tx, tenant_id):
                found[tenant_id] = code
    return found


async def currency(tx: Tx, tenant_id: str) -> str | None:
    """Returns None if the tenant has no account."""
    rows = await tx.sql("SELECT currency FROM account WHERE tenant_id = $1", tenant_id)
    return str(rows[0][0]) if rows else None


async def _lock_opening(tx: Tx, tenant_id: str) -> None:
    await tx.take_turn(f"billing account {tenant_id}")


async def open_account(tx: Tx, tenant_id: str, code: str, credit_nanos: int | None) -> bool:
    """Opens the tenant's account with its first credit. Returns False and changes nothing if the account exists."""
    if credit_nanos is not None and not 0 <= credit_nanos <= MAX_CREDIT_NANOS:
        raise InvalidMessage("credit_nanos", f"must be from 0 to {MAX_CREDIT_NANOS}")
    await _lock_opening(tx, tenant_id)
    if not await tx.sql(
        """
        INSERT INTO account (tenant_id, currency, credit_nanos) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING
        RETURNING tenant_id
        """,
        tenant_id,
        code,
        credit_nanos,
    ):
        return False
    if credit_nanos:
        await write_entries(tx, [Entry(tenant_id, "credit", credit_nanos, reason="first credit")])
        await grants.add(tx, tenant_id, credit_nanos, kind="promotional", reason="first credit", actor="billing")
    return True


def as_account(credit: Decimal | None, debited: Decimal) -> Account:
    """The account of its columns, which are whole numbers without an upper limit."""
    return Account(None if credit is None else int(credit), int(debited))


async def lock(tx: Tx, tenant_ids: Iterable[str]) -> dict[str, tuple[str, Account]]:
    """Locks the accounts of these tenants until the transaction ends.

    Returns tenant → (currency, account), for the tenants that have an account.
    """
    # Rows are locked in the order of their key. Two batches that share tenants would otherwise deadlock.
    rows = await tx.sql(
        """
        SELECT tenant_id, currency, credit_nanos, debited_nanos
        FROM account
        WHERE tenant_id = ANY($1::text[])
        ORDER BY tenant_id
        FOR UPDATE
        """,
        sorted(set(tenant_ids)),
    )
    return {tenant_id: (code, as_account(credit, debited)) for tenant_id, code, credit, debited in rows}


async def lock_one(tx: Tx, tenant_id: str) -> tuple[str, Account]:
    """Locks one account as `lock` does, and ends its expired grants. Raises NotFound if the tenant has no account."""
    rows = await tx.sql(
        """
        SELECT currency, credit_nanos, debited_nanos, next_expiry <= clock_timestamp()
        FROM account
        WHERE tenant_id = $1
        FOR UPDATE
        """,
        tenant_id,
    )
    if not rows:
        raise NotFound(f"tenant {tenant_id} has no account")
    [(code, credit, debited, expired)] = rows
    before = as_account(credit, debited)
    if not expired:
        return code, before
    await grants.settle(tx, tenant_id)
    _, after = (await lock(tx, [tenant_id]))[tenant_id]
    notify(tx, tenant_id, code, before, after)
    return code, after


async def add_credit(
    tx: Tx,
    tenant_id: str,
    amount_nanos: int,
    *,
    reason: str,
    actor: str,
    kind: grants.Kind = "promotional",
    priority: int = grants.DEFAULT_PRIORITY,
    expires_at: datetime | None = None,
    rollover_until: datetime | None = None,
    rollover_nanos: int | None = None,
    source: JournalAccount | None = None,
    field: str = "amount_nanos",
) -> UUID:
    """Adds a grant to an account and, if the account has a limit, raises the limit by it. Returns the grant's id.

    Raises NotFound if there is no account, and InvalidMessage if the credit would exceed MAX_CREDIT_NANOS. `field`:
    the name of the amount in the request.
    """
    _, account = await lock_one(tx, tenant_id)
    await grants.settle(tx, tenant_id)
    if amount_nanos > await room(tx, tenant_id, account):
        raise InvalidMessage(field, f"the credit would exceed {MAX_CREDIT_NANOS}")
    await change_limit(tx, tenant_id, amount_nanos, reason=reason, actor=actor)
    return await grants.add(
        tx,
        tenant_id,
        amount_nanos,
        kind=kind,
        reason=reason,
        actor=actor,
        priority=priority,
        expires_at=expires_at,
        rollover_until=rollover_until,
        rollover_nanos=rollover_nanos,
        source=source,
    )


async def room(tx: Tx, tenant_id: str, account: Account) -> int:
    """Returns how much credit may be added. The caller has locked the account and settled its grants."""
    # The spent part does not count: the credit of a whole life may be larger. Without a limit there are grants, too.
    return MAX_CREDIT_NANOS - max(account.balance_nanos or 0, await grants.left(tx, tenant_id))


async def change_limit(tx: Tx, tenant_id: str, nanos: int, *, reason: str, actor: str) -> None:
    """Raises the limit of an account that has one or, below zero, lowers it. The caller has locked the account."""
    if not nanos:
        return
    rows = await tx.sql(
        """
        UPDATE account
        SET credit_nanos = credit_nanos + $2
        WHERE tenant_id = $1 AND credit_nanos IS NOT NULL
        RETURNING currency, credit_nanos, debited_nanos
        """,
        tenant_id,
        nanos,
    )
    for code, credit, debited in rows:
        await write_entries(tx, [Entry(tenant_id, "credit", nanos, reason=reason, actor=actor)])
        notify(tx, tenant_id, code, as_account(credit - nanos, debited), as_account(credit, debited))


async def debit(tx: Tx, entries: Sequence[Entry]) -> None:
    """Books entries (charges and corrections) and notifies each tenant whose debit passes a threshold of its credit.

    The accounts must exist. They stay locked until the transaction ends, so the caller may close holds afterwards.
    """
    due: dict[str, int] = {}
    invoiced: dict[str, int] = {}
    for entry in entries:
        due[entry.tenant_id] = due.get(entry.tenant_id, 0) - entry.amount_nanos
        in_period = -entry.amount_nanos if entry.period else 0
        invoiced[entry.tenant_id] = invoiced.get(entry.tenant_id, 0) + in_period
    locked = await lock(tx, due)
    await tx.sql(
        """
        UPDATE account AS a
        SET debited_nanos = a.debited_nanos + n.amount, invoiced_nanos = a.invoiced_nanos + n.invoiced
        FROM unnest($1::text[], $2::bigint[], $3::bigint[]) AS n(tenant_id, amount, invoiced)
        WHERE a.tenant_id = n.tenant_id
        """,
        list(due),
        list(due.values()),
        list(invoiced.values()),
    )
    await write_entries(tx, entries)
    for tenant_id, amount in due.items():
        code, before = locked[tenant_id]
        after, _ = before.debit(amount)
        notify(tx, tenant_id, code, before, after)


def notify(tx: Tx, tenant_id: str, code: str, before: Account, after: Account) -> None:
    """Notifies a tenant if a change of its account passes a threshold of its credit."""
    for threshold in before.passed(after):
        _notify_tenant(tx, tenant_id, code, after, exhausted=threshold == "exhausted")


async def write_entries(tx: Tx, entries: Sequence[Entry]) -> None:
    await tx.sql(
        """
        INSERT INTO ledger_entry (tenant_id, kind, amount_nanos, usage_id, price_version, reason, actor, period)
        SELECT *
        FROM unnest($1::text[], $2::text[], $3::bigint[], $4::text[], $5::text[], $6::text[], $7::text[], $8::bigint[])
        """,
        [entry.tenant_id for entry in entries],
        [entry.kind for entry in entries],
        [entry.amount_nanos for entry in entries],
        [entry.usage_id for entry in entries],
        [entry.price_version for entry in entries],
        [entry.reason for entry in entries],
        [entry.actor for entry in entries],
        [entry.period for entry in entries],
    )


def _notify_tenant(tx: Tx, tenant_id: str, code: str, account: Account, *, exhausted: bool) -> None:
    balance = account.balance_nanos
    assert balance is not None
    if exhausted:
        publish(tx, QuotaExhausted(tenant_id=tenant_id, currency=code, balance_nanos=balance))
    else:
        text = (
            f"90 % of your credit is spent or has expired. Remaining credit: {format_units(balance)} {code}.\n\n"
            "When no credit is left, your agents refuse new work until credit is added.\n"
        )
        send_mail(tx, tenant_id, "Your budget is nearly spent", text)


def publish(tx: Tx, event: QuotaExhausted | BudgetThresholdPassed) -> None:
    """Publishes a fact about a tenant. The transaction may be one of many tenants."""
    former, tx.tenant_id = tx.tenant_id, event.tenant_id
    tx.publish(PLATFORM_EVENTS, event, key=event.tenant_id)
    tx.tenant_id = former


def send_mail(tx: Tx, tenant_id: str, subject: str, text: str, attachment: Attachment | None = None) -> None:
    """Sends a mail to the tenant's address. The transaction may be one of many tenants."""
    former, tx.tenant_id = tx.tenant_id, tenant_id
    tx.send(NOTIFICATION_EMAIL, SendEmail(to="", subject=subject, text=text, attachment=attachment))
    tx.tenant_id = former


def format_units(nanos: int) -> str:
    """Formats nano-units as a decimal number of units: ``12.5``."""
    whole, rest = divmod(abs(nanos), 10**9)
    return f"{'-' if nanos < 0 else ''}{whole}.{rest:09}".rstrip("0").rstrip(".")
