"""A person takes a session over: its agent is silent until the session is released.

Messages that come meanwhile, and the answers to them, are stored with runs that are cancelled at once, so that the
agent knows them afterwards.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict

from infra.errors import NotFound
from infra.postgres.tx import Tx
from infra.security.audit import audit
from infra.security.auth import Identity
from infra.security.subjects import Erased, SubjectKeys
from infra.service.api import Writer
from infra.service.service import Runtime
from infra.stores.cache import Cache
from protos.messages.channel import AnswerByPerson
from services.agent.runs import projections
from services.agent.runs.cancelling import cancel
from services.agent.runs.notices import TAKEN_OVER
from services.agent.runs.progress import tell_end
from services.agent.sessions.arrivals import Arrival
from services.agent.sessions.intake import take_in

_Key = Annotated[str, Path(min_length=1, max_length=200)]


class Takeover(BaseModel):
    """Who answers in a session."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"session_key": "5f0c6f1e8c3b4a52", "taken_over_by": "api-key:0199c1d2"}]}
    )

    session_key: str
    taken_over_by: str | None
    """The member or the API key that has taken the session over; null: the agent answers."""


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(prefix="/api/v1/sessions", tags=["sessions"])
    cache = Cache(runtime.cache)

    @routes.post("/{session_key}/takeover")
    async def take_over(session_key: _Key, who: Writer) -> Takeover:
        """The agent answers nothing in this session until it is released; its unfinished runs are cancelled.

        The person answers by ``POST /api/v1/channels/{id}/messages``.
        """
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await _set(tx, session_key, who, taken_over_by=who.actor)
            for run_id in await _unfinished_runs(tx, session_key):
                await cancel(tx, run_id, TAKEN_OVER)
                tx.after_commit(partial(tell_end, cache, run_id, session_key))
        return Takeover(session_key=session_key, taken_over_by=who.actor)

    @routes.post("/{session_key}/release")
    async def release(session_key: _Key, who: Writer) -> Takeover:
        """The agent answers the messages that come from now on, and knows those of meanwhile in both directions."""
        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await _set(tx, session_key, who, taken_over_by=None)
        return Takeover(session_key=session_key, taken_over_by=None)

    return routes


async def keep_answer(tx: Tx, subjects: SubjectKeys, message: AnswerByPerson) -> None:
    """Stores the answer if the session is taken over. In any other session the agent does not know it.

    The session can be taken over from then on, also if the person has not written yet.
    """
    [(is_taken_over,)] = await tx.sql(
        # Locks the session, as the intake of a message does.
        """
        INSERT INTO session AS s (tenant_id, session_key) VALUES ($1, $2)
        ON CONFLICT (tenant_id, session_key) DO UPDATE SET messages = s.messages
        RETURNING taken_over_by IS NOT NULL
        """,
        tx.tenant_id,
        message.session_key,
    )
    if not is_taken_over:
        return
    assert tx.cause
    arrival = Arrival(
        message_id=tx.cause.id,
        agent_id=message.agent_id,
        session_key=message.session_key,
        subject_id=message.subject_id,
        text=message.text,
        received_at=message.sent_at,
    )
    try:
        await take_in(tx, arrival, subjects)
    except Erased:
        return
    await tx.sql(
        "UPDATE message SET is_answer = true WHERE tenant_id = $1 AND message_id = $2", tx.tenant_id, arrival.message_id
    )


async def _unfinished_runs(tx: Tx, session_key: str) -> list[UUID]:
    """Among them those that wait for an operator. Locks their rows in the order of ids."""
    rows = await tx.sql(
        """
        SELECT id FROM run
        WHERE tenant_id = $1 AND session_key = $2 AND status = ANY($3::text[])
        ORDER BY id
        FOR UPDATE
        """,
        tx.tenant_id,
        session_key,
        [*projections.STOPPABLE],
    )
    return [UUID(str(id_)) for (id_,) in rows]


async def _set(tx: Tx, session_key: str, who: Identity, *, taken_over_by: str | None) -> None:
    """Locks the session before its runs, as the intake of a message does. Raises NotFound."""
    changed = await tx.sql(
        """
        UPDATE session SET taken_over_by = $3
        WHERE tenant_id = $1 AND session_key = $2
        RETURNING session_key
        """,
        tx.tenant_id,
        session_key,
        taken_over_by,
    )
    if not changed:
        raise NotFound("the tenant has no session with this key")
    audit(tx, who.actor, f"session.{'takeover' if taken_over_by else 'release'}", "session", session_key)
