"""What a run says in the conversation of its channel."""

from __future__ import annotations

from uuid import UUID

from infra.lanes.resequencer import next_position
from infra.postgres.tx import Tx, derived_id
from protos.catalog import CHANNEL_OUTBOUND
from protos.messages.channel import SendMessage
from services.agent.runs import projections
from services.agent.runs.publishing import stream


async def say(
    tx: Tx,
    run_id: UUID,
    text: str,
    *,
    session_key: str,
    channel_id: UUID,
    conversation_id: str,
    reply_to: str | None,
) -> None:
    """Sends `text` on its way, once for what the run's journal says now: a run that stops and goes on says more."""
    n = (await tx.load(stream(run_id))).n
    delivery_id = derived_id(run_id, "delivery", n)
    message = SendMessage(
        delivery_id=delivery_id,
        channel_id=channel_id,
        session_key=session_key,
        conversation_id=conversation_id,
        text=text,
        run_id=run_id,
        reply_to=reply_to,
        position=await next_position(tx, "sent", session_key),
    )
    tx.send(CHANNEL_OUTBOUND, message, message_id=derived_id(run_id, "SendMessage", n))
    await projections.delivery_asked(tx, run_id, delivery_id)
