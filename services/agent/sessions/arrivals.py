"""Messages that come in, and the rows that they become: shared by the intake of one message and of many."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

import msgspec

from infra.observe.spans import current_ids
from infra.postgres.tx import Tx
from infra.security.crypto import DataKey
from services.agent.models.contract import AssistantTurn, Image, Sampling, Tool, ToolTurn, Turn
from services.agent.sessions.events import MessageAccepted


@dataclass(frozen=True)
class Origin:
    """The place in a channel that a message comes from and that its reply goes to."""

    channel_id: UUID
    conversation_id: str
    vendor_message_id: str


class Context(msgspec.Struct, frozen=True):
    """The context that a caller of the API gives with a message. It replaces the session's own history."""

    history: tuple[Turn, ...]
    """The conversation before the message."""
    system: str | None = None
    """Instructions that are added to the agent's own system prompt."""
    output_schema: dict[str, Any] | None = None
    """JSON Schema of the answer."""
    tools: tuple[Tool, ...] = ()
    """The caller's own tools, which the model may call."""
    must_call: bool = False
    """The model has to call one of these tools."""
    parallel: bool = True
    """The model may call several of them at once."""
    since: tuple[AssistantTurn | ToolTurn, ...] = ()
    """The calls of these tools that the model has already made for the message, and their results."""
    images: tuple[Image, ...] = ()
    """Images of the message."""
    approvers: tuple[str, ...] = ()
    """Of the message's channel; empty: the agent's."""
    is_complete: bool = True
    """False: there are only images or approvers, and the model is shown the session's own history."""
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Arrival:
    """A message that came in."""

    message_id: UUID
    agent_id: UUID
    session_key: str
    subject_id: str
    text: str
    received_at: datetime
    origin: Origin | None = None
    """None if the message came by the API."""
    idempotency_key: str | None = None
    """Of the API's caller."""
    new_run_id: UUID | None = None
    """Id of the run that the message opens; None: a new id."""
    context: Context | None = None
    """None: the model is shown the session's own history."""
    parent: str = ""
    """The session that this one branched off from, such as a channel's for a thread; empty if there is none."""
    thread_run_id: UUID | None = None
    """The run of the parent session whose message began this thread."""
    names: tuple[str, ...] = ()
    """Of its author, as approvers are named."""
    words: str = ""
    """The author's own, if the text also quotes the agent."""
    for_others: bool = False
    """Written in a group to other persons, and not to the agent."""
    in_album: bool = False
    """Its album's other parts are messages of their own."""

    @property
    def answer(self) -> str:
        """The text that may answer a question of the agent; empty if it is for other persons."""
        return "" if self.for_others else self.words or self.text


# One statement, so that messages cost one round trip. It locks nothing that is not locked already: the sessions and the
# positions by `_lock_session` or `lock_arrivals`. A message refers to a run that the statement may insert; the server
# checks this at its end.
_STORE_ARRIVALS = """
WITH opened AS (
    INSERT INTO run (id, tenant_id, session_key, agent_id, subject_id, channel_id, trace_id)
    SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::uuid[], $5::text[], $6::uuid[], $7::text[])
), said AS (
    INSERT INTO message (tenant_id, message_id, session_key, seq, run_id, subject_id, text, conversation,
                         vendor_message_id, idempotency_key, received_at, decides, context)
    SELECT * FROM unnest($8::text[], $9::uuid[], $10::text[], $11::bigint[], $12::uuid[], $13::text[], $14::bytea[],
                         $15::bytea[], $16::text[], $17::text[], $18::timestamptz[], $19::boolean[], $20::bytea[])
), moved AS (
    UPDATE session
    SET messages = n.messages, run_id = n.run_id, run_messages = n.run_messages, run_waits = n.run_waits
    FROM unnest($21::text[], $22::text[], $23::bigint[], $24::uuid[], $25::int[], $26::boolean[])
        AS n(tenant_id, session_key, messages, run_id, run_messages, run_waits)
    WHERE session.tenant_id = n.tenant_id AND session.session_key = n.session_key
)
UPDATE sequence
SET last = n.last
FROM unnest($27::text[], $28::text[], $29::text[], $30::bigint[]) AS n(tenant_id, name, key, last)
WHERE sequence.tenant_id = n.tenant_id AND sequence.name = n.name AND sequence.key = n.key
"""


class ArrivalRows:
    """The rows of messages that were decided. `write` stores them all."""

    def __init__(self) -> None:
        self.runs: list[tuple[Any, ...]] = []
        """From `run_row`."""
        self.messages: list[tuple[Any, ...]] = []
        """From `message_row`."""
        self.sessions: list[tuple[Any, ...]] = []
        """Tenant, session key, number of messages, and the fields of `Session`."""
        self.positions: list[tuple[str, str, str, int]] = []
        """Tenant, name and key of a sequence, and its last position."""

    async def write(self, tx: Tx) -> None:
        tables = (self.runs, 7), (self.messages, 13), (self.sessions, 6), (self.positions, 4)
        await tx.sql(
            _STORE_ARRIVALS,
            *([row[n] for row in rows] for rows, columns in tables for n in range(columns)),
        )


def run_row(tenant_id: str, arrival: Arrival, run_id: UUID) -> tuple[Any, ...]:
    """A row of `ArrivalRows.runs`, in the trace of now."""
    trace_id, _ = current_ids()
    return (
        run_id,
        tenant_id,
        arrival.session_key,
        arrival.agent_id,
        arrival.subject_id,
        arrival.origin.channel_id if arrival.origin else None,
        trace_id,
    )


def message_row(tenant_id: str, arrival: Arrival, event: MessageAccepted, seq: int, key: DataKey) -> tuple[Any, ...]:
    """A row of `ArrivalRows.messages`."""
    origin, context = arrival.origin, (tenant_id, arrival.subject_id, str(arrival.message_id))
    given = msgspec.json.encode(arrival.context).decode() if arrival.context else None
    return (
        tenant_id,
        arrival.message_id,
        arrival.session_key,
        seq,
        event.run_id,
        arrival.subject_id,
        event.text,
        key.seal(origin.conversation_id, *context, "conversation") if origin else None,
        origin.vendor_message_id if origin else None,
        arrival.idempotency_key,
        arrival.received_at,
        event.decides,
        key.seal(given, *context, "context") if given else None,
    )
