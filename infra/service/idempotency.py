"""``Idempotency-Key`` on requests that create: the same key gets the first answer, with another body it is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from infra.errors import InvalidMessage
from infra.postgres.tx import Tx
from infra.security.auth import Identity
from infra.service.service import Runtime

HEADER = "Idempotency-Key"
MAX_KEY = 255

Work = Callable[[Tx], Awaitable[tuple[int, BaseModel]]]


async def once(request: Request, runtime: Runtime, who: Identity, work: Work, *, body: bytes | None = None) -> Response:
    """The answer of `work`, run in one transaction of the caller's tenant (of the operator: the worker's).

    With an Idempotency-Key, what `work` answered is kept with its changes in the same transaction, sealed, and given
    again for the same key, route and body. Two at once take turns. `body` stands for the request's, where that was
    streamed and is no longer there. Raises InvalidMessage for a key that came with
    another body, and for one that is empty or longer than 255 characters.
    """
    key = request.headers.get(HEADER)
    if key is not None and not 0 < len(key) <= MAX_KEY:
        raise InvalidMessage(HEADER, f"must have 1 to {MAX_KEY} characters")
    database = runtime.request if who.tenant_id else runtime.worker
    content = await request.body() if body is None else body

    async def run(tx: Tx) -> Response:
        if key is None:
            return _response(*await work(tx))
        return await _remembered(tx, request, runtime, who, key, content, work)

    return await database.run(run, tenant_id=who.tenant_id or None)


async def _remembered(
    tx: Tx, request: Request, runtime: Runtime, who: Identity, key: str, body: bytes, work: Work
) -> Response:
    route = f"{request.method} {request.url.path}"
    digest = hashlib.sha256(body).digest()
    where = (who.tenant_id, route, key)
    # A second request with the key waits here for the first one's commit, and then finds its answer.
    if not await tx.sql(
        "INSERT INTO idempotency (tenant_id, route, key, request_hash) VALUES ($1, $2, $3, $4) "
        "ON CONFLICT DO NOTHING RETURNING key",
        *where,
        digest,
    ):
        [(known, status, answer)] = await tx.sql(
            "SELECT request_hash, status, answer FROM idempotency WHERE tenant_id = $1 AND route = $2 AND key = $3",
            *where,
        )
        if known != digest:
            raise InvalidMessage(HEADER, "was used before with another body")
        content = runtime.cipher.open(answer, "idempotency", *where)
        return Response(content, status, {"Idempotent-Replayed": "true"}, media_type="application/json")
    response = _response(*await work(tx))
    await tx.sql(
        "UPDATE idempotency SET status = $4, answer = $5 WHERE tenant_id = $1 AND route = $2 AND key = $3",
        *where,
        response.status_code,
        # It may hold what is shown only once, such as a new API key.
        runtime.cipher.seal(bytes(response.body), "idempotency", *where),
    )
    return response


def _response(status: int, answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")
