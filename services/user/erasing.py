"""The erasure of a whole tenant, and how far it is."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

from fastapi import APIRouter
from pydantic import Field

from infra.errors import InvalidMessage, NotFound
from infra.postgres.tx import Tx
from infra.security import subjects
from infra.security.audit import audit
from infra.security.subjects import ERASED_TEXT
from infra.service.api import Operator
from infra.service.service import Runtime
from protos.catalog import PLATFORM_EVENTS, SERVICES
from protos.messages.user import TenantDataErased, TenantErased
from services.user.fields import Body, View


class Confirmation(Body):
    confirm: str = Field(max_length=1_000)
    """The name of the tenant."""


class ErasureView(View):
    tenant_id: str
    asked_at: datetime
    erased_at: datetime | None
    """When the last service had erased the tenant. Null: some are at work."""
    services: dict[str, datetime | None]
    """Service → when it had erased the tenant."""


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(tags=["tenants"])

    @routes.post("/api/v1/tenants/{id}/erase", status_code=202)
    async def erase_tenant(id: UUID, body: Confirmation, who: Operator) -> ErasureView:
        """Erases everything that the platform has of the tenant, except its invoices, the journal and the usage behind
        them, which the law requires. Its keys and members stop working at once. A repeated call changes nothing."""
        tenant_id = str(id)
        async with runtime.worker.begin(tenant_id=tenant_id) as tx:
            rows = await tx.sql("SELECT name, erased_at FROM tenant WHERE tenant_id = $1 FOR UPDATE", tenant_id)
            if not rows:
                raise _none(tenant_id)
            [(name, erased_at)] = rows
            if erased_at is None:
                if body.confirm != name:
                    raise InvalidMessage("confirm", "must be the name of the tenant")
                await _erase(tx, tenant_id, who.actor)
            return await _progress(tx, tenant_id)

    @routes.get("/api/v1/tenants/{id}/erasure")
    async def show_erasure(id: UUID, who: Operator) -> ErasureView:
        async with runtime.worker.begin(tenant_id=str(id)) as tx:
            return await _progress(tx, str(id))

    return routes


async def _erase(tx: Tx, tenant_id: str, actor: str) -> None:
    await tx.sql(
        "UPDATE tenant SET name = $2, erased_at = clock_timestamp() WHERE tenant_id = $1", tenant_id, ERASED_TEXT
    )
    await tx.sql("DELETE FROM api_key WHERE tenant_id = $1", tenant_id)
    await tx.sql("DELETE FROM member WHERE tenant_id = $1", tenant_id)
    await subjects.destroy_all(tx, tenant_id)
    tx.publish(PLATFORM_EVENTS, TenantErased(tenant_id=tenant_id), key=tenant_id)
    audit(tx, actor, "tenant.erase", "tenant", tenant_id)


async def _progress(tx: Tx, tenant_id: str) -> ErasureView:
    rows = await tx.sql("SELECT erased_at FROM tenant WHERE tenant_id = $1 AND erased_at IS NOT NULL", tenant_id)
    if not rows:
        raise _none(tenant_id)
    done = dict(await tx.sql("SELECT service, erased_at FROM tenant_erasure WHERE tenant_id = $1", tenant_id))
    return ErasureView(
        tenant_id=tenant_id,
        asked_at=rows[0][0],
        erased_at=max(done.values()) if done.keys() >= set(SERVICES) else None,
        services={service: done.get(service) for service in SERVICES},
    )


@PLATFORM_EVENTS.each(TenantDataErased, group="user")
async def note_progress(event: TenantDataErased, tx: Tx) -> None:
    await tx.sql(
        "INSERT INTO tenant_erasure (tenant_id, service) VALUES ($1, $2) ON CONFLICT DO NOTHING",
        event.tenant_id,
        event.service,
    )


def _none(tenant_id: str) -> NotFound:
    return NotFound(f"tenant {tenant_id}: does not exist, or is not erased")
