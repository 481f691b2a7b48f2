"""gRPC of billing: holds, and the charges of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from uuid import UUID

import msgspec

from infra.clock import utcnow
from infra.errors import InvalidMessage
from infra.postgres.database import Database
from infra.service.service import Runtime
from infra.web import rpc
from protos.billing.v1 import billing_pb2, billing_pb2_grpc
from services.billing.credit import accounts, holds
from services.billing.rating import price_book
from services.billing.rating.domain import RUN, price_at

MAX_RESOURCES = 100
MAX_RUNS = 200


class BillingRpc(billing_pb2_grpc.BillingServicer):
    def __init__(self, database: Database) -> None:
        self._database = database
        self._holds = holds.Holds(database)

    async def Reserve(self, request: billing_pb2.ReserveRequest, context: Any) -> billing_pb2.ReserveReply:
        tenant_id = rpc.tenant()
        asked = holds.HoldRequest(
            request.resource,
            dict(request.quantities),
            request.expires_in_ms,
            request.agent_id,
            request.channel_id,
            request.session_key,
            request.api_key_id,
        )
        wanted = {_uuid("hold_id", request.hold_id): asked}
        if request.run_hold_id:
            quantities = {"run_seconds": request.run_seconds}
            run = msgspec.structs.replace(asked, resource=RUN, quantities=quantities)
            wanted[_uuid("run_hold_id", request.run_hold_id)] = run
        found, *of_run = await self._holds.reserve(tenant_id, wanted)
        return billing_pb2.ReserveReply(
            granted=found.granted,
            run_held_nanos=of_run[0].held_nanos if of_run else 0,
            held_nanos=found.held_nanos,
            available_nanos=found.available_nanos,
            currency=found.currency,
            refused_by=found.refused_by,
            retry_later=found.retry_later,
        )

    async def Release(self, request: billing_pb2.ReleaseRequest, context: Any) -> billing_pb2.ReleaseReply:
        await self._holds.release(rpc.tenant(), _uuid("hold_id", request.hold_id))
        return billing_pb2.ReleaseReply()

    async def Charges(self, request: billing_pb2.ChargesRequest, context: Any) -> billing_pb2.ChargesReply:
        tenant_id = rpc.tenant()
        if request.run_ids:
            return await self._costs(tenant_id, request.run_ids)
        run_id = _uuid("run_id", request.run_id)
        async with self._database.begin(tenant_id=tenant_id) as tx:
            currency = await accounts.currency(tx, tenant_id) or ""
            rows = await tx.sql(
                """
                SELECT usage_id, resource, verdict, amount_nanos, occurred_at, rated_at, quantities, span_id, arrival
                FROM usage WHERE tenant_id = $1 AND run_id = $2 UNION ALL
                SELECT usage_id, resource, 'duplicate', 0, occurred_at, rated_at, quantities, '', arrival
                FROM duplicate WHERE tenant_id = $1 AND run_id = $2 ORDER BY arrival
                """,
                tenant_id,
                run_id,
            )
        return billing_pb2.ChargesReply(charges=[_charge(*row[:-1]) for row in rows], currency=currency)

    async def _costs(self, tenant_id: str, run_ids: Sequence[str]) -> billing_pb2.ChargesReply:
        if len(run_ids) > MAX_RUNS:
            raise InvalidMessage("run_ids", f"must be at most {MAX_RUNS}")
        ids = [_uuid(f"run_ids[{n}]", text) for n, text in enumerate(run_ids)]
        async with self._database.begin(tenant_id=tenant_id) as tx:
            currency = await accounts.currency(tx, tenant_id) or ""
            rows = await tx.sql(
                """
                SELECT run_id::text, count(*), coalesce(sum(amount_nanos), 0)::bigint
                FROM usage WHERE tenant_id = $1 AND run_id = ANY($2::uuid[]) AND verdict IN ('counted', 'rejected')
                -- The agent counts its own records, whose ids name the run; those of tools and messages come later.
                AND strpos(usage_id, run_id::text) > 0
                GROUP BY run_id ORDER BY run_id
                """,
                tenant_id,
                ids,
            )
        costs = [billing_pb2.RunCost(run_id=id_, records=count, amount_nanos=nanos) for id_, count, nanos in rows]
        return billing_pb2.ChargesReply(currency=currency, costs=costs)

    async def Unpriced(self, request: billing_pb2.UnpricedRequest, context: Any) -> billing_pb2.UnpricedReply:
        tenant_id = rpc.tenant()
        if len(request.resources) > MAX_RESOURCES:
            raise InvalidMessage("resources", f"must be at most {MAX_RESOURCES}")
        async with self._database.begin(tenant_id=tenant_id) as tx:
            # A tenant whose account is not open yet is taken for one in the currency of the seeded prices.
            currency = await accounts.currency(tx, tenant_id) or "USD"
            prices = await price_book.versions(tx, request.resources)
        now = utcnow()
        missing = [name for name in request.resources if price_at(prices.get(name, ()), currency, now) is None]
        return billing_pb2.UnpricedReply(resources=missing)


def servicer(runtime: Runtime) -> tuple[Callable[[Any, Any], None], Any]:
    return billing_pb2_grpc.add_BillingServicer_to_server, BillingRpc(runtime.request)


def _charge(
    usage_id: str,
    resource: str,
    verdict: str,
    amount_nanos: int | None,
    occurred_at: Any,
    rated_at: Any,
    quantities: dict[str, int],
    span_id: str,
) -> billing_pb2.Charge:
    charge = billing_pb2.Charge(
        usage_id=usage_id,
        resource=resource,
        verdict=verdict,
        amount_nanos=amount_nanos,
        # An implausible record may claim a quantity that does not fit into the wire's 64-bit integer.
        quantities={u: max(-(2**63), min(n, 2**63 - 1)) for u, n in quantities.items()},
        span_id=span_id,
    )
    charge.occurred_at.FromDatetime(occurred_at)
    charge.rated_at.FromDatetime(rated_at)
    return charge


def _uuid(field: str, text: str) -> UUID:
    try:
        return UUID(text)
    except ValueError:
        raise InvalidMessage(field, "is not a UUID") from None
