"""Corrections by hand: amounts that an operator charges in addition or gives back, with a reason.

One of the time of a subscription is a line on its next invoice, before tax and without the plan's markup. Any other one
is covered by grants.
"""

from __future__ import annotations

from infra.clock import utcnow
from infra.postgres.tx import Tx
from services.billing.credit import accounts, budgets
from services.billing.credit.accounts import Entry
from services.billing.plans import subscriptions
from services.billing.usage import reports


async def correct(tx: Tx, tenant_id: str, nanos: int, usage_id: str | None, *, reason: str, actor: str) -> None:
    """Books a correction: nano-units above zero are given back, below zero charged. One that names a record belongs to
    the subscription and the budgets of the record, as its use. Any other one belongs to the subscription of now, and to
    no budget.

    Raises NotFound for an unknown record, and for a tenant without an account.
    """
    await accounts.lock_one(tx, tenant_id)
    at = utcnow()
    counted: list[int] = []
    if usage_id is not None:
        at = (await reports.verdict(tx, tenant_id, usage_id)).occurred_at
        counted = [
            period
            for (period,) in await tx.sql(
                "SELECT period FROM usage WHERE tenant_id = $1 AND usage_id = $2 AND verdict = 'counted'",
                tenant_id,
                usage_id,
            )
        ]
        await budgets.correct(tx, tenant_id, [(usage_id, -nanos)])
    if counted:
        [period] = await subscriptions.place_corrections(tx, tenant_id, counted)
    else:
        [(period, _)] = await subscriptions.place(tx, [(tenant_id, at)])
    entry = Entry(tenant_id, "correction", nanos, usage_id, reason=reason, actor=actor, period=period)
    await accounts.debit(tx, [entry])
