"""A channel's messages are taken in as they were written, whatever order they come in.

The bus that brings them keeps none: each has its position in the conversation. One that comes too early waits for those
before it, but not for long, for they may never come (a dead letter).
"""

from __future__ import annotations

from datetime import timedelta

import msgspec

from infra import telemetry
from infra.clock import utcnow
from infra.lanes import Lane
from infra.logs import get_logger
from infra.subjects import Erased, SubjectKeys
from infra.tx import Tx, derived_id
from services.agent.sessions.intake import Arrival, take_in

# Longer than a message needs whose first attempt met a moment's trouble.
GRACE = timedelta(seconds=10)

_log = get_logger("agent.order")


class GapItem(msgspec.Struct, frozen=True):
    """This message of the session has waited for long enough for those before it."""

    session_key: str
    position: int


GAPS = Lane("gaps", GapItem)


async def take_in_order(tx: Tx, arrival: Arrival, position: int, subjects: SubjectKeys) -> None:
    """Takes the message in, and those that waited for it; or has it wait. position: from 1; 0: it has none."""
    if position == 0:
        await _take(tx, arrival, subjects)
        return
    last = await _last(tx, arrival.session_key)
    if position > last + 1:
        await _park(tx, arrival, position, subjects)
        return
    await _take(tx, arrival, subjects)
    await _go_on(tx, arrival.session_key, max(last, position), subjects)


async def close_gap(tx: Tx, item: GapItem, subjects: SubjectKeys) -> None:
    """Takes in what waits still, without what never came."""
    last = await _last(tx, item.session_key)
    if last >= item.position:
        return
    _log.warning(
        "a conversation goes on without messages that did not come; are they dead letters? see claw dlq list",
        session_key=item.session_key,
        missing=f"{last + 1} to {item.position - 1}",
    )
    await _go_on(tx, item.session_key, item.position - 1, subjects)


async def _last(tx: Tx, session_key: str) -> int:
    """The position up to which the session has its messages. Its row is locked: messages take turns."""
    await tx.sql(
        "INSERT INTO session (tenant_id, session_key) VALUES ($1, $2) ON CONFLICT DO NOTHING", tx.tenant_id, session_key
    )
    [(last,)] = await tx.sql(
        "SELECT position FROM session WHERE tenant_id = $1 AND session_key = $2 FOR UPDATE", tx.tenant_id, session_key
    )
    return int(last)


async def _take(tx: Tx, arrival: Arrival, subjects: SubjectKeys) -> None:
    try:
        await take_in(tx, arrival, subjects)
    except Erased:
        _log.info("message of an erased person left out", message_id=str(arrival.message_id))


async def _go_on(tx: Tx, session_key: str, last: int, subjects: SubjectKeys) -> None:
    """Takes in all that follow `last` without a gap."""
    assert tx.tenant_id
    while rows := await tx.sql(
        "DELETE FROM early_message WHERE tenant_id = $1 AND session_key = $2 AND position = $3 "
        "RETURNING message_id, subject_id, arrival, headers",
        tx.tenant_id,
        session_key,
        last + 1,
    ):
        [(message_id, subject_id, sealed, headers)] = rows
        last += 1
        try:
            key = await subjects.key(tx, tx.tenant_id, subject_id)
        except Erased:
            continue
        arrival = msgspec.json.decode(
            key.open(sealed, tx.tenant_id, subject_id, str(message_id), "early"), type=Arrival
        )
        with telemetry.record(msgspec.json.decode(headers, type=dict[str, str]), "take in early message"):
            await _take(tx, arrival, subjects)
    await tx.sql(
        "UPDATE session SET position = $3 WHERE tenant_id = $1 AND session_key = $2", tx.tenant_id, session_key, last
    )


async def _park(tx: Tx, arrival: Arrival, position: int, subjects: SubjectKeys) -> None:
    assert tx.tenant_id
    try:
        key = await subjects.key(tx, tx.tenant_id, arrival.subject_id)
    except Erased:
        return
    content = msgspec.json.encode(arrival).decode()
    await tx.sql(
        "INSERT INTO early_message (tenant_id, session_key, position, message_id, subject_id, arrival, headers) "
        "VALUES ($1, $2, $3, $4, $5, $6, $7)",
        tx.tenant_id,
        arrival.session_key,
        position,
        arrival.message_id,
        arrival.subject_id,
        key.seal(content, tx.tenant_id, arrival.subject_id, str(arrival.message_id), "early"),
        msgspec.json.encode(telemetry.carrier()).decode(),
    )
    tx.enqueue(
        GAPS,
        lane=arrival.session_key,
        item=GapItem(arrival.session_key, position),
        item_id=derived_id(arrival.message_id, "gap"),
        not_before=utcnow() + GRACE,
    )
