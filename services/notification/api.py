"""The HTTP routes of notification: the state of each notification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from fastapi import APIRouter
from starlette.routing import BaseRoute

from infra.service.api import Paging, Reader, api, page
from infra.service.service import Runtime
from services.notification.notifications import Notification, stored_notifications
from services.notification.webhooks import api as webhooks


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    router = APIRouter(prefix="/api/v1", tags=["notifications"])

    @router.get("/notifications")
    async def list_notifications(who: Reader, paging: Paging) -> dict[str, Any]:
        """E-mails and push notifications of the last 90 days, newest first; addresses are masked."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            found = await stored_notifications(
                tx, who.tenant_id, before=paging.after_time(UUID), limit=paging.limit + 1
            )
        return page(found, paging, Notification.cursor)

    return api("notification", runtime, router, webhooks.router(runtime))
