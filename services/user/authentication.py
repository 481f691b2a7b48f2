"""Authentication: the gateway asks for the caller's identity before it forwards a request."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from infra.errors import InvalidMessage, Unauthenticated
from infra.security.auth import IDENTITY_HEADER, Identity
from infra.service.service import Runtime
from protos.catalog import SERVICES
from services.user import domain

# With the operator's token, this header names the tenant for which the operator acts.
TENANT_HEADER = "x-claw-tenant"
# The service that will get the request. Others refuse the token.
SERVICE_HEADER = "x-claw-service"
_OPERATOR = Identity("operator", "", domain.EVERYTHING)


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    admin_token_hash = domain.key_hash(runtime.settings.admin_token.get_secret_value())

    async def authenticate(request: Request) -> Response:
        """200 with the identity's token for one service as a header, or a problem 401. Only the gateway can reach this.

        There is no cache here: the gateway caches the answer for two seconds, and a second cache would double the
        time in which a revoked key still works.
        """
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthenticated("Authorization: must be `Bearer` and an API key")
        hashed = domain.key_hash(token)
        # Hashes have a fixed length, and the place of their first difference reveals nothing about the token.
        if hmac.compare_digest(hashed, admin_token_hash):
            identity = await _operator(runtime, request.headers.get(TENANT_HEADER, ""))
        else:
            identity = await _key_holder(runtime, hashed)
        if (service := request.headers.get(SERVICE_HEADER)) not in SERVICES:
            raise InvalidMessage(SERVICE_HEADER, "must be the name of a service")
        return Response(headers={IDENTITY_HEADER: runtime.identities.token(identity, service)})

    return [Route("/internal/auth", authenticate)]


async def _operator(runtime: Runtime, tenant_id: str) -> Identity:
    """The operator's identity, for the platform or for the tenant that the request names.

    For an erased tenant the operator may only read the data that is kept.
    """
    if not tenant_id:
        return _OPERATOR
    async with runtime.worker.begin() as tx:
        rows = await tx.sql("SELECT erased_at FROM tenant WHERE tenant_id = $1", tenant_id)
    if not rows:
        raise Unauthenticated(f"{TENANT_HEADER}: this tenant does not exist")
    return Identity("operator", tenant_id, domain.EVERYTHING if rows[0][0] is None else frozenset({"read"}))


async def _key_holder(runtime: Runtime, hashed: bytes) -> Identity:
    async with runtime.worker.begin() as tx:
        rows = await tx.sql(
            """
            SELECT k.id, k.tenant_id, k.scopes, k.member_id, m.role FROM api_key k
            LEFT JOIN member m ON m.id = k.member_id
            WHERE k.hash = $1 AND (k.expires_at IS NULL OR k.expires_at > now())
            """,
            hashed,
        )
    if not rows:
        raise Unauthenticated("Authorization: the API key is unknown, revoked or expired")
    [(id_, tenant_id, scopes, member_id, role)] = rows
    actor = f"member:{member_id}" if member_id else f"api_key:{id_}"
    return Identity(actor, tenant_id, domain.scopes_in_force(scopes, role), str(id_))
