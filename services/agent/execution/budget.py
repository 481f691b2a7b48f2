"""The budget of an agent for a day or a month. Like billing's holds, an estimate counts until the charge is known.

The true costs of finished runs are fetched from billing only if their estimates leave too little.
"""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import grpc.aio

from infra.clock import utcnow
from infra.lanes.effects import Effects
from infra.web import rpc
from protos.billing.v1 import billing_pb2, billing_pb2_grpc
from services.agent.definitions.models import AgentBudget

# Most runs whose true costs are fetched at a time.
SETTLED_AT_ONCE = 100


class Spending:
    """Counts the spending of one run against its agent's budget."""

    def __init__(
        self, effects: Effects, billing: billing_pb2_grpc.BillingStub, *, tenant_id: str, agent_id: UUID, run_id: UUID
    ) -> None:
        self._effects = effects
        self._billing = billing
        self._tenant_id = tenant_id
        self._agent_id = agent_id
        self._run_id = run_id

    async def add(self, budget: AgentBudget, step: int, nanos: int) -> bool:
        """Counts `nanos` for a step, only once however often it is called. False if the budget has too little left."""
        since = begin_of_period(budget, utcnow())
        if await self._count(budget, since, step, nanos):
            return True
        await self._settle(since)
        return await self._count(budget, since, step, nanos)

    async def _count(self, budget: AgentBudget, since: datetime, step: int, nanos: int) -> bool:
        async with self._effects.begin() as tx:
            # Locks the agent's row: two runs must not both take the last of the budget.
            await tx.sql("SELECT FROM agent WHERE id = $1 FOR UPDATE", self._agent_id)
            [(counted,)] = await tx.sql("SELECT budget_step >= $2 FROM run WHERE id = $1", self._run_id, step)
            if counted:
                return True
            [(spent,)] = await tx.sql(
                """
                SELECT coalesce(sum(budget_nanos), 0)::bigint FROM run
                WHERE tenant_id = $1 AND agent_id = $2 AND created_at >= $3
                """,
                self._tenant_id,
                self._agent_id,
                since,
            )
            # An empty budget does not allow even a call without a price.
            if spent >= budget.nanos or spent + nanos > budget.nanos:
                return False
            await tx.sql(
                "UPDATE run SET budget_nanos = budget_nanos + $2, budget_step = $3 WHERE id = $1",
                self._run_id,
                nanos,
                step,
            )
        return True

    async def _settle(self, since: datetime) -> None:
        async with self._effects.begin() as tx:
            rows = await tx.sql(
                """
                SELECT id, (SELECT count(*) FROM run_usage u WHERE u.run_id = run.id) FROM run
                WHERE tenant_id = $1 AND agent_id = $2 AND created_at >= $3 AND budget_nanos > 0
                AND NOT budget_settled AND finished_at IS NOT NULL ORDER BY created_at LIMIT $4
                """,
                self._tenant_id,
                self._agent_id,
                since,
                SETTLED_AT_ONCE,
            )
        if not rows:
            return
        request = billing_pb2.ChargesRequest(run_ids=[str(run_id) for run_id, _ in rows])
        metadata: grpc.aio.Metadata = rpc.tenant_metadata(self._tenant_id)
        costs = {cost.run_id: cost for cost in (await self._billing.Charges(request, metadata=metadata)).costs}
        async with self._effects.begin() as tx:
            for run_id, used in rows:
                cost = costs.get(str(run_id), billing_pb2.RunCost())
                # Until billing has rated all usage of the run, its estimate counts.
                if cost.records == used:
                    await tx.sql(
                        "UPDATE run SET budget_nanos = $2, budget_settled = true WHERE id = $1",
                        run_id,
                        cost.amount_nanos,
                    )


def begin_of_period(budget: AgentBudget, now: datetime) -> datetime:
    """The beginning of the period that contains `now`, in UTC."""
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    return day if budget.period == "day" else day.replace(day=1)
