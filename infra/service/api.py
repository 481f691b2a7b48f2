"""Administrative HTTP: FastAPI, with our problems, the client's identity, scopes, and lists in pages."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.datastructures import Headers
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from infra import VERSION
from infra.errors import Forbidden, InvalidMessage, Unauthenticated, WrongType
from infra.security.auth import IDENTITY_HEADER, Identities, Identity
from infra.service.service import Runtime
from infra.web.http import media_type

T = TypeVar("T")
Id = TypeVar("Id")

MAX_PAGE = 200
JSON = "application/json"


def api(service: str, runtime: Runtime, *routers: APIRouter) -> Sequence[BaseRoute]:
    """The routes of an application with `routers`, and a page of its OpenAPI at ``/docs/``.

    All links of that page are relative, so the gateway shows it at ``/docs/<service>/``. It takes every path: list
    other routes before these.
    """
    app = FastAPI(
        title=f"Clawbus {service}", version=VERSION, openapi_url="/docs/openapi.json", docs_url=None, redoc_url=None
    )
    app.state.identities = runtime.identities

    @app.get("/docs/", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="static/swagger-ui-bundle.js",
            swagger_css_url="static/swagger-ui.css",
            swagger_favicon_url="static/favicon.png",
        )

    # The files come with the package: the page works without the internet.
    app.mount("/docs/static", StaticFiles(packages=[("fastapi_offline", "static")]))
    for router in routers:
        app.include_router(router)

    inner = AsyncExitStackMiddleware(app.router)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        # Without FastAPI's own layers around it: they would answer errors before ours, which makes problems of them.
        scope["app"] = app
        try:
            await inner(scope, receive, send)
        except RequestValidationError as error:
            if media_type(Headers(scope=scope)) != JSON and any(
                e["loc"] == ("body",) and e["type"] != "missing" for e in error.errors()
            ):
                raise WrongType("content-type", f"this takes {JSON}") from error
            raise

    return [Mount("", serve)]


def identity(connection: HTTPConnection, identities: Identities) -> Identity:
    """Who a request or a WebSocket is from. Raises Unauthenticated."""
    token = connection.headers.get(IDENTITY_HEADER)
    if not token:
        raise Unauthenticated("no identity: the request did not come through the gateway")
    return identities.verify(token)


def of_a_tenant(identity: Identity) -> Identity:
    """Raises Forbidden where it is the operator's."""
    if not identity.tenant_id:
        raise Forbidden("this is a tenant's; use one of its API keys, not the operator's token")
    return identity


def _identity(request: Request) -> Identity:
    return identity(request, request.app.state.identities)


def _having(scope: str) -> Callable[[Request], Identity]:
    def check(request: Request) -> Identity:
        identity = of_a_tenant(_identity(request))
        if scope not in identity.scopes:
            raise Forbidden(f"the scope {scope} is missing")
        return identity

    return check


def _operator(request: Request) -> Identity:
    identity = _identity(request)
    if identity.tenant_id:
        raise Forbidden("this is for the operator of the platform")
    return identity


# Arguments of a handler. All but the last two have a tenant.
Reader = Annotated[Identity, Depends(_having("read"))]
Runner = Annotated[Identity, Depends(_having("run"))]
Writer = Annotated[Identity, Depends(_having("write"))]
Admin = Annotated[Identity, Depends(_having("admin"))]
Operator = Annotated[Identity, Depends(_operator)]
Anyone = Annotated[Identity, Depends(_identity)]


@dataclass(frozen=True)
class _Paging:
    """`limit` items after the one whose key is `after` (None: from the beginning)."""

    limit: int
    after: str | None

    def after_time(self, id_type: Callable[[str], Id]) -> tuple[datetime, Id] | None:
        """Of a list by time: the time and the id of the last item, by its key ``<time> <id>``."""
        if self.after is None:
            return None
        at, _, id_ = self.after.partition(" ")
        try:
            return datetime.fromisoformat(at), id_type(id_)
        except ValueError:
            raise InvalidMessage("cursor", "is none that a list gave") from None


def _paging(
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50, cursor: Annotated[str | None, Query()] = None
) -> _Paging:
    if cursor is None:
        return _Paging(limit, None)
    try:
        return _Paging(limit, base64.b64decode(cursor, altchars=b"-_", validate=True).decode())
    except (binascii.Error, UnicodeError):
        raise InvalidMessage("cursor", "is none that a list gave") from None


Paging = Annotated[_Paging, Depends(_paging)]


def page(items: Sequence[T], paging: _Paging, key: Callable[[T], str]) -> dict[str, Any]:
    """``{"items", "next"}`` of up to ``limit + 1`` items: the one too many only tells that there are more.

    `key` gives what `after` of the next page will be.
    """
    shown = items[: paging.limit]
    more = len(items) > paging.limit
    return {"items": shown, "next": base64.urlsafe_b64encode(key(shown[-1]).encode()).decode() if more else None}
