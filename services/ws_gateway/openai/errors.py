"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from starlette.responses import Response

from infra.web.problems import problem
from services.ws_gateway.domain import StreamEvent

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
# The official clients retry after any 409, 429 or 5xx unless this header says otherwise.
_ONCE = {"x-should-retry": "false"}


class _Field(msgspec.Struct):
    field: str
    message: str


class _Problem(msgspec.Struct):
    detail: str
    errors: list[_Field]


class CompletionError(Exception):
    """The error that a client gets instead of an answer. `param` names the request's field, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        kind = kind or _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.error = {"message": message, "type": kind, "param": param, "code": code}
        self.headers = dict(headers or {})

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        body = msgspec.json.encode({"error": self.error})
        return Response(body, self.status, {**self.headers, **(headers or {})}, media_type="application/json")


def invalid_field(field: str, reason: str) -> CompletionError:
    """A 400 that names the invalid field of the request."""
    return CompletionError(400, f"{field}: {reason}", param=field)


def unknown_model(id_: str) -> CompletionError:
    return CompletionError(404, f"The model {id_} does not exist.", param="model", code="model_not_found")


def restarting() -> CompletionError:
    return CompletionError(503, "The server restarts; send the request again.", headers={"retry-after": "1"})


def rewritten() -> CompletionError:
    return CompletionError(
        502, "The model wrote the text again, and a stream cannot replace sent text.", code="stream_interrupted"
    )


def run_gone() -> CompletionError:
    return CompletionError(502, "The run no longer exists.", code="run_gone", headers=_ONCE)


def ended_without_reply(event: StreamEvent) -> CompletionError | None:
    """The reason why a run has no reply; None if the event is not such an end."""
    match event.name:
        case "run.refused":
            code = "insufficient_quota"
            return CompletionError(429, event.data["error"], kind=code, code=code, headers=_ONCE)
        case "run.cancelled":
            return CompletionError(
                409, "The run was cancelled.", kind="conflict_error", code="run_cancelled", headers=_ONCE
            )
        case "run.failed" | "run.indeterminate":
            code = event.name.replace(".", "_")
            return CompletionError(502, f"The run has no reply: {event.data['error']}", code=code, headers=_ONCE)
    return None


def of(error: Exception) -> CompletionError:
    """The failure for any error, by its RFC 9457 problem."""
    if isinstance(error, CompletionError):
        return error
    answer = problem(error)
    return of_problem(answer.status_code, answer.headers, bytes(answer.body))


def of_problem(status: int, headers: Mapping[str, str], body: bytes) -> CompletionError:
    """An RFC 9457 problem in OpenAI's shape. The first named field becomes the `param`. An invalid request is a 400."""
    found = msgspec.json.decode(body, type=_Problem)
    status = 400 if status == 422 else status
    kept = {name: headers[name] for name in ("retry-after", "www-authenticate", "allow") if name in headers}
    if found.errors:
        field = found.errors[0].field
        return CompletionError(status, f"{field}: {found.errors[0].message}", param=field, headers=kept)
    return CompletionError(status, found.detail, headers=kept)
