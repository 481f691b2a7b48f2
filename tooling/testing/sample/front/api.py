"""HTTP of the front."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import BaseRoute, Route

from infra.clock import uuid7
from infra.errors import InvalidMessage
from infra.service.service import Runtime
from infra.web.http import read_json
from protos.messages.sample import TakeNote
from tooling.testing.sample.catalog import SAMPLE_WORK


def routes(runtime: Runtime) -> Sequence[BaseRoute]:
    async def take_note(request: Request) -> JSONResponse:
        note = await read_json(request, TakeNote)
        # The caller's key is the message's id, so the desk's inbox drops a repeated request.
        key = request.headers.get("idempotency-key")
        try:
            message_id = UUID(key) if key else uuid7()
        except ValueError:
            raise InvalidMessage("header Idempotency-Key", "is not a UUID") from None
        async with runtime.worker.begin(tenant_id=request.headers.get("x-tenant")) as tx:
            tx.send(SAMPLE_WORK, note, message_id=message_id)
        return JSONResponse({"id": str(message_id)}, status_code=202)

    return [Route("/notes", take_note, methods=["POST"])]
