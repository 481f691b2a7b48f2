"""Access rules: a tenant may see its own data with the right scope, the operator may see everything."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Query

from infra.errors import Forbidden, InvalidMessage
from infra.service.api import Viewer


def _tenant(who: Viewer, tenant_id: Annotated[str | None, Query(max_length=200)] = None) -> str | None:
    """Raises Forbidden if a tenant asks for another tenant's data."""
    if who.tenant_id and tenant_id not in (None, who.tenant_id):
        raise Forbidden("tenant_id: only the operator may ask for another tenant")
    if tenant_id and "\x00" in tenant_id:
        raise InvalidMessage("tenant_id", "must not contain a NUL")
    return who.tenant_id or tenant_id


RequestedTenant = Annotated[str | None, Depends(_tenant)]
"""The tenant whose data is requested. None: the operator named no tenant."""
