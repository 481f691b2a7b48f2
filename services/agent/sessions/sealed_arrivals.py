"""A channel's message in sealed form, which may have to wait for the messages before it."""

from __future__ import annotations

from uuid import UUID

import msgspec

from infra.observe.logs import get_logger
from infra.postgres.tx import Tx
from infra.security.subjects import Erased, SubjectKeys
from services.agent.sessions import intake
from services.agent.sessions.arrivals import Arrival

# In place of a message of an erased person.
ERASED = b""

_log = get_logger("agent.intake")


class _SealedArrival(msgspec.Struct, frozen=True):
    message_id: UUID
    subject_id: str
    arrival: bytes


async def seal(tx: Tx, subjects: SubjectKeys, arrival: Arrival) -> bytes:
    """Raises Erased if the person was erased."""
    assert tx.tenant_id
    key = await subjects.key(tx, tx.tenant_id, arrival.subject_id)
    content = msgspec.json.encode(arrival).decode()
    content_bytes = key.seal(content, tx.tenant_id, arrival.subject_id, str(arrival.message_id), "early")
    return msgspec.json.encode(_SealedArrival(arrival.message_id, arrival.subject_id, content_bytes))


async def take_in(tx: Tx, subjects: SubjectKeys, sealed: bytes) -> None:
    """Stores the message with the run that answers it. Ignores a message of an erased person."""
    assert tx.tenant_id
    if sealed == ERASED:
        _log.info("message of an erased person ignored")
        return
    found = msgspec.json.decode(sealed, type=_SealedArrival)
    try:
        key = await subjects.key(tx, tx.tenant_id, found.subject_id)
        content = key.open(found.arrival, tx.tenant_id, found.subject_id, str(found.message_id), "early")
        await intake.take_in(tx, msgspec.json.decode(content, type=Arrival), subjects)
    except Erased:
        _log.info("message of an erased person ignored", message_id=str(found.message_id))
