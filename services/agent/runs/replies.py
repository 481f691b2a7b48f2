"""Messages that a run sends to the conversation of its channel."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

from infra.lanes.resequencer import next_position
from infra.postgres.tx import Tx, derived_id
from protos.catalog import CHANNEL_OUTBOUND
from protos.messages.channel import File, SendMessage
from services.agent.runs import metering, projections
from services.agent.runs.content import StoredFile
from services.agent.runs.publishing import stream


async def send_reply(
    tx: Tx,
    run_id: UUID,
    text: str,
    *,
    subject_id: str,
    session_key: str,
    channel_id: UUID,
    conversation_id: str,
    reply_to: str | None,
    occasion: UUID | None = None,
    files: Sequence[StoredFile] = (),
) -> None:
    """Sends `text` once for the present length of the run's journal. A run that waits and goes on sends several.

    `occasion`: an id of the purpose of this text, if the journal does not change with it.
    """
    n = (await tx.load(stream(run_id))).n
    about = (n,) if occasion is None else (n, occasion)
    delivery_id = derived_id(run_id, "delivery", *about)
    message = SendMessage(
        delivery_id=delivery_id,
        channel_id=channel_id,
        session_key=session_key,
        conversation_id=conversation_id,
        text=text,
        run_id=run_id,
        reply_to=reply_to,
        subject_id=subject_id,
        files=sent_files(files),
        position=await next_position(tx, "sent", session_key),
        sender=(await metering.origin_of(tx, run_id)).sender,
    )
    message_id = derived_id(run_id, "SendMessage", *about)
    tx.send(CHANNEL_OUTBOUND, message, key=session_key, position=message.position, message_id=message_id)
    await projections.delivery_asked(tx, run_id, delivery_id)


def sent_files(files: Sequence[StoredFile]) -> tuple[File, ...]:
    return tuple(File(path=file.path, name=file.name) for file in files)
