"""Errors as RFC 9457 problem documents."""

from __future__ import annotations

from http import HTTPStatus

import msgspec
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from infra.errors import (
    Conflict,
    Forbidden,
    InvalidMessage,
    NoCredit,
    NotFound,
    RetryLater,
    TooLarge,
    TooManyRequests,
    Transient,
    Unauthenticated,
    WrongType,
)
from infra.observe.spans import current_ids
from infra.postgres.db import is_bad_data, is_transient

_STATUS: dict[type[Exception], int] = {
    InvalidMessage: 422,
    Unauthenticated: 401,
    NoCredit: 402,
    Forbidden: 403,
    NotFound: 404,
    Conflict: 409,
    TooLarge: 413,
    WrongType: 415,
    TooManyRequests: 429,
    RetryLater: 503,
    Transient: 503,
}


def problem(error: Exception) -> Response:
    """``application/problem+json`` for `error`: type, title, status, detail, errors [{field, message}].

    With a status of 500 or more it has the trace_id, and does not show internal details.
    """
    headers: dict[str, str] = {}
    errors: list[dict[str, str]] = []
    if isinstance(error, RequestValidationError):
        status, detail = 422, "The request is not valid; see errors."
        errors += [{"field": _field(e["loc"]), "message": e["msg"]} for e in error.errors()]
    elif isinstance(error, HTTPException):
        status, detail = error.status_code, error.detail
        headers.update(error.headers or {})
    elif type(error) in _STATUS:
        status, detail = _STATUS[type(error)], str(error)
    elif is_bad_data(error) or isinstance(error, UnicodeEncodeError):
        status, detail = 422, "A value of the request is out of range, or a text has characters that cannot be stored."
    elif is_transient(error):
        status, detail = 503, "A dependency of this service does not answer; try again."
    else:
        status, detail = 500, "An error inside this service; the request is not the cause."
    if isinstance(error, InvalidMessage):
        errors.append({"field": error.field, "message": error.reason})
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    if status in (429, 503):
        after = error.after.total_seconds() if isinstance(error, RetryLater) else 1
        headers["Retry-After"] = str(max(1, round(after)))
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "errors": errors,
    }
    trace_id, _ = current_ids()
    if status >= 500 and trace_id:
        body["trace_id"] = trace_id
    return Response(msgspec.json.encode(body), status, headers, media_type="application/problem+json")


def _field(location: tuple[int | str, ...]) -> str:
    """``limits.steps``, ``tools[0]``; ``body`` if the body is not JSON."""
    kind, *path = location
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    # A number directly after the kind is an offset in a text that is not JSON.
    return text if text and not text.startswith("[") else str(kind)
