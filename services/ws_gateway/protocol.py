"""The messages of the WebSocket in both directions. The JSON Schema for clients is generated from these types."""

from __future__ import annotations

import inspect
from typing import Annotated, Any
from uuid import UUID

import msgspec
from msgspec import Meta, Struct


class _FromClient(Struct, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    ref: Annotated[str, Meta(description="Chosen by the client. The answer to this message repeats it.")] | None = None


class Subscribe(_FromClient, tag="subscribe"):
    """Follows a run: the server sends `accepted`, then the past events, then each new event until the run ends. If the
    socket follows the run already, the events after `after` are sent again."""

    run_id: UUID
    after: Annotated[int, Meta(ge=0, lt=2**31, description="The last event id of the run that the client has.")] = 0


class Unsubscribe(_FromClient, tag="unsubscribe"):
    """Stops following a run. After the `accepted`, the server sends no more events of the run."""

    run_id: UUID


class Message(_FromClient, tag="message"):
    """Sends a message to an agent, as POST /api/v1/agents/{agent_id}/sessions/{session}/messages does. The server sends
    `accepted` with the run that will answer, then the events of that run."""

    agent_id: UUID
    session: Annotated[str, Meta(min_length=1, max_length=200)]
    text: str
    idempotency_key: (
        Annotated[str, Meta(description="A second message with the same key gets the same run.")] | None
    ) = None


class Cancel(_FromClient, tag="cancel"):
    """Requests the cancellation of a run. Clients that follow the run get an event when it has ended."""

    run_id: UUID


class Ping(_FromClient, tag="ping"):
    """Answered with `pong`. It is optional, because the server sends ping frames itself."""


ClientMessage = Subscribe | Unsubscribe | Message | Cancel | Ping


class _FromServer(Struct, kw_only=True, tag_field="type"):
    pass


class RunEvent(_FromServer, tag="event"):
    """An event of a run, as in GET /api/v1/runs/{run_id}/events."""

    run_id: UUID
    event: Annotated[
        str,
        Meta(
            description="`run.completed`, `run.failed`, `run.cancelled` and `run.refused` are the last event of a run. "
            "Ignore unknown events.",
            examples=[
                "run.started",
                "step.started",
                "step.completed",
                "delta",
                "reply",
                "run.indeterminate",
                "run.completed",
                "run.failed",
                "run.cancelled",
                "run.refused",
            ],
        ),
    ]
    id: Annotated[int, Meta(description="The value for `after` when the client subscribes again.")] | None
    data: Annotated[
        dict[str, Any],
        Meta(
            description="The data of a `delta` has step, attempt, n (from 1 in each attempt) and text. A higher "
            "attempt of the step, and the `reply`, replace the earlier deltas."
        ),
    ]


class Accepted(_FromServer, tag="accepted"):
    """The answer to every message except `ping`, if the message was not refused."""

    run_id: UUID
    ref: str | None


class FieldError(Struct, frozen=True):
    field: str
    message: str


class Error(_FromServer, tag="error"):
    """The server refused a message. The socket stays open. The fields are those of a problem (RFC 9457).

    The server also sends it if a followed run no longer exists, with the `ref` of the `subscribe`."""

    status: int
    detail: str
    errors: list[FieldError]
    ref: str | None


class Pong(_FromServer, tag="pong"):
    ref: str | None


ServerMessage = RunEvent | Accepted | Error | Pong


class _Ref(Struct):
    ref: str | None = None


def ref_of(text: str) -> str | None:
    """The ref of a message that cannot be decoded, if it has one."""
    try:
        return msgspec.json.decode(text, type=_Ref).ref
    except (msgspec.DecodeError, RecursionError):
        return None


def schema() -> str:
    """The JSON Schema (2020-12) of both directions: ``ClientMessage`` and ``ServerMessage`` in its ``$defs``."""
    both = (ClientMessage, ServerMessage)
    (client, server), definitions = msgspec.json.schema_components(both, ref_template="#/$defs/{name}")
    for definition in definitions.values():
        if "description" in definition:
            definition["description"] = inspect.cleandoc(definition["description"])
    document = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Messages of the WebSocket /ws",
        "anyOf": [{"$ref": "#/$defs/ClientMessage"}, {"$ref": "#/$defs/ServerMessage"}],
        "$defs": {"ClientMessage": client, "ServerMessage": server, **definitions},
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=2).decode() + "\n"
