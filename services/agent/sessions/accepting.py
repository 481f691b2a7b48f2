"""Accepts a message that comes by the API, or refuses it."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from uuid import UUID

from pydantic import BaseModel

from infra.errors import Conflict, Forbidden, TooManyRequests
from infra.postgres.tx import Tx
from infra.security.subjects import Erased, SubjectKeys
from services.agent.sessions.arrivals import Arrival
from services.agent.sessions.domain import Busy
from services.agent.sessions.intake import take_in

MAX_TEXT = 100_000
# Most queued runs of one tenant. Messages from channels are accepted already and are not limited.
MAX_QUEUED = 1_000
RETRY_AFTER = timedelta(seconds=5)


class AcceptedRun(BaseModel):
    """The run that answers the message. Messages that are answered together share one run."""

    run_id: UUID
    session_key: str


async def accept(tx: Tx, arrival: Arrival, subjects: SubjectKeys) -> AcceptedRun:
    """Raises TooManyRequests, Forbidden if the author was erased, Conflict if the session rejects messages now."""
    # Refused before it is accepted: an answer after hours in the queue would be useless.
    if await tx.sql(
        "SELECT 1 FROM run WHERE tenant_id = $1 AND status = 'queued' OFFSET $2 LIMIT 1",
        tx.tenant_id,
        MAX_QUEUED - 1,
    ):
        raise TooManyRequests(RETRY_AFTER, f"{MAX_QUEUED} runs of this tenant are queued already")
    try:
        return AcceptedRun(run_id=await take_in(tx, arrival, subjects), session_key=arrival.session_key)
    except Erased as error:
        raise Forbidden(str(error)) from error
    except Busy as error:
        raise Conflict("the session is busy and its agent rejects messages meanwhile") from error


def digest(agent_id: UUID, key: str) -> str:
    """The part of a session's key that is made from a key that the caller chose."""
    return hashlib.blake2b(f"{agent_id}/{key}".encode(), digest_size=16).hexdigest()
