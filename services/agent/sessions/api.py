"""HTTP of sessions: messages by the API."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Header, Path
from pydantic import BaseModel, ConfigDict, Field

from infra.clock import utcnow, uuid7
from infra.service.api import Runner
from infra.service.service import Runtime
from services.agent import adapters
from services.agent.definitions import approvers, store
from services.agent.sessions.accepting import MAX_TEXT, AcceptedRun, accept, digest
from services.agent.sessions.arrivals import Arrival


class NewMessage(BaseModel):
    """A message to an agent."""

    model_config = ConfigDict(extra="forbid")

    text: str = Field(min_length=1, max_length=MAX_TEXT)
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=255)
    """Same as the header Idempotency-Key, which takes precedence."""


def router(runtime: Runtime) -> APIRouter:
    routes = APIRouter(tags=["messages"])
    subjects = adapters.subjects(runtime)

    @routes.post("/api/v1/agents/{agent_id}/sessions/{key}/messages", status_code=202)
    async def send_message(
        agent_id: UUID,
        key: Annotated[str, Path(min_length=1, max_length=200)],
        body: NewMessage,
        who: Runner,
        idempotency_key: Annotated[str | None, Header(min_length=1, max_length=255)] = None,
    ) -> AcceptedRun:
        """Sends a message to the agent in the session `key`, which the caller chooses. The run holds the answer.

        409 if the agent's queue_mode is reject and the session is busy. While a run waits for an approval, a plain
        yes or no in its session decides it; 403 if the agent's approvers do not include the client.
        """
        arrival = Arrival(
            message_id=uuid7(),
            agent_id=agent_id,
            session_key=f"api_{digest(agent_id, key)}",
            subject_id=who.actor,
            text=body.text,
            received_at=utcnow(),
            names=approvers.of_identity(who),
            idempotency_key=idempotency_key or body.idempotency_key,
        )

        async with runtime.request.begin(tenant_id=who.tenant_id) as tx:
            await store.load(tx, agent_id)
            return await accept(tx, arrival, subjects)

    return routes
