"""Credit for the work that memory does: billing is asked before it, and may refuse.

Work that can wait is held one by one, and waits while billing does not answer. Searches and uploads cannot wait: while
billing does not answer, each process allows a tenant `USES` of them, which are counted like all others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from uuid import UUID

from infra.clock import uuid7
from infra.errors import NoCredit, TooManyRequests, Transient
from infra.postgres.tx import derived_id
from infra.web import rpc
from protos.billing.v1 import billing_pb2, billing_pb2_grpc
from services.memory.domain import count_tokens
from services.memory.metering.usage import DOCUMENT, UseSource, document_hold, embedding

# Searches for which credit is held together, so that billing is not asked for each of them.
USES = 20
USES_LIFE = timedelta(minutes=5)
# A hold must still exist when the usage is counted. A large document takes hours.
DOCUMENT_LIFE = timedelta(days=1)
CALL_LIFE = timedelta(minutes=15)
# A search has little time.
_ANSWER_SECONDS = 2.0


class Credit:
    def __init__(self, billing: billing_pb2_grpc.BillingStub) -> None:
        self._billing = billing
        self._uses: dict[tuple[str, str, UseSource], tuple[int, float]] = {}
        """(tenant, resource, origin) → the uses that are left of a hold, and its end."""
        self._unanswered: Counter[str] = Counter()
        """Tenant → the uses that were allowed since billing has answered last."""

    async def hold(
        self,
        tenant_id: str,
        hold_id: UUID,
        resource: str,
        quantities: Mapping[str, int],
        life: timedelta,
        origin: UseSource,
        *,
        cannot_wait: bool = False,
    ) -> None:
        """Holds credit, once for an id. The usage record that names the id closes the hold.

        Raises NoCredit with the reason, TooManyRequests if a rate refuses, and Transient if billing does not answer;
        for a use that cannot wait, only after `USES` of them.
        """
        request = billing_pb2.ReserveRequest(
            hold_id=str(hold_id),
            resource=resource,
            quantities=quantities,
            expires_in_ms=life // timedelta(milliseconds=1),
            agent_id=origin.agent_id,
            channel_id=origin.channel_id,
            session_key=origin.session_key,
            api_key_id=origin.api_key_id,
        )
        try:
            reply = await self._billing.Reserve(
                request, metadata=rpc.tenant_metadata(tenant_id), timeout=_ANSWER_SECONDS
            )
        except Transient:
            if not cannot_wait or self._unanswered[tenant_id] >= USES:
                raise
            self._unanswered[tenant_id] += 1
            return
        del self._unanswered[tenant_id]
        if reply.retry_later:
            raise TooManyRequests(timedelta(minutes=1), f"the budget ({reply.refused_by}) is spent for this minute")
        if not reply.granted:
            source = f"the budget ({reply.refused_by})" if reply.refused_by else "the tenant's credit"
            raise NoCredit(f"{source} does not suffice")

    async def hold_embedding(
        self, tenant_id: str, work_id: UUID, model: str, texts: Sequence[str], origin: UseSource
    ) -> UUID:
        """Holds the estimated price of an embedding. Returns the hold, the same one at every attempt of the work.

        Raises as `hold`.
        """
        tokens = sum(map(count_tokens, texts))
        hold_id = derived_id(work_id, model, tokens, *origin)
        await self.hold(tenant_id, hold_id, embedding(model), {"input_tokens": tokens}, CALL_LIFE, origin)
        return hold_id

    async def hold_document(self, tenant_id: str, id_: UUID, origin: UseSource, *, cannot_wait: bool = False) -> None:
        """Holds the price of a document, or of one version of it. Raises as `hold`."""
        hold_id, quantities = document_hold(id_), {"documents": 1}
        await self.hold(tenant_id, hold_id, DOCUMENT, quantities, DOCUMENT_LIFE, origin, cannot_wait=cannot_wait)

    async def release_document(self, tenant_id: str, id_: UUID) -> None:
        """Gives the hold of a document back that is not indexed. If billing does not answer, it expires."""
        with suppress(Transient):
            request = billing_pb2.ReleaseRequest(hold_id=str(document_hold(id_)))
            await self._billing.Release(request, metadata=rpc.tenant_metadata(tenant_id))

    async def use(self, tenant_id: str, resource: str, unit: str, most: int, origin: UseSource) -> None:
        """Takes one use of at most so many units from a hold for `USES` of them, which expires. Raises as `hold`."""
        # Sessions share a hold, so that each needs none of its own: their budgets are asked before the model's call.
        origin = origin._replace(session_key="", member_id="")
        left, ends = self._uses.get((tenant_id, resource, origin), (0, 0.0))
        if not left or ends < time.monotonic():
            await self.hold(tenant_id, uuid7(), resource, {unit: USES * most}, USES_LIFE, origin, cannot_wait=True)
            if tenant_id in self._unanswered:
                return  # Nothing is held: the next use asks again.
            left, ends = USES, time.monotonic() + USES_LIFE.total_seconds()
        self._uses[tenant_id, resource, origin] = left - 1, ends
