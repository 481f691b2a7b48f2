"""A channel's message on its way into its session, sealed: it may have to wait for those before it."""

from __future__ import annotations

from uuid import UUID

import msgspec

from infra.observe.logs import get_logger
from infra.postgres.tx import Tx
from infra.security.subjects import Erased, SubjectKeys
from services.agent.sessions import intake
from services.agent.sessions.intake import Arrival

# Of a person that was erased.
NOTHING = b""

_log = get_logger("agent.parcels")


class _Parcel(msgspec.Struct, frozen=True):
    message_id: UUID
    subject_id: str
    arrival: bytes


async def seal(tx: Tx, subjects: SubjectKeys, arrival: Arrival) -> bytes:
    """Raises Erased where the person's key was destroyed."""
    assert tx.tenant_id
    key = await subjects.key(tx, tx.tenant_id, arrival.subject_id)
    content = msgspec.json.encode(arrival).decode()
    sealed = key.seal(content, tx.tenant_id, arrival.subject_id, str(arrival.message_id), "early")
    return msgspec.json.encode(_Parcel(arrival.message_id, arrival.subject_id, sealed))


async def take_in(tx: Tx, subjects: SubjectKeys, parcel: bytes) -> None:
    """Stores the message with the run that will answer it; one of an erased person is left out."""
    assert tx.tenant_id
    if parcel == NOTHING:
        _log.info("message of an erased person left out")
        return
    sealed = msgspec.json.decode(parcel, type=_Parcel)
    try:
        key = await subjects.key(tx, tx.tenant_id, sealed.subject_id)
        content = key.open(sealed.arrival, tx.tenant_id, sealed.subject_id, str(sealed.message_id), "early")
        await intake.take_in(tx, msgspec.json.decode(content, type=Arrival), subjects)
    except Erased:
        _log.info("message of an erased person left out", message_id=str(sealed.message_id))
