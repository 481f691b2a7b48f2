"""HTTP of sessions: messages that come by the API."""

from __future__ import annotations

import hashlib
from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Path
from pydantic import BaseModel, ConfigDict, Field

from infra.api import Runner
from infra.clock import utcnow, uuid7
from infra.errors import Conflict, Forbidden
from infra.service import Runtime
from infra.subjects import Erased
from services.agent import adapters
from services.agent.definitions import store
from services.agent.sessions.domain import Busy
from services.agent.sessions.intake import Arrival, take_in

MAX_TEXT = 100_000


class NewMessage(BaseModel):
    """A message to an agent. idempotency_key: as the header Idempotency-Key, which wins."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=255)


class Accepted(BaseModel):
    """The run that will answer the message; messages that are answered together share one."""

    run_id: UUID
    session_key: str


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(prefix="/api/v1/agents", tags=["messages"])
    subjects = adapters.subjects(runtime)

    @routes.post("/{agent_id}/sessions/{key}/messages", status_code=202)
    async def send_message(
        agent_id: UUID,
        key: Annotated[str, Path(min_length=1, max_length=200)],
        body: NewMessage,
        who: Runner,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
    ) -> Accepted:
        """Writes to the agent in the session `key`, which is yours to choose. The answer comes by the run.

        409 where the agent's queue_mode is reject and the session is busy. While a run waits for an approval, a
        plain yes or no in its session decides it.
        """
        session_key = key_of(agent_id, key)
        arrival = Arrival(
            message_id=uuid7(),
            agent_id=agent_id,
            session_key=session_key,
            subject_id=who.actor,
            text=body.text,
            received_at=utcnow(),
            idempotency_key=idempotency_key or body.idempotency_key,
        )

        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await store.load(tx, agent_id)
            try:
                run_id = await take_in(tx, arrival, subjects)
            except Erased as error:
                raise Forbidden(str(error)) from error
            except Busy as error:
                raise Conflict("the session is busy, and this agent rejects messages then") from error
        return Accepted(run_id=run_id, session_key=session_key)

    return routes


def key_of(agent_id: UUID, key: str) -> str:
    """The opaque key of an API session."""
    return f"api_{hashlib.blake2b(f'{agent_id}/{key}'.encode(), digest_size=16).hexdigest()}"
