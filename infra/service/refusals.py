"""Refused requests are recorded in the audit chain of the client's tenant: 403, and 404 for a thing it does not have.

Another tenant's thing looks like one that does not exist, so both are recorded.
"""

from __future__ import annotations

from uuid import UUID

from starlette.types import Scope

from infra.errors import Forbidden, TooManyRequests
from infra.postgres.tx import Tx
from infra.security.audit import audit_refusal
from infra.security.auth import Identity
from infra.service.service import Runtime
from infra.stores.cache import Cache

PER_MINUTE = 60
"""The most records of one tenant in one service. A client that only causes refusals must not fill the chain."""


class Refusals:
    """Records of refused requests in the audit chain of the client's tenant."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._cache = Cache(runtime.cache)

    async def record(self, scope: Scope, who: Identity, error: Exception) -> None:
        """Records that the request was refused. The record has ids and no free text of the path."""
        params = scope.get("path_params", {})
        if not (isinstance(error, Forbidden) or params):
            # The client asked for a thing of its own.
            return
        path = getattr(scope.get("route"), "path", "")
        ids = {key: str(value) for key, value in params.items() if _is_id(value)}
        status = "403" if isinstance(error, Forbidden) else "404"
        await self._record(who, f"{scope['method']} {path}", status, ids)

    async def record_message(self, who: Identity, name: str) -> None:
        """Records that a socket, or a message on it, was refused: 403."""
        await self._record(who, name, "403", {})

    async def _record(self, who: Identity, name: str, status: str, ids: dict[str, str]) -> None:
        tenant_id = who.tenant_id or None
        try:
            service = self._runtime.worker.service
            await self._cache.limit(who.tenant_id, f"refusals of {service}", times=PER_MINUTE, seconds=60)
        except TooManyRequests:
            return

        async def work(tx: Tx) -> None:
            audit_refusal(tx, who.actor, "request.refuse", "route", name, status=status, **ids)

        database = self._runtime.request if tenant_id else self._runtime.worker
        await database.run(work, tenant_id=tenant_id)


def _is_id(value: object) -> bool:
    try:
        UUID(str(value))
    except ValueError:
        return False
    return True
