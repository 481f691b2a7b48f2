"""``Idempotency-Key`` on requests that create: the same key gets the first answer; with another body it is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from typing import NamedTuple

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


class ShownOnce(NamedTuple):
    """Marks a text field of an answer that only the first answer shows: ``Annotated[str, ShownOnce(prefix)]``.

    The field is not stored: a repeated request gets the text's prefix and a note instead.
    """

    prefix: Callable[[str], str]
    """The part of the text that may be stored and shown again."""


def key_of(request: Request) -> str | None:
    """Raises InvalidMessage if the request's key is empty or longer than 255 characters."""
    key = request.headers.get(HEADER)
    if key is not None and not 0 < len(key) <= MAX_KEY:
        raise InvalidMessage(HEADER, f"must have 1 to {MAX_KEY} characters")
    return key


async def once(request: Request, runtime: Runtime, who: Identity, work: Work, *, body: bytes | None = None) -> Response:
    """The answer of `work`, run in one transaction of the caller's tenant (for the operator: of the worker role).

    With an Idempotency-Key, the answer is stored sealed in the same transaction. For a day, a request with the same
    key, route and body gets it again. Two such requests at once take turns. body: stands for the request's body, if
    that was streamed and cannot be read again. Raises InvalidMessage if the key was used with another body, is empty
    or longer than 255 characters.
    """
    key = key_of(request)
    database = runtime.request if who.tenant_id else runtime.worker
    content = await request.body() if body is None else body

    async def run(tx: Tx) -> Response:
        if key is None:
            status, answer = await work(tx)
            return _response(status, answer.model_dump_json().encode())
        return await _stored_or_new(tx, request, runtime, who, key, content, work)

    return await database.run(run, tenant_id=who.tenant_id or None)


async def _stored_or_new(
    tx: Tx, request: Request, runtime: Runtime, who: Identity, key: str, body: bytes, work: Work
) -> Response:
    route = f"{request.method} {request.url.path}"
    digest = hashlib.sha256(body).digest()
    place = (who.tenant_id, route, key)
    is_new = await tx.sql(
        """
        -- Locks the row of the key until the commit: a second request with the key waits here, and then finds the
        -- answer. An expired answer is replaced.
        INSERT INTO idempotency AS i (tenant_id, route, key, request_hash)
        VALUES ($1, $2, $3, $4)
        ON CONFLICT (tenant_id, route, key) DO UPDATE
        SET request_hash = excluded.request_hash, created_at = clock_timestamp()
        WHERE i.created_at < clock_timestamp() - interval '1 day'
        RETURNING key
        """,
        *place,
        digest,
    )
    if not is_new:
        [(known, status, stored)] = await tx.sql(
            "SELECT request_hash, status, answer FROM idempotency WHERE tenant_id = $1 AND route = $2 AND key = $3",
            *place,
        )
        if known != digest:
            raise InvalidMessage(HEADER, "was used before with another body")
        response = _response(status, runtime.cipher.open(stored, "idempotency", *place))
        response.headers["Idempotent-Replayed"] = "true"
        return response
    status, answer = await work(tx)
    await tx.sql(
        "UPDATE idempotency SET status = $4, answer = $5 WHERE tenant_id = $1 AND route = $2 AND key = $3",
        *place,
        status,
        runtime.cipher.seal(_without_secrets(answer).model_dump_json(), "idempotency", *place),
    )
    return _response(status, answer.model_dump_json().encode())


def _without_secrets(answer: BaseModel) -> BaseModel:
    shown = {
        name: f"{mark.prefix(getattr(answer, name))}… (shown only in the first answer)"
        for name, field in type(answer).model_fields.items()
        for mark in field.metadata
        if isinstance(mark, ShownOnce)
    }
    return answer.model_copy(update=shown)


def _response(status: int, body: bytes) -> Response:
    return Response(body, status, media_type="application/json")
