"""Budgets: limits of a tenant, agent, channel, session or API key by minute, day, month or in total, in the table
``budget``. One by minute is a rate: it sends no alerts, and work that it refuses may be tried again in a minute.

A hold is granted only if it fits into the rest of every budget that it concerns: the limit minus the spent amount minus
the open holds. This is decided under the lock of the tenant's account, like all changes of holds and spent amounts. A
counted record closes its hold and adds its cost in one transaction. Corrections of it add their differences. So
spending passes a budget by at most the difference between the cost of one step and its hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, Protocol
from uuid import UUID

from pydantic import BaseModel

from infra.clock import uuid7
from infra.errors import Conflict, NotFound
from infra.postgres.tx import Tx
from protos.messages.billing import BudgetThresholdPassed
from services.billing.credit import accounts, grants

MAX_BUDGETS = 1_000
"""Of a tenant. Each record of its use is compared with all of them, in batches with those of other tenants."""

Scope = Literal["tenant", "agent", "channel", "session", "key"]
Window = Literal["minute", "day", "month", "total"]

# The beginning of the running window of a budget `b`, UTC.
_WINDOW = """
    CASE b.period
        WHEN 'total' THEN '1970-01-01Z'::timestamptz
        ELSE date_trunc(b.period, clock_timestamp(), 'UTC')
    END
"""
_SPENT = f"CASE WHEN b.window_starts = {_WINDOW} THEN b.spent_nanos ELSE 0 END"
_TOLD = f"CASE WHEN b.window_starts = {_WINDOW} THEN b.told_percent ELSE '{{}}' END"
# The columns that `notify` reads. The window is the running one.
_STATE = (
    "b.tenant_id, b.budget_id, b.scope, b.scope_id, b.nanos, b.period, b.soft_percent, b.spent_nanos, b.told_percent"
)


def _concerns(row: str) -> str:
    """The condition that budget `b` concerns a hold or a record."""
    return f"""
        b.tenant_id = {row}.tenant_id AND b.scope_id = CASE b.scope
            WHEN 'tenant' THEN ''
            WHEN 'agent' THEN {row}.agent_id
            WHEN 'channel' THEN {row}.channel_id
            WHEN 'session' THEN {row}.session_key
            ELSE {row}.api_key_id
        END
    """


_HELD = f"""
    (
        SELECT {grants.HELD}
        FROM hold AS h
        WHERE {_concerns("h")} AND h.ended_at IS NULL AND h.expires_at > clock_timestamp()
    )
"""


class Budget(BaseModel):
    id: UUID
    scope: Scope
    scope_id: str
    """Empty for the tenant."""
    period: Window
    """Minutes begin at second 0, days and months at midnight UTC."""
    nanos: int
    soft_percent: list[int]
    """At each of these parts, and at 100, the tenant gets a mail and an event, once in a period, also if the limit
    changes. Empty for a rate."""
    spent_nanos: int
    held_nanos: int
    made_at: datetime


class Use(Protocol):
    """Names the use that a hold is for."""

    @property
    def agent_id(self) -> str: ...
    @property
    def channel_id(self) -> str: ...
    @property
    def session_key(self) -> str: ...
    @property
    def api_key_id(self) -> str: ...


@dataclass
class Rest:
    """The rest of a budget: its limit minus the spent amount and the open holds. Below zero after late usage."""

    nanos: int
    limit_nanos: int
    scope: Scope
    scope_id: str
    period: Window

    @property
    def name(self) -> str:
        return _name(self.scope, self.limit_nanos, self.period)

    def is_rate_for(self, amount_nanos: int) -> bool:
        """It is a rate, and the amount fits into a minute without other uses."""
        return self.period == "minute" and amount_nanos <= self.limit_nanos


def _scopes(use: Use) -> set[tuple[Scope, str]]:
    return {
        ("tenant", ""),
        ("agent", use.agent_id),
        ("channel", use.channel_id),
        ("session", use.session_key),
        ("key", use.api_key_id),
    }


def concerning(rests: Iterable[Rest], use: Use) -> list[Rest]:
    """Returns those that concern the use."""
    scopes = _scopes(use)
    return [rest for rest in rests if (rest.scope, rest.scope_id) in scopes]


def scopes_of(uses: Iterable[Use]) -> tuple[list[str], list[str]]:
    """Returns the parameters of `RESTS`."""
    scopes = sorted({scope for use in uses for scope in _scopes(use)})
    return [scope for scope, _ in scopes], [scope_id for _, scope_id in scopes]


# The rests of the budgets of tenant $1 that concern a use. The account is locked. A hold stores a rest as a bigint.
RESTS = f"""
SELECT ROW(greatest(b.nanos - {_SPENT} - {_HELD}, -4e18)::bigint, b.nanos, b.scope, b.scope_id, b.period)
FROM unnest($2::text[], $3::text[]) AS n(scope, scope_id)
JOIN budget AS b USING (scope, scope_id)
WHERE b.tenant_id = $1
"""
# The costs of counted records by budget. The parameters are the tenants and the usage_ids, joined by U+001F. OFFSET
# keeps one look-up by key for each record, as in `aggregates.ADDED`.
USED = f"""
SELECT b.tenant_id, b.budget_id, sum(u.amount_nanos)::bigint AS nanos
FROM (
    -- Most tenants have no budget; their records are not looked up.
    SELECT tenant, id
    FROM unnest(string_to_array((SELECT $1), E'\\x1f'), string_to_array($2, E'\\x1f')) AS a(tenant, id)
    WHERE tenant = ANY(ARRAY(
        SELECT tenant_id FROM budget WHERE tenant_id = ANY(string_to_array((SELECT $1), E'\\x1f'))
    ))
) AS n
CROSS JOIN LATERAL (SELECT * FROM usage WHERE tenant_id = n.tenant AND usage_id = n.id OFFSET 0) AS u
JOIN budget AS b ON {_concerns("u")}
GROUP BY b.tenant_id, b.budget_id
"""
# Adds the costs `used` to the budgets. The caller has locked the accounts.
SPENT = f"""
UPDATE budget AS b
SET spent_nanos = {_SPENT} + used.nanos, told_percent = {_TOLD}, window_starts = {_WINDOW}
FROM used
WHERE b.tenant_id = used.tenant_id AND b.budget_id = used.budget_id
RETURNING {_STATE}
"""


async def correct(tx: Tx, tenant_id: str, differences: Sequence[tuple[str, int]]) -> None:
    """Adds the differences of the costs of records (usage_id, nano-units) to the budgets that count them in their
    running window. The caller has locked the account."""
    rows = await tx.sql(
        f"""
        WITH used AS (
            SELECT b.tenant_id, b.budget_id, sum(n.nanos)::bigint AS nanos
            FROM unnest($2::text[], $3::bigint[]) AS n(usage_id, nanos)
            JOIN usage AS u ON u.tenant_id = $1 AND u.usage_id = n.usage_id
            JOIN budget AS b ON {_concerns("u")}
            WHERE u.rated_at >= {_WINDOW}
            GROUP BY b.tenant_id, b.budget_id
        )
        {SPENT}
        """,
        tenant_id,
        [usage_id for usage_id, _ in differences],
        [nanos for _, nanos in differences],
    )
    await notify(tx, rows)


async def notify(tx: Tx, rows: Iterable[tuple[Any, ...]]) -> None:
    """Notifies each tenant of the thresholds that it has passed and was not told of in this window. `rows` are
    `_STATE`, and the accounts are locked."""
    for tenant_id, budget_id, scope, scope_id, nanos, period, soft, spent, told in rows:
        if period == "minute" or not spent:
            continue
        reached = [percent for percent in sorted({*soft, 100} - {*told}) if nanos * percent <= spent * 100]
        if not reached:
            continue
        await tx.sql(
            "UPDATE budget SET told_percent = told_percent || $3::int[] WHERE tenant_id = $1 AND budget_id = $2",
            tenant_id,
            budget_id,
            reached,
        )
        for percent in reached:
            text = f"The budget ({_name(scope, nanos, period)}) is spent by {percent} %.\n"
            accounts.send_mail(tx, tenant_id, f"{percent} % of a budget is spent", text)
            passed = BudgetThresholdPassed(
                tenant_id=tenant_id,
                budget_id=budget_id,
                scope=scope,
                scope_id=scope_id,
                period=period,
                percent=percent,
                nanos=nanos,
                spent_nanos=int(spent),
            )
            accounts.publish(tx, passed)


def _name(scope: str, nanos: int, period: str) -> str:
    return f"{scope}, {accounts.format_units(nanos)} {'in total' if period == 'total' else f'a {period}'}"


async def set_budget(
    tx: Tx, tenant_id: str, scope: Scope, scope_id: str, period: Window, nanos: int, soft: Sequence[int]
) -> Budget:
    """Makes a budget, or changes the limit of the one with the same scope, id and period. Usage so far counts: the sum
    of the running window is taken from the records, and from the sums of deleted ones, which name no session or key.
    Thresholds that it has passed alert at once. Raises Conflict for one more than MAX_BUDGETS."""
    await accounts.lock_one(tx, tenant_id)
    [(count, exists)] = await tx.sql(
        """
        SELECT count(*), coalesce(bool_or(scope = $2 AND scope_id = $3 AND period = $4), false)
        FROM budget
        WHERE tenant_id = $1
        """,
        tenant_id,
        scope,
        scope_id,
        period,
    )
    if count >= MAX_BUDGETS and not exists:
        raise Conflict(f"a tenant may have {MAX_BUDGETS} budgets; remove one first")
    rows = await tx.sql(
        f"""
        INSERT INTO budget AS b (tenant_id, budget_id, scope, scope_id, period, nanos, soft_percent, window_starts,
                                 spent_nanos)
        SELECT b.tenant_id, $2, b.scope, b.scope_id, b.period, $6, $7, {_WINDOW}, coalesce((
            SELECT sum(u.amount_nanos + coalesce((
                SELECT sum(c.nanos)
                FROM usage_correction AS c
                WHERE c.tenant_id = u.tenant_id AND c.usage_id = u.usage_id
            ), 0) - coalesce((
                SELECT sum(l.amount_nanos)
                FROM ledger_entry AS l
                WHERE l.tenant_id = u.tenant_id AND l.usage_id = u.usage_id AND l.kind = 'correction'
                  AND l.price_version IS NULL
            ), 0))
            FROM usage AS u
            WHERE {_concerns("u")} AND u.verdict = 'counted' AND u.rated_at >= {_WINDOW}
        ), 0) + coalesce((
            SELECT sum(d.quantity)
            FROM (SELECT *, NULL AS session_key, NULL AS api_key_id FROM deleted_usage) AS d
            WHERE {_concerns("d")} AND d.meter IN ('cost_nanos', 'correction_nanos') AND b.period = 'total'
        ), 0)
        FROM (SELECT $1::text, $3::text, $4::text, $5::text) AS b(tenant_id, scope, scope_id, period)
        ON CONFLICT (tenant_id, scope, scope_id, period) DO UPDATE
        SET nanos = excluded.nanos, soft_percent = excluded.soft_percent, spent_nanos = {_SPENT},
            told_percent = {_TOLD}, window_starts = {_WINDOW}
        RETURNING {_STATE}
        """,
        tenant_id,
        uuid7(),
        scope,
        scope_id,
        period,
        nanos,
        sorted(set(soft)),
    )
    await notify(tx, rows)
    [made] = await listed(tx, tenant_id, after=None, limit=1, budget_id=rows[0][1])
    return made


async def remove(tx: Tx, tenant_id: str, budget_id: UUID) -> None:
    """Raises NotFound."""
    if not await tx.sql(
        "DELETE FROM budget WHERE tenant_id = $1 AND budget_id = $2 RETURNING budget_id", tenant_id, budget_id
    ):
        raise NotFound(f"budget {budget_id}: not found")


async def listed(
    tx: Tx, tenant_id: str, *, after: UUID | None, limit: int, budget_id: UUID | None = None
) -> list[Budget]:
    rows = await tx.sql(
        f"""
        SELECT budget_id, scope, scope_id, period, nanos, soft_percent, {_SPENT}, {_HELD}, made_at
        FROM budget AS b
        WHERE tenant_id = $1 AND ($2::uuid IS NULL OR budget_id > $2) AND ($4::uuid IS NULL OR budget_id = $4)
        ORDER BY budget_id
        LIMIT $3
        """,
        tenant_id,
        after,
        limit,
        budget_id,
    )
    return [Budget(**dict(zip(Budget.model_fields, row, strict=True))) for row in rows]
