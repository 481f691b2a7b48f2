"""Grants of credit, in the table ``credit_grant``. They are burned by priority (low numbers first), expiry, then age.

Usage outside of the time of a subscription burns grants by its price; usage of a subscription's period burns them when
its invoice is finalised, those that were bought first: the tax on them was paid at the sale, so they reduce the amount
before tax. If a grant expires before, the part for the usage until then is kept for the invoice, in the
table ``kept_credit``. Burning is computed lazily: between two changes of the set of grants the order of burning is
the same, so the debits since the last change are burned together at the next one. The caller holds the account's lock.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Literal, NamedTuple
from uuid import UUID

from pydantic import BaseModel

from infra.clock import uuid7
from infra.postgres.tx import Tx
from services.billing.credit import journal
from services.billing.credit.journal import JournalAccount

Kind = Literal["prepaid", "promotional", "purchased"]
DEFAULT_PRIORITY = 100
_OWED: dict[str, JournalAccount] = {
    "prepaid": "prepaid",
    "promotional": "promotional_credit",
    "purchased": "purchased",
}

# The sum of holds. Nothing bounds those of an account without a limit.
HELD = "least(coalesce(sum(held_nanos), 0), 4e18)::bigint"


class Grant(BaseModel):
    id: UUID
    tenant_id: str
    kind: Kind
    nanos: int
    left_nanos: int
    """Without the part that is kept for invoices of usage before `expires_at`."""
    frozen_nanos: int
    """The part that cannot be used while a bank has its money because of a dispute."""
    invoice_id: UUID | None
    """The invoice of the sale, of purchased credit."""
    priority: int
    expires_at: datetime | None
    """Null: never."""
    expired_nanos: int
    """The part that nothing had burned when it expired."""
    rollover_until: datetime | None
    """The rest at `expires_at` becomes a grant until then. Null: nothing, or that has been made."""
    rollover_nanos: int | None
    """The largest amount that is rolled over. Null: the whole rest."""
    reason: str
    actor: str
    made_at: datetime


async def add(
    tx: Tx,
    tenant_id: str,
    nanos: int,
    *,
    kind: Kind,
    reason: str,
    actor: str,
    priority: int = DEFAULT_PRIORITY,
    expires_at: datetime | None = None,
    rollover_until: datetime | None = None,
    rollover_nanos: int | None = None,
    source: JournalAccount | None = None,
    invoice_id: UUID | None = None,
) -> UUID:
    """Adds a grant and books it. Does not change the credit limit of the account: `accounts.add_credit` does.

    `source`: the account that pays for it. None: cash for prepaid credit, our cost for promotional credit.
    """
    grant_id = uuid7()
    await tx.sql(
        """
        INSERT INTO credit_grant (tenant_id, grant_id, kind, nanos, left_nanos, priority, expires_at, reason, actor,
                                  rollover_until, rollover_nanos, invoice_id)
        VALUES ($1, $2, $3, $4, $4, $5, coalesce($6, 'infinity'::timestamptz), $7, $8, $9, $10, $11)
        """,
        tenant_id,
        grant_id,
        kind,
        nanos,
        priority,
        expires_at,
        reason,
        actor,
        rollover_until,
        rollover_nanos,
        invoice_id,
    )
    if expires_at:
        await tx.sql(
            "UPDATE account SET next_expiry = least(next_expiry, $2) WHERE tenant_id = $1", tenant_id, expires_at
        )
    if source is None:
        source = "cash" if kind == "prepaid" else "promotional_cost"
    await journal.post(
        tx, tenant_id, "grant", str(grant_id), {source: nanos, _OWED[kind]: -nanos}, reason=reason, actor=actor
    )
    return grant_id


async def burn(
    tx: Tx, tenant_id: str, nanos: int, *, for_: JournalAccount, reference: str, only: Kind | None = None
) -> int:
    """Burns up to `nanos` of the grants, or of those of one kind, and books them: the amount owed to the tenant becomes
    `for_`. Returns the burned amount."""
    rows = await tx.sql(
        """
        SELECT grant_id, kind, left_nanos
        FROM credit_grant
        WHERE tenant_id = $1 AND left_nanos > 0 AND ($2::text IS NULL OR kind = $2)
        ORDER BY priority, expires_at, number
        -- The account's lock guards these rows; no other lock is needed.
        """,
        tenant_id,
        only,
    )
    burned: list[tuple[UUID, str, int]] = []
    for grant_id, kind, left in rows:
        if nanos <= 0:
            break
        taken = min(left, nanos)
        nanos -= taken
        burned.append((grant_id, kind, taken))
    if not burned:
        return 0
    await tx.sql(
        """
        UPDATE credit_grant AS g
        SET left_nanos = g.left_nanos - n.taken
        FROM unnest($2::uuid[], $3::bigint[]) AS n(grant_id, taken)
        WHERE g.tenant_id = $1 AND g.grant_id = n.grant_id
        """,
        tenant_id,
        [grant_id for grant_id, _, _ in burned],
        [taken for _, _, taken in burned],
    )
    total = sum(taken for _, _, taken in burned)
    amounts: dict[JournalAccount, int] = {for_: -total}
    for _, kind, taken in burned:
        amounts[_OWED[kind]] = amounts.get(_OWED[kind], 0) + taken
    await journal.post(tx, tenant_id, "burn", reference, amounts, reason="grants burned", actor="billing")
    return total


class Burned(NamedTuple):
    """Credit that was burned, in nano-units."""

    purchased: int
    prepaid: int
    promotional: int


async def burned(tx: Tx, tenant_id: str, reference: str) -> Burned:
    """Returns the credit that was burned for an invoice."""
    rows = await tx.sql(
        """
        SELECT account, sum(amount_nanos)::bigint
        FROM journal_entry
        JOIN journal_line USING (tenant_id, entry)
        WHERE tenant_id = $1 AND reference = $2 AND kind = 'burn'
        GROUP BY account
        """,
        tenant_id,
        reference,
    )
    return _burned(dict(rows))


def _burned(amounts: Mapping[str, int]) -> Burned:
    return Burned(*(amounts.get(_OWED[kind], 0) for kind in Burned._fields))


def given_back(nanos: int, purchased: int, paid: int, promotional: int) -> list[tuple[Kind, int]]:
    """Divides an amount that is given back into grants: up to `purchased` as purchased credit, then up to `paid` as
    prepaid and up to `promotional` as promotional credit. Any rest was paid in another way, and is prepaid, too."""
    taxed = min(nanos, max(0, purchased))
    rest = nanos - taxed
    free = min(max(0, rest - max(0, paid)), max(0, promotional))
    parts: list[tuple[Kind, int]] = [("purchased", taxed), ("prepaid", rest - free), ("promotional", free)]
    return [part for part in parts if part[1]]


async def left(tx: Tx, tenant_id: str, *, only: Kind | None = None) -> int:
    """Returns the sum of all grants that are left, or of those of one kind."""
    [(nanos,)] = await tx.sql(
        """
        SELECT coalesce(sum(left_nanos), 0)::bigint
        FROM credit_grant
        WHERE tenant_id = $1 AND ($2::text IS NULL OR kind = $2)
        """,
        tenant_id,
        only,
    )
    return int(nanos)


class PurchasedCredit(NamedTuple):
    """The unspent credit of a sale, in nano-units."""

    left: int
    frozen: int


async def purchased(tx: Tx, tenant_id: str, invoice_id: UUID) -> PurchasedCredit:
    [row] = await tx.sql(
        "SELECT left_nanos, frozen_nanos FROM credit_grant WHERE tenant_id = $1 AND invoice_id = $2",
        tenant_id,
        invoice_id,
    )
    return PurchasedCredit(*row)


async def set_purchased(tx: Tx, tenant_id: str, invoice_id: UUID, credit: PurchasedCredit) -> None:
    """Sets the unspent credit of a sale. Books nothing, and does not change the limit of the account."""
    await tx.sql(
        "UPDATE credit_grant SET left_nanos = $3, frozen_nanos = $4 WHERE tenant_id = $1 AND invoice_id = $2",
        tenant_id,
        invoice_id,
        *credit,
    )


async def settle(tx: Tx, tenant_id: str) -> None:
    """Burns the debits since the last settlement, and then ends and books the grants that have expired."""
    [(due, expired)] = await tx.sql(
        """
        SELECT debited_nanos - invoiced_nanos - burned_nanos, next_expiry <= clock_timestamp()
        FROM account
        WHERE tenant_id = $1
        """,
        tenant_id,
    )
    due = int(due)
    if covered := await burn(tx, tenant_id, due, for_="revenue", reference="usage"):
        await tx.sql("UPDATE account SET burned_nanos = burned_nanos + $2 WHERE tenant_id = $1", tenant_id, covered)
    elif due < 0:
        # Corrections have given back more than the usage since the last settlement. Grants had paid for the rest.
        covered_by = _burned(await journal.balances(tx, tenant_id, "usage"))
        for kind, nanos in given_back(-due, *covered_by):
            await add(tx, tenant_id, nanos, kind=kind, reason=journal.CORRECTIONS, actor="billing", source="revenue")
        await tx.sql("UPDATE account SET burned_nanos = burned_nanos + $2 WHERE tenant_id = $1", tenant_id, due)
    if expired:
        await _expire(tx, tenant_id)


async def _expire(tx: Tx, tenant_id: str) -> None:
    """Ends expired grants, or rolls them over. The second pass ends those whose rollover is over as well."""
    for _ in range(2):
        await _expire_once(tx, tenant_id)
    await tx.sql(
        """
        UPDATE account
        SET next_expiry = coalesce((
            -- The part that waits for holds is looked at again.
            SELECT min(CASE WHEN expires_at > clock_timestamp() THEN expires_at
                            ELSE clock_timestamp() + interval '1 minute' END)
            FROM credit_grant
            WHERE tenant_id = $1 AND left_nanos > 0
        ), 'infinity')
        WHERE tenant_id = $1
        """,
        tenant_id,
    )


async def _expire_once(tx: Tx, tenant_id: str) -> None:
    rows = await tx.sql(
        """
        SELECT grant_id, kind, expires_at, expires_at > clock_timestamp() - interval '1 day', left_nanos,
               CASE WHEN rollover_until IS NULL THEN 0 ELSE least(left_nanos, coalesce(rollover_nanos, left_nanos)) END
        FROM credit_grant
        WHERE tenant_id = $1 AND left_nanos > 0 AND expires_at <= clock_timestamp()
        ORDER BY priority, expires_at, number
        """,
        tenant_id,
    )
    # Work that is under way may still use the credit that it has reserved. No hold is open for more than a day.
    [(reserved,)] = await tx.sql(
        f"""
        SELECT {HELD}
        FROM hold
        WHERE tenant_id = $1 AND ended_at IS NULL AND expires_at > clock_timestamp()
        """,
        tenant_id,
    )
    for grant_id, kind, expires_at, is_new, left_nanos, rolled in rows:
        if rolled:
            await _roll_over(tx, tenant_id, grant_id, rolled)
        rest = left_nanos - rolled
        kept = await _keep(tx, tenant_id, grant_id, expires_at, rest)
        waits = min(rest - kept, reserved) if is_new else 0
        reserved -= waits
        gone = rest - kept - waits
        await tx.sql(
            """
            UPDATE credit_grant
            SET expired_nanos = expired_nanos + $3, left_nanos = left_nanos - $3 - $4, rollover_until = NULL,
                rollover_nanos = NULL
            WHERE tenant_id = $1 AND grant_id = $2
            """,
            tenant_id,
            grant_id,
            gone,
            kept + rolled,
        )
        if not gone:
            continue
        # Credit that was paid for and not used is ours now; credit that was given never cost us anything.
        to: JournalAccount = "promotional_cost" if kind == "promotional" else "revenue"
        await journal.post(
            tx, tenant_id, "expiry", str(grant_id), {_OWED[kind]: gone, to: -gone}, reason="expired", actor="billing"
        )
        await tx.sql(
            """
            INSERT INTO ledger_entry (tenant_id, kind, amount_nanos, usage_id, price_version, reason, actor)
            SELECT tenant_id, 'expiry', -$2::bigint, NULL, NULL, $3, 'billing'
            FROM account
            WHERE tenant_id = $1 AND credit_nanos IS NOT NULL
            """,
            tenant_id,
            gone,
            f"grant {grant_id} expired",
        )
        await tx.sql("UPDATE account SET credit_nanos = credit_nanos - $2 WHERE tenant_id = $1", tenant_id, gone)


async def _roll_over(tx: Tx, tenant_id: str, grant_id: UUID, nanos: int) -> None:
    """Makes a grant of the part that is rolled over. The parts that wait for holds and invoices stay in the old one, so
    they expire with it. The debt to the tenant stays the same, so nothing is booked."""
    await tx.sql(
        """
        INSERT INTO credit_grant (tenant_id, grant_id, kind, nanos, left_nanos, priority, expires_at, reason, actor)
        SELECT tenant_id, $3, kind, $4, $4, priority, rollover_until, $5, actor
        FROM credit_grant
        WHERE tenant_id = $1 AND grant_id = $2
        """,
        tenant_id,
        grant_id,
        uuid7(),
        nanos,
        f"rest of grant {grant_id}",
    )


async def _keep(tx: Tx, tenant_id: str, grant_id: UUID, expired_at: datetime, rest: int) -> int:
    """Keeps up to `rest` of an expired grant for the usage before its expiry (to the hour) whose invoice is not
    finalised. Returns the amount. The caller takes it off the grant."""
    rows = await tx.sql(
        """
        SELECT p.period, sum(b.quantity)::bigint - coalesce((
                   SELECT sum(k.nanos) FROM kept_credit AS k WHERE k.tenant_id = p.tenant_id AND k.period = p.period
               ), 0)::bigint
        FROM period AS p
        JOIN usage_bucket AS b ON b.tenant_id = p.tenant_id AND b.period = p.period
        WHERE p.tenant_id = $1 AND b.meter IN ('cost_nanos', 'correction_nanos') AND b.hour < $2 AND NOT EXISTS (
            SELECT FROM invoice AS i
            WHERE i.tenant_id = p.tenant_id AND i.period = p.period AND i.status <> 'draft'
        )
        GROUP BY p.tenant_id, p.period, p.begins
        ORDER BY p.begins, p.period
        """,
        tenant_id,
        expired_at,
    )
    kept = 0
    for period, missing in rows:
        nanos = min(missing, rest - kept)
        if nanos <= 0:
            continue
        kept += nanos
        await tx.sql(
            """
            INSERT INTO kept_credit AS k (tenant_id, period, grant_id, nanos)
            VALUES ($1, $2, $3, $4)
            ON CONFLICT (tenant_id, period, grant_id) DO UPDATE SET nanos = k.nanos + excluded.nanos
            """,
            tenant_id,
            period,
            grant_id,
            nanos,
        )
    return kept


async def give_kept_back(tx: Tx, tenant_id: str, invoice_id: UUID) -> None:
    """Gives the credit that was kept for an invoice back to its grants. The invoice burns it, and the rest of it
    expires at the next settlement."""
    await tx.sql(
        """
        WITH kept AS (
            DELETE FROM kept_credit
            WHERE tenant_id = $1 AND period = (SELECT period FROM invoice WHERE tenant_id = $1 AND invoice_id = $2)
            RETURNING grant_id, nanos
        ),
        given AS (
            UPDATE credit_grant AS g
            SET left_nanos = g.left_nanos + kept.nanos
            FROM kept
            WHERE g.tenant_id = $1 AND g.grant_id = kept.grant_id
        )
        UPDATE account
        SET next_expiry = '-infinity'
        WHERE tenant_id = $1 AND EXISTS (SELECT FROM kept)
        """,
        tenant_id,
        invoice_id,
    )


async def listed(
    tx: Tx, tenant_id: str, *, after: UUID | None, limit: int, grant_id: UUID | None = None
) -> list[Grant]:
    """Returns the grants after the id `after`, or the one with `grant_id`."""
    rows = await tx.sql(
        """
        SELECT grant_id, tenant_id, kind, nanos, left_nanos, frozen_nanos, invoice_id, priority,
               nullif(expires_at, 'infinity'), expired_nanos, rollover_until, rollover_nanos, reason, actor, made_at
        FROM credit_grant
        WHERE tenant_id = $1 AND ($2::uuid IS NULL OR grant_id > $2) AND ($4::uuid IS NULL OR grant_id = $4)
        ORDER BY grant_id
        LIMIT $3
        """,
        tenant_id,
        after,
        limit,
        grant_id,
    )
    return [Grant(**dict(zip(Grant.model_fields, row, strict=True))) for row in rows]
