"""Administrative HTTP: FastAPI with our problem documents, the client's identity, scopes, and paged lists."""

from __future__ import annotations

import base64
import hashlib
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, TypeVar
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.dependencies.models import Dependant
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.routing import BaseRoute, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Message, Receive, Scope, Send

from infra import VERSION
from infra.errors import Forbidden, InvalidMessage, NotFound, TooManyRequests, Unauthenticated, WrongType
from infra.outgoing import shares
from infra.outgoing.shares import Shares
from infra.security.auth import IDENTITY_HEADER, Identities, Identity
from infra.service.refusals import Refusals
from infra.service.service import Runtime
from infra.web.http import MAX_BODY_BYTES, allow_body, is_json
from infra.web.json_text import LARGE_BYTES, check_beside

T = TypeVar("T")
Id = TypeVar("Id")

MAX_PAGE = 200
PAGE_BYTES = 4 * 1024 * 1024
"""Of the items of a page whose items may be large."""
MAX_LARGE_BODIES = 8
"""JSON bodies of more than LARGE_BYTES that a process works on at once: each takes several times its size in memory,
and as much time of the event loop as a hundred small requests. A tenant alone has a half; the others wait in nginx."""
MAX_A_SECOND = 1_000
"""Requests of a tenant to a process: as many as the gateway of the local stack allows one key."""
OPERATOR = "operator"
"""On OpenAPI pages, the right of the operator, beside the scopes."""
JSON = "application/json"
_BEARER = "bearer"


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        page = super().openapi()
        page.setdefault("components", {})["securitySchemes"] = {_BEARER: {"type": "http", "scheme": "bearer"}}
        return page


def api(
    service: str,
    runtime: Runtime,
    *routers: APIRouter,
    max_body: int = MAX_BODY_BYTES,
    routes_check_bodies: bool = False,
) -> Sequence[BaseRoute]:
    """The routes of an application with `routers`, and its OpenAPI page at ``/docs/``.

    All links of that page are relative, so the gateway can show it at ``/docs/<service>/``. The `security` of each
    operation has the rights that the route accepts: scopes, and `OPERATOR`. These routes match every
    path: list other routes before them. `routes_check_bodies`: each route reads the body and checks it itself,
    so that it can bound the work and answer an error in a shape of its own.
    """
    app = _App(
        title=f"Clawbus {service}", version=VERSION, openapi_url="/docs/openapi.json", docs_url=None, redoc_url=None
    )
    app.state.identities = runtime.identities

    swagger = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=app.title,
        swagger_js_url="static/swagger-ui-bundle.js",
        swagger_css_url="static/swagger-ui.css",
        swagger_favicon_url="static/favicon.png",
    )
    swagger.headers["Content-Security-Policy"] = _content_policy(bytes(swagger.body).decode())

    @app.get("/docs/", include_in_schema=False)
    async def docs() -> Response:
        return swagger

    # The package contains the files, so the page works without the internet.
    app.mount("/docs/static", StaticFiles(packages=[("fastapi_offline", "static")]))
    for router in routers:
        for route in router.routes:
            if isinstance(route, APIRoute):
                # Without a right the page shows the route as open to everyone. Two parameters may need the same right.
                security = [{_BEARER: [right]} for right in dict.fromkeys(_accepted(route.dependant))]
                route.openapi_extra = {**(route.openapi_extra or {}), "security": security}
        app.include_router(router)

    inner = AsyncExitStackMiddleware(app.router)
    refusals = Refusals(runtime)
    rates = Rates()
    large = Shares(MAX_LARGE_BODIES)

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        # FastAPI's own layers are left out: they would answer errors before ours, which answers with problems.
        scope["app"] = app
        if scope["type"] == "http":
            send = _relative_redirects(send)
            allow_body(scope, max_body)
            _check_address(scope)
            with suppress(Unauthenticated):
                tenant_id = identity(HTTPConnection(scope), runtime.identities).tenant_id
                # First: the line about a refused request has the tenant, too.
                shares.work_for(tenant_id)
                rates.count(tenant_id, time.monotonic())
        checks = scope["type"] == "http" and not routes_check_bodies and is_json(Headers(scope=scope))
        async with place_of_body(HTTPConnection(scope), large) if checks else nullcontext():
            if checks:
                receive = await _checked(scope, receive)
            try:
                await inner(scope, receive, send)
            except (Forbidden, NotFound) as error:
                if scope["type"] == "http" and IDENTITY_HEADER in Headers(scope=scope):
                    await refusals.record(scope, identity(HTTPConnection(scope), runtime.identities), error)
                raise
            except RequestValidationError as error:
                if not is_json(Headers(scope=scope)) and any(
                    e["loc"] == ("body",) and e["type"] != "missing" for e in error.errors()
                ):
                    raise WrongType("content-type", f"must be {JSON}") from error
                raise

    return [Mount("", serve)]


class Rates:
    """Counts the requests of each tenant in each second. The gateway limits keys and addresses, and a tenant may have
    hundreds of both."""

    def __init__(self) -> None:
        self._second = 0
        self._counts: Counter[str] = Counter()

    def count(self, tenant_id: str, now: float) -> None:
        """Raises TooManyRequests for one more than MAX_A_SECOND. `now`: in seconds. The operator has no limit."""
        if int(now) != self._second:
            self._second = int(now)
            self._counts.clear()
        self._counts[tenant_id] += 1
        if tenant_id and self._counts[tenant_id] > MAX_A_SECOND:
            raise TooManyRequests(timedelta(seconds=1), "the tenant's keys together send too many requests")


def _content_policy(page: str) -> str:
    """The policy of the OpenAPI page: its own scripts only. Swagger UI sets styles of elements by itself."""
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        for script in re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    ]
    scripts = " ".join(f"'sha256-{hash_}'" for hash_ in hashes)
    return (
        f"default-src 'none'; script-src 'self' {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _relative_redirects(send: Send) -> Send:
    """Takes the host from redirects to the path with or without its last slash: the client chooses the Host header."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 307:
            headers = MutableHeaders(scope=message)
            target = urlsplit(headers["location"])
            # Two slashes at the start would be a host.
            path = "/" + target.path.lstrip("/")
            headers["location"] = target._replace(scheme="", netloc="", path=path).geturl()
        await send(message)

    return sending


def _check_address(scope: Scope) -> None:
    """Raises InvalidMessage for a query, HTTPException for a path, that no code behind this can handle."""
    for name, value in parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True):
        if "\0" in name + value:
            raise InvalidMessage(name if "\0" not in name else "query", "must not contain NUL")
    if "\0" in scope["path"]:
        raise HTTPException(404)


def place_of_body(connection: HTTPConnection, places: Shares) -> AbstractAsyncContextManager[None]:
    """Holds one of the tenant's places while a large body is read and worked on."""
    # nginx sends the length of each body, also of one that came in chunks.
    size = int(connection.headers.get("content-length", 0))
    return places.place(shares.tenant.get()) if size > LARGE_BYTES else nullcontext()


async def _checked(scope: Scope, receive: Receive) -> Receive:
    """Returns `receive`, with the body that was read for the check. Raises as `json_text.check_json`, and TooLarge."""
    body = await Request(scope, receive).body()
    await check_beside(body)
    replay: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return replay.pop() if replay else await receive()

    return replayed


def identity(connection: HTTPConnection, identities: Identities) -> Identity:
    """The client of a request or a WebSocket. Raises Unauthenticated."""
    token = connection.headers.get(IDENTITY_HEADER)
    if not token:
        raise Unauthenticated("identity: missing; requests must come through the gateway")
    return identities.verify(token, connection.scope.get("method", "GET"), connection.scope["path"])


def of_a_tenant(identity: Identity) -> Identity:
    """`identity` itself. Raises Forbidden if it is the operator's."""
    if not identity.tenant_id:
        raise Forbidden("this belongs to a tenant; use one of its API keys, not the operator's token")
    return identity


def _identity(request: Request) -> Identity:
    return identity(request, request.app.state.identities)


# A check of the client's rights → the rights that it accepts, for the OpenAPI page.
_ACCEPTED: dict[Callable[..., Any], tuple[str, ...]] = {}


def _having(scope: str) -> Callable[[Request], Identity]:
    def check(request: Request) -> Identity:
        identity = of_a_tenant(_identity(request))
        if scope not in identity.scopes:
            raise Forbidden(f"the scope {scope} is missing")
        return identity

    _ACCEPTED[check] = (scope,)
    return check


def _operator_or_having(scope: str) -> Callable[[Request], Identity]:
    def check(request: Request) -> Identity:
        identity = _identity(request)
        if identity.tenant_id and scope not in identity.scopes:
            raise Forbidden(f"the scope {scope} is missing")
        return identity

    _ACCEPTED[check] = (scope, OPERATOR)
    return check


def _operator(request: Request) -> Identity:
    identity = _identity(request)
    if identity.tenant_id:
        raise Forbidden("only the operator of the platform may do this")
    return identity


_ACCEPTED[_operator] = (OPERATOR,)


def _accepted(dependant: Dependant) -> list[str]:
    """The rights that the checks of a route accept."""
    own = _ACCEPTED.get(dependant.call, ()) if dependant.call else ()
    return [*own, *(name for inner in dependant.dependencies for name in _accepted(inner))]


# Arguments of a handler. All except the last four belong to a tenant.
Reader = Annotated[Identity, Depends(_having("read"))]
Runner = Annotated[Identity, Depends(_having("run"))]
Writer = Annotated[Identity, Depends(_having("write"))]
Admin = Annotated[Identity, Depends(_having("admin"))]
Operator = Annotated[Identity, Depends(_operator)]
# The operator, or a tenant's key with the scope.
Viewer = Annotated[Identity, Depends(_operator_or_having("read"))]
Editor = Annotated[Identity, Depends(_operator_or_having("write"))]
Manager = Annotated[Identity, Depends(_operator_or_having("admin"))]


@dataclass(frozen=True)
class _Paging:
    """A page of a list."""

    limit: int
    """How many items."""
    after: str | None
    """The key of the last item of the previous page; None for the first page."""

    def after_time(self, id_type: Callable[[str], Id]) -> tuple[datetime, Id] | None:
        """For a list in order of time, with keys ``<time> <id>``: time and id of the last item of the previous page.

        Raises InvalidMessage (field ``cursor``) if the key does not have that form.
        """
        if self.after is None:
            return None
        at, _, id_ = self.after.partition(" ")
        try:
            time = datetime.fromisoformat(at)
            # In any other year or without a zone, PostgreSQL's driver could not send it.
            if time.tzinfo is None or not 1970 <= time.year <= 9998:
                raise ValueError
            return time, id_type(id_)
        except ValueError:
            raise bad_cursor() from None


def bad_cursor() -> InvalidMessage:
    """The error for a cursor that no page of this list has as its `next`."""
    return InvalidMessage("cursor", "is not a valid cursor")


def _paging(
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 50, cursor: Annotated[str | None, Query()] = None
) -> _Paging:
    if cursor is None:
        return _Paging(limit, None)
    try:
        after = base64.b64decode(cursor, altchars=b"-_", validate=True).decode()
        if "\0" in after:
            raise ValueError
        return _Paging(limit, after)
    except ValueError:
        # Not base64, not ASCII, or not UTF-8.
        raise bad_cursor() from None


Paging = Annotated[_Paging, Depends(_paging)]


def id_cursor(paging: _Paging) -> UUID | None:
    """The id after which the page begins. Raises InvalidMessage for an invalid cursor."""
    try:
        return UUID(paging.after) if paging.after else None
    except ValueError:
        raise bad_cursor() from None


def of_one_page(sizes: Iterable[tuple[Id, int]]) -> list[Id]:
    """The first of the items that have PAGE_BYTES together, or a little more. `sizes`: each item and its bytes."""
    found: list[Id] = []
    left = PAGE_BYTES
    for item, size in sizes:
        if left <= 0:
            break
        found.append(item)
        left -= size
    return found


def page(items: Sequence[T], paging: _Paging, key: Callable[[T], str], *, more: bool = False) -> dict[str, Any]:
    """``{"items", "next"}`` for up to ``limit + 1`` items; the one above the limit shows that there are more.

    key: the value of `after` for the page that follows an item. more: others follow, although the page is not full.
    """
    shown = items[: paging.limit]
    more = more or len(items) > paging.limit
    return {"items": shown, "next": base64.urlsafe_b64encode(key(shown[-1]).encode()).decode() if more else None}
