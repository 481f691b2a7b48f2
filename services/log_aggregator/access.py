"""Who may see what here: a tenant its own, with the scope for it; the operator everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Query

from infra.errors import Forbidden, InvalidMessage
from infra.security.auth import Identity
from infra.service.api import Anyone


def _having(scope: str) -> Callable[[Identity], Identity]:
    def check(who: Anyone) -> Identity:
        if who.tenant_id and scope not in who.scopes:
            raise Forbidden(f"the scope {scope} is missing")
        return who

    return check


Seer = Annotated[Identity, Depends(_having("read"))]
Mender = Annotated[Identity, Depends(_having("write"))]


def _tenant(who: Seer, tenant_id: Annotated[str | None, Query(max_length=200)] = None) -> str | None:
    """Whose it is about; only the operator may ask for somebody else's."""
    if who.tenant_id and tenant_id not in (None, who.tenant_id):
        raise Forbidden("tenant_id: another tenant's is the operator's to see")
    if tenant_id and "\x00" in tenant_id:
        raise InvalidMessage("tenant_id", "is none")
    return who.tenant_id or tenant_id


# The tenant that an answer is about; None: the operator asked for no tenant in particular.
AskedTenant = Annotated[str | None, Depends(_tenant)]
