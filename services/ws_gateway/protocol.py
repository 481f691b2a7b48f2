"""The messages of the WebSocket, both ways; the JSON Schema that clients get is made from these."""

from __future__ import annotations

import inspect
from typing import Annotated, Any
from uuid import UUID

import msgspec
from msgspec import Meta, Struct


class _FromClient(Struct, kw_only=True, tag_field="type", forbid_unknown_fields=True):
    ref: Annotated[str, Meta(description="Yours to choose: the answer to this message has it, too.")] | None = None


class Subscribe(_FromClient, tag="subscribe"):
    """Asks for a run's events: `accepted`, then what has happened, then what happens, until the run ends. Of a run that
    is followed already they come again from `after`."""

    run_id: UUID
    after: Annotated[int, Meta(ge=0, lt=2**31, description="The last id of the run that you have.")] = 0


class Unsubscribe(_FromClient, tag="unsubscribe"):
    """Behind its `accepted` no event of the run comes any more."""

    run_id: UUID


class Message(_FromClient, tag="message"):
    """Writes to an agent as POST /api/v1/agents/{agent_id}/sessions/{session}/messages does: `accepted` with the run
    that will answer, then that run's events."""

    agent_id: UUID
    session: Annotated[str, Meta(min_length=1, max_length=200)]
    text: str
    idempotency_key: Annotated[str, Meta(description="Who sends it again with the same gets the same run.")] | None = (
        None
    )


class Cancel(_FromClient, tag="cancel"):
    """Asks for a run's end; that it has ended is said by its event, to whoever follows it."""

    run_id: UUID


class Ping(_FromClient, tag="ping"):
    """Answered with `pong`. None is needed: the server pings by WebSocket's own frames."""


ClientMessage = Subscribe | Unsubscribe | Message | Cancel | Ping


class _FromServer(Struct, kw_only=True, tag_field="type"):
    pass


class RunEvent(_FromServer, tag="event"):
    """What happened in a run, as GET /api/v1/runs/{run_id}/events tells it."""

    run_id: UUID
    event: Annotated[
        str,
        Meta(
            description="`run.completed`, `run.failed`, `run.cancelled` and `run.refused` are a run's last. Ignore "
            "what you do not know.",
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
    id: Annotated[int, Meta(description="What to give as `after`.")] | None
    data: Annotated[
        dict[str, Any],
        Meta(
            description="Of a `delta`: step, attempt, n (from 1 in each attempt), text; a higher attempt of the step, "
            "or the `reply`, takes the place of what came before."
        ),
    ]


class Accepted(_FromServer, tag="accepted"):
    """The answer to all but `ping`, where it is not an error."""

    run_id: UUID
    ref: str | None


class FieldError(Struct, frozen=True):
    field: str
    message: str


class Error(_FromServer, tag="error"):
    """A message was refused, and the socket goes on: a problem (RFC 9457) without what is only for HTTP.

    Also where a run that is followed is there no more: with the `ref` of its `subscribe`."""

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
    """The ref of a message that is not understood, where it has one."""
    try:
        return msgspec.json.decode(text, type=_Ref).ref
    except (msgspec.DecodeError, RecursionError):
        return None


def schema() -> str:
    """JSON Schema (2020-12) of both ways, as text: ``ClientMessage`` and ``ServerMessage`` in its ``$defs``."""
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
