"""Every message the agent receives, and the work in its lanes."""

from __future__ import annotations

from functools import partial

from infra.errors import InvalidMessage
from infra.lanes.effects import Effects
from infra.lanes.lane import Lane
from infra.lanes.resequencer import Gap, Ordered
from infra.postgres.tx import Tx
from infra.security.subjects import Erased, SubjectKeys
from protos.catalog import AGENT_TASKS, CHANNEL_EVENTS, CHANNEL_INBOUND
from protos.messages.agent import RunRequested
from protos.messages.channel import MessageDelivered, MessageReceived, MessageUndelivered
from protos.topology import Subscription
from services.agent.execution.executor import Executor
from services.agent.lanes import RUNS, RunItem
from services.agent.runs import projections
from services.agent.sessions import sealed_arrivals
from services.agent.sessions.intake import Arrival, Origin

# One lane a conversation, for messages that did not come.
GAPS = Lane("message gaps", Gap)
_IN_ORDER = Ordered(GAPS)


async def take_message(message: MessageReceived, tx: Tx, subjects: SubjectKeys) -> None:
    """A person's message from a channel: stored with the run that will answer it, behind those written before it."""
    if tx.tenant_id is None or tx.cause is None:
        raise InvalidMessage("header tenant_id", "missing")
    arrival = Arrival(
        message_id=tx.cause.id,
        agent_id=message.agent_id,
        session_key=message.session_key,
        subject_id=message.subject_id,
        text=message.text,
        received_at=message.received_at,
        origin=Origin(message.channel_id, message.conversation_id, message.vendor_message_id),
    )
    try:
        parcel = await sealed_arrivals.seal(tx, subjects, arrival)
    except Erased:
        parcel = sealed_arrivals.NOTHING
    await _IN_ORDER.take(
        tx, message.session_key, message.position, parcel, partial(sealed_arrivals.take_in, tx, subjects)
    )


# One queue per type of channel, and the same handler for all. No more at once than there are connections: those that
# wait for one too long would have to be tried again, behind later messages.
TAKE_MESSAGE: tuple[Subscription, ...] = tuple(
    queue.worker(prefetch=10)(take_message) for queue in CHANNEL_INBOUND.values()
)


@GAPS.runner(concurrency=8)
async def close_gap(gap: Gap, effects: Effects, tx: Tx, subjects: SubjectKeys) -> None:
    await _IN_ORDER.close_gap(tx, gap, partial(sealed_arrivals.take_in, tx, subjects))


@AGENT_TASKS.each(RunRequested, group="agent")
async def wake(hint: RunRequested, tx: Tx) -> None:
    """Some process has queued a run: this one looks whether it can take any."""
    tx.woken.add(RUNS.name)


async def give_up_run(item: RunItem, error: str, tx: Tx, executor: Executor) -> None:
    """Whoever wrote is told, and the run is over; its dead letter says why."""
    await executor.give_up(item.run_id, error, tx)


@RUNS.runner(concurrency=64, per_tenant=48, dead=give_up_run)
async def execute_run(item: RunItem, effects: Effects, tx: Tx, executor: Executor) -> None:
    await executor.execute(item.run_id, effects, tx)


@CHANNEL_EVENTS.each(MessageDelivered, group="agent")
async def on_message_delivered(event: MessageDelivered, tx: Tx) -> None:
    assert tx.cause
    await projections.delivery_ended(tx, event.delivery_id, "delivered", None, tx.cause.time)


@CHANNEL_EVENTS.each(MessageUndelivered, group="agent")
async def on_message_undelivered(event: MessageUndelivered, tx: Tx) -> None:
    assert tx.cause
    await projections.delivery_ended(tx, event.delivery_id, event.outcome, event.reason, tx.cause.time)
