"""API keys: random, shown once, stored as a hash; of the tenant, or of one of its members."""

from __future__ import annotations

import secrets
from collections.abc import Collection
from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from pydantic import AwareDatetime, BaseModel, Field

from infra.clock import utcnow, uuid7
from infra.errors import Forbidden, InvalidMessage, NotFound
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.service.api import Admin, Paging, page
from infra.service.idempotency import once
from infra.service.service import Runtime
from services.user import domain
from services.user.domain import Scope
from services.user.fields import Body, Name, after

_RANDOM_BYTES = 32


class NewApiKey(Body):
    """scopes: all that whoever makes it has (and the member's role has), if none are named.

    member_id: whose key it is: it can never do more than the member's role, and goes with the member.
    """

    name: Name
    scopes: list[Scope] | None = Field(default=None, min_length=1)
    expires_at: AwareDatetime | None = None
    member_id: UUID | None = None


class MadeApiKey(BaseModel):
    """api_key: the plaintext, shown this once."""

    id: UUID
    api_key: str
    prefix: str


class ApiKey(BaseModel):
    """created_by: who made it, such as ``operator`` or ``api_key:<id>``."""

    id: UUID
    name: str
    prefix: str
    scopes: list[Scope]
    member_id: UUID | None
    created_by: str
    created_at: datetime
    expires_at: datetime | None


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(tags=["API keys"])

    @routes.post("/api/v1/api-keys", status_code=201, response_model=MadeApiKey)
    async def create_api_key(body: NewApiKey, who: Admin, request: Request) -> Response:
        async def work(tx: Tx) -> tuple[int, MadeApiKey]:
            return 201, await create(tx, who.tenant_id, body, who.scopes, who.actor)

        return await once(request, runtime, who, work)

    @routes.get("/api/v1/api-keys")
    async def list_api_keys(who: Admin, paging: Paging) -> dict[str, Any]:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            rows = await tx.sql(
                "SELECT id, name, prefix, scopes, member_id, created_by, created_at, expires_at FROM api_key "
                "WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id > $2) ORDER BY id LIMIT $3",
                who.tenant_id,
                after(paging),
                paging.limit + 1,
            )
        keys = [ApiKey(**dict(zip(ApiKey.model_fields, row, strict=True))) for row in rows]
        return page(keys, paging, lambda key: str(key.id))

    @routes.delete("/api/v1/api-keys/{id}", status_code=204)
    async def revoke_api_key(id: UUID, who: Admin) -> None:
        """Whoever uses it is refused within seconds."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            if not await tx.sql("DELETE FROM api_key WHERE tenant_id = $1 AND id = $2 RETURNING id", who.tenant_id, id):
                raise NotFound(f"API key {id}: there is none")
            audit(tx, who.actor, "api_key.revoke", "api_key", str(id))

    return routes


async def create(tx: Tx, tenant_id: str, new: NewApiKey, creators: Collection[str], actor: str) -> MadeApiKey:
    """Makes a key. `creators`: the scopes of whoever makes it, of which the key may have some or all.

    Raises Forbidden for a scope beyond those or the member's role, InvalidMessage for a time that is past and a
    member who is not there.
    """
    if new.expires_at and new.expires_at <= utcnow():
        raise InvalidMessage("expires_at", "is past")
    allowed = domain.EVERYTHING & set(creators)
    if new.member_id:
        # Locked: who is removed at this moment shall not leave a key behind.
        member = await tx.sql(
            "SELECT role FROM member WHERE tenant_id = $1 AND id = $2 FOR SHARE", tenant_id, new.member_id
        )
        if not member:
            raise InvalidMessage("member_id", "there is no such member")
        allowed &= domain.ROLE_SCOPES[member[0][0]]
    scopes = allowed if new.scopes is None else set(new.scopes)
    if beyond := scopes - allowed:
        raise Forbidden(f"a key cannot be given scopes that its maker or member lacks: {', '.join(sorted(beyond))}")
    id_, plaintext = uuid7(), domain.api_key(secrets.token_urlsafe(_RANDOM_BYTES))
    await tx.sql(
        "INSERT INTO api_key (id, tenant_id, member_id, name, prefix, hash, scopes, created_by, expires_at) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        id_,
        tenant_id,
        new.member_id,
        new.name,
        domain.prefix(plaintext),
        domain.key_hash(plaintext),
        sorted(scopes),
        actor,
        new.expires_at,
    )
    audit(tx, actor, "api_key.create", "api_key", str(id_), scopes=" ".join(sorted(scopes)))
    return MadeApiKey(id=id_, api_key=plaintext, prefix=domain.prefix(plaintext))


async def scopes(tx: Tx, tenant_id: str, key_id: UUID) -> frozenset[Scope]:
    """What the key may do now; nothing where the tenant has no such key, or it has expired."""
    rows = await tx.sql(
        "SELECT k.scopes, m.role FROM api_key k LEFT JOIN member m ON m.id = k.member_id "
        "WHERE k.tenant_id = $1 AND k.id = $2 AND (k.expires_at IS NULL OR k.expires_at > now())",
        tenant_id,
        key_id,
    )
    return domain.scopes_in_force(*rows[0]) if rows else frozenset()
