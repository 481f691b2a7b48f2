"""The stream of a session. It is not published: channel publishes the messages, and the run publishes the answer."""

from __future__ import annotations

from infra.postgres.event_store import Aggregate, Stream
from infra.postgres.upcasting import EventTypes
from services.agent.sessions.domain import Session, decide, evolve
from services.agent.sessions.events import MessageAccepted, MessagesRequeued, MessageWithdrawn

SESSION = Aggregate(
    name="session",
    events=EventTypes(MessageAccepted, MessagesRequeued, MessageWithdrawn),
    initial=Session,
    evolve=evolve,
    decide=decide,
)


def stream(tenant_id: str, session_key: str) -> Stream[Session]:
    return SESSION.stream(f"{tenant_id}/{session_key}")
