"""Tenants: customer organisations, created by the operator of the platform."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from pydantic import Field, StringConstraints

from infra.clock import uuid7
from infra.errors import NotFound
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.security.subjects import SubjectKeys
from infra.service.api import Operator, Paging, Reader, id_cursor, page
from infra.service.idempotency import ShownOnce, once
from infra.service.service import Runtime
from protos.catalog import PLATFORM_EVENTS
from protos.messages.user import TenantCreated
from services.user import api_keys, members
from services.user.domain import EVERYTHING, prefix
from services.user.fields import Body, Email, Name, View

# The largest value of PostgreSQL's bigint and of billing's accounts.
MAX_NANOS = 2**63 - 1
_COLUMNS = "tenant_id, name, currency, created_at, erased_at"


class NewTenant(Body):
    name: Name
    currency: Annotated[str, StringConstraints(pattern=r"^[A-Z]{3}$")] = "USD"
    """ISO 4217."""
    credit_nanos: Annotated[int, Field(ge=0, le=MAX_NANOS, strict=True)] | None = None
    """The amount that the tenant may spend, in 10⁻⁹ of the currency. null means no limit."""
    owner_email: Email | None = None


class CreatedTenant(View):
    id: str
    name: str
    api_key: Annotated[str, ShownOnce(prefix)]
    """The tenant's first key, with every scope. It is shown only in this answer."""


class Tenant(View):
    id: str
    name: str
    currency: str
    created_at: datetime
    erased_at: datetime | None


def router(runtime: Runtime) -> APIRouter:
    subjects = SubjectKeys(runtime.cipher)
    routes = APIRouter(tags=["tenants"])

    @routes.post("/api/v1/tenants", status_code=201, response_model=CreatedTenant)
    async def create_tenant(body: NewTenant, who: Operator, request: Request) -> Response:
        async def work(tx: Tx) -> tuple[int, CreatedTenant]:
            return 201, await _create(tx, subjects, body, who)

        return await once(request, runtime, who, work)

    @routes.get("/api/v1/tenants")
    async def list_tenants(who: Operator, paging: Paging) -> dict[str, Any]:
        async with runtime.worker.begin() as tx:
            rows = await tx.sql(
                f"SELECT {_COLUMNS} FROM tenant WHERE $1::text IS NULL OR tenant_id > $1 ORDER BY tenant_id LIMIT $2",
                str(last) if (last := id_cursor(paging)) else None,
                paging.limit + 1,
            )
        return page([_tenant(row) for row in rows], paging, lambda tenant: tenant.id)

    @routes.get("/api/v1/tenant")
    async def own_tenant(who: Reader) -> Tenant:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            rows = await tx.sql(f"SELECT {_COLUMNS} FROM tenant WHERE tenant_id = $1", who.tenant_id)
        if not rows:
            raise NotFound(f"tenant {who.tenant_id}: does not exist")
        return _tenant(rows[0])

    return routes


async def _create(tx: Tx, subjects: SubjectKeys, new: NewTenant, who: Identity) -> CreatedTenant:
    # From here on the operator's transaction belongs to this tenant: its messages carry the tenant's id.
    tx.tenant_id = tenant_id = str(uuid7())
    await tx.sql(
        "INSERT INTO tenant (tenant_id, name, currency) VALUES ($1, $2, $3)", tenant_id, new.name, new.currency
    )
    tx.publish(
        PLATFORM_EVENTS,
        TenantCreated(tenant_id=tenant_id, name=new.name, currency=new.currency, credit_nanos=new.credit_nanos),
        key=tenant_id,
    )
    audit(tx, who.actor, "tenant.create", "tenant", tenant_id)
    if new.owner_email:
        await members.add(tx, subjects, tenant_id, members.NewMember(email=new.owner_email, role="owner"), who.actor)
    first = api_keys.NewApiKey(name="first", scopes=sorted(EVERYTHING))
    key = await api_keys.create(tx, tenant_id, first, who)
    return CreatedTenant(id=tenant_id, name=new.name, api_key=key.api_key)


def _tenant(row: tuple[Any, ...]) -> Tenant:
    return Tenant(**dict(zip(Tenant.model_fields, row, strict=True)))
