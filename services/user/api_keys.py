"""API keys of tenants and members: random, shown once, stored as a hash."""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Request, Response
from pydantic import Field

from infra.clock import utcnow, uuid7
from infra.errors import Conflict, Forbidden, InvalidMessage, NotFound, Unauthenticated
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.service.api import Admin, Paging, id_cursor, page
from infra.service.idempotency import ShownOnce, once
from infra.service.service import Runtime
from infra.web.times import Time
from services.user import domain
from services.user.domain import Scope
from services.user.fields import Body, Name, View

_RANDOM_BYTES = 32
MAX_KEYS = 500
"""Of a tenant, without expired ones: the gateway's limits are for each key."""


class NewApiKey(Body):
    name: Name
    scopes: list[Scope] | None = Field(default=None, min_length=1)
    """By default all scopes that both the creator and the member's role have."""
    expires_at: Time | None = None
    member_id: UUID | None = None
    """The member who owns the key. The key never has more scopes than the member's role, and is deleted with the
    member."""


class CreatedApiKey(View):
    id: UUID
    api_key: Annotated[str, ShownOnce(domain.prefix)]
    """The plaintext. It is shown only in this answer."""
    prefix: str


class ApiKey(View):
    id: UUID
    name: str
    prefix: str
    scopes: list[Scope]
    member_id: UUID | None
    created_by: str
    """The actor that created the key, such as ``operator`` or ``api_key:<id>``."""
    created_at: datetime
    expires_at: datetime | None


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(tags=["API keys"])

    @routes.post("/api/v1/api-keys", status_code=201, response_model=CreatedApiKey)
    async def create_api_key(body: NewApiKey, who: Admin, request: Request) -> Response:
        async def work(tx: Tx) -> tuple[int, CreatedApiKey]:
            return 201, await create(tx, who.tenant_id, body, who)

        return await once(request, runtime, who, work)

    @routes.get("/api/v1/api-keys")
    async def list_api_keys(who: Admin, paging: Paging) -> dict[str, Any]:
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            rows = await tx.sql(
                """
                SELECT id, name, prefix, scopes, member_id, created_by, created_at, expires_at FROM api_key
                WHERE tenant_id = $1 AND ($2::uuid IS NULL OR id > $2) ORDER BY id LIMIT $3
                """,
                who.tenant_id,
                id_cursor(paging),
                paging.limit + 1,
            )
        keys = [ApiKey(**dict(zip(ApiKey.model_fields, row, strict=True))) for row in rows]
        return page(keys, paging, lambda key: str(key.id))

    @routes.delete("/api/v1/api-keys/{id}", status_code=204)
    async def revoke_api_key(id: UUID, who: Admin) -> None:
        """Requests with the key are refused within seconds."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            if not await tx.sql("DELETE FROM api_key WHERE tenant_id = $1 AND id = $2 RETURNING id", who.tenant_id, id):
                raise NotFound(f"API key {id}: does not exist")
            audit(tx, who.actor, "api_key.revoke", "api_key", str(id))

    return routes


async def create(tx: Tx, tenant_id: str, new: NewApiKey, who: Identity) -> CreatedApiKey:
    """Creates a key. It may have some or all of the creator's scopes.

    Raises Forbidden for a scope that the creator or the member's role lacks, Unauthenticated for a creator whose key
    was revoked, InvalidMessage for an expiry in the past and for an unknown member, Conflict if the tenant has MAX_KEYS
    keys.
    """
    if new.expires_at and new.expires_at <= utcnow():
        raise InvalidMessage("expires_at", "must be in the future")
    allowed = domain.EVERYTHING & who.scopes
    if new.member_id:
        # FOR SHARE: a member that is removed at the same time must not leave a key behind.
        member = await tx.sql(
            "SELECT role FROM member WHERE tenant_id = $1 AND id = $2 FOR SHARE", tenant_id, new.member_id
        )
        if not member:
            raise InvalidMessage("member_id", "must be a member of the tenant")
        allowed &= domain.ROLE_SCOPES[member[0][0]]
    if who.key_id:
        # The identity is some seconds old: a key that was revoked meanwhile must not leave another one behind. FOR
        # SHARE, for the same reason: the revocation waits, and its caller sees the new key.
        key_id = UUID(who.key_id)
        await tx.sql("SELECT FROM api_key WHERE tenant_id = $1 AND id = $2 FOR SHARE", tenant_id, key_id)
        now = await present_scopes(tx, tenant_id, key_id)
        if "admin" not in now:
            raise Unauthenticated("Authorization: the API key was revoked, has expired, or may not do this any more")
        allowed &= now
    scopes = allowed if new.scopes is None else set(new.scopes)
    if beyond := scopes - allowed:
        raise Forbidden(f"scopes: the creator or the member does not have {', '.join(sorted(beyond))}")
    await tx.take_turn(f"API keys of {tenant_id}")
    [(count,)] = await tx.sql(
        "SELECT count(*) FROM api_key WHERE tenant_id = $1 AND (expires_at IS NULL OR expires_at > now())", tenant_id
    )
    if count >= MAX_KEYS:
        raise Conflict(f"a tenant may have {MAX_KEYS} API keys; revoke one first")
    id_, plaintext = uuid7(), domain.api_key(secrets.token_urlsafe(_RANDOM_BYTES))
    await tx.sql(
        """
        INSERT INTO api_key (id, tenant_id, member_id, name, prefix, hash, scopes, created_by, expires_at)
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        """,
        id_,
        tenant_id,
        new.member_id,
        new.name,
        domain.prefix(plaintext),
        domain.key_hash(plaintext),
        sorted(scopes),
        who.actor,
        new.expires_at,
    )
    audit(tx, who.actor, "api_key.create", "api_key", str(id_), scopes=" ".join(sorted(scopes)))
    return CreatedApiKey(id=id_, api_key=plaintext, prefix=domain.prefix(plaintext))


async def present_scopes(tx: Tx, tenant_id: str, key_id: UUID) -> frozenset[Scope]:
    """The scopes that the key has now; empty if the tenant has no such key, or if it has expired."""
    rows = await tx.sql(
        """
        SELECT k.scopes, m.role FROM api_key k LEFT JOIN member m ON m.id = k.member_id
        WHERE k.tenant_id = $1 AND k.id = $2 AND (k.expires_at IS NULL OR k.expires_at > now())
        """,
        tenant_id,
        key_id,
    )
    return domain.scopes_in_force(*rows[0]) if rows else frozenset()
