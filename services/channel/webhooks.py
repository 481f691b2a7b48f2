"""The route ``ANY /webhooks/<type>/<token>``, which vendors call."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from infra.clock import utcnow
from infra.errors import InvalidMessage, NotFound
from infra.security.subjects import SubjectKeys
from infra.service.service import Runtime
from services.channel.accounts import Accounts
from services.channel.ingest import Ingest
from services.channel.vendors import base

PATH = "/webhooks/{type}/{token}"


class Webhooks:
    """Answers 200 once the messages are stored or known to be repeats; 401 if the call does not verify; 400 if it
    verifies but is malformed; 503 while the database is unavailable, so that the vendor sends it again."""

    def __init__(self, accounts: Accounts, ingest: Ingest) -> None:
        self._accounts = accounts
        self._ingest = ingest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        response = await self._answer(request)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        account = await self._accounts.by_token(request.path_params["type"], request.path_params["token"])
        if account is None:
            raise NotFound("no channel has this webhook path")
        webhook = base.Request(
            request.method, request.scope["query_string"].decode("latin-1"), request.headers, await request.body()
        )
        try:
            received = account.vendor.receive(webhook, account.credentials, utcnow())
        except InvalidMessage as error:
            raise HTTPException(400, str(error)) from error
        if received.items:
            await self._ingest.accept(account, received.items)
        return Response(received.ack.body, media_type=received.ack.media_type)


def routes(runtime: Runtime, accounts: Accounts) -> Sequence[BaseRoute]:
    ingest = Ingest(runtime.worker, SubjectKeys(runtime.cipher))
    # An object and not a function, because Starlette then accepts every method.
    return [Route(PATH, Webhooks(accounts, ingest))]
