"""Credit of a run: a hold at billing before each model call, inside the run's limit and the agent's budget."""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple
from uuid import UUID

import msgspec

from infra.errors import NoCredit, Transient
from infra.postgres.tx import derived_id
from protos.billing.v1 import billing_pb2, billing_pb2_grpc
from services.agent.definitions.models import AgentBudget
from services.agent.execution import images
from services.agent.execution.budget import Spending
from services.agent.execution.context import RunContext
from services.agent.execution.outcome import Ended
from services.agent.execution.usage import usage_id
from services.agent.models.contract import Prompt
from services.agent.runs.metering import seconds_hold
from services.agent.runs.notices import FAILED, NO_CREDIT, TOO_FAST

# Assumed size of an answer if the agent sets no limit.
OUTPUT_TOKENS = 1_024
# A hold must still exist when the usage is counted, so it lives longer than the run may.
HOLD_MARGIN = timedelta(minutes=5)


class Hold(NamedTuple):
    """A reservation for one model call. `nanos` is the amount that it holds."""

    id: UUID
    nanos: int


class RunCredit:
    """Reserves and releases credit for the model calls of one run."""

    def __init__(
        self, context: RunContext, billing: billing_pb2_grpc.BillingStub, budget: AgentBudget | None, spending: Spending
    ) -> None:
        self._context = context
        self._billing = billing
        self._budget = budget
        self._spending = spending
        self._seconds_nanos: int | None = None
        """Held for the seconds of the run. None: not asked for in this attempt of the run."""

    async def reserve(self, model: str, prompt: Prompt) -> Hold:
        """The hold for the next step, the same one however often it is reserved.

        Raises Ended if the credit, the run's limit or the agent's budget is too small for the call.
        """
        context = self._context
        quantities = {"input_tokens": _input_tokens(prompt), "output_tokens": prompt.max_output_tokens or OUTPUT_TOKENS}
        step = context.last_step + 1
        hold_id = derived_id(context.run_id, "hold", step, *quantities.values())
        request = self._request(hold_id, model, quantities)
        if self._seconds_nanos is None:
            request.run_hold_id = str(seconds_hold(context.run_id))
            request.run_seconds = context.limits.seconds
        reply = await self._granted(request, "a model call")
        hold = Hold(hold_id, reply.held_nanos)
        if self._seconds_nanos is None:
            self._seconds_nanos = reply.run_held_nanos
        limit = context.limits.nanos
        if limit is not None and await self.spent() + hold.nanos > limit:
            await self.release(hold)
            raise Ended("failed", f"the limit of {limit} nano-units would be passed by another model call", FAILED)
        # The first call of the run counts the seconds too.
        nanos = hold.nanos + (0 if context.state.reserved else self._seconds_nanos)
        if self._budget and not await self._spending.add(self._budget, step, nanos):
            await self.release(hold)
            raise Ended("refused", f"the agent's budget of this {self._budget.period} is used up", NO_CREDIT)
        return hold

    async def reserve_tool(self, step: int, tool: str) -> UUID:
        """The hold for the call of a tool, the same one however often. Its usage record, of plugin, closes it.

        Raises NoCredit. The step of the call has begun then: the model reads the reason.
        """
        hold_id = derived_id(self._context.run_id, "tool", step)
        try:
            await self._granted(self._request(hold_id, f"tool/{tool}", {"calls": 1}), f"the tool {tool}")
        except Ended as refusal:
            raise NoCredit(refusal.error) from refusal
        return hold_id

    def _request(self, hold_id: UUID, resource: str, quantities: dict[str, int]) -> billing_pb2.ReserveRequest:
        context = self._context
        expires = timedelta(seconds=context.limits.seconds) + HOLD_MARGIN
        return billing_pb2.ReserveRequest(
            hold_id=str(hold_id),
            resource=resource,
            quantities=quantities,
            expires_in_ms=int(expires / timedelta(milliseconds=1)),
            agent_id=str(context.agent_id),
            channel_id=str(context.channel_id or ""),
            session_key=context.session_key,
            api_key_id=context.origin.api_key_id,
        )

    async def _granted(self, request: billing_pb2.ReserveRequest, use: str) -> billing_pb2.ReserveReply:
        """Raises Ended if billing refuses."""
        reply = await self._billing.Reserve(request, metadata=self._context.metadata)
        if not reply.granted:
            source = f"the budget ({reply.refused_by})" if reply.refused_by else "the tenant's credit"
            notice = TOO_FAST if reply.retry_later else NO_CREDIT
            raise Ended("refused", f"{source} does not suffice for {use}", notice)
        return reply

    async def spent(self) -> int:
        """The cost of the run and its children in nano-units.

        A call that is not rated yet counts as reserved, and so do the seconds of this run.
        """
        context = self._context
        spent = {usage_id(context.run_id, n, attempt): nanos for (n, attempt), nanos in context.state.reserved.items()}
        for run_id in await context.family():
            request = billing_pb2.ChargesRequest(run_id=str(run_id))
            reply = await self._billing.Charges(request, metadata=context.metadata)
            spent |= {
                charge.usage_id: charge.amount_nanos for charge in reply.charges if charge.HasField("amount_nanos")
            }
        return sum(spent.values()) + (self._seconds_nanos or 0)

    async def release(self, hold: Hold | None) -> None:
        """Gives an unused hold back. If billing does not answer, the hold expires by itself."""
        if hold is not None:
            await self._release(hold.id)

    async def release_seconds(self) -> None:
        """Gives the hold for the seconds back if the run ends without a record of them."""
        if self._seconds_nanos and not self._context.state.busy_ms:
            await self._release(seconds_hold(self._context.run_id))

    async def _release(self, hold_id: UUID) -> None:
        with suppress(Transient):
            request = billing_pb2.ReleaseRequest(hold_id=str(hold_id))
            await self._billing.Release(request, metadata=self._context.metadata)


def _input_tokens(prompt: Prompt) -> int:
    """An upper bound: no tokenizer makes more than about one token from three bytes."""
    text = images.without(prompt, notice=True)
    return len(msgspec.json.encode(text)) // 3 + 1 + images.count(prompt) * images.IMAGE_TOKENS
