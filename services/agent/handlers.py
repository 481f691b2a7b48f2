"""Every message the agent receives, and the work in its lanes."""

from __future__ import annotations

from infra.effects import Effects
from infra.errors import InvalidMessage
from infra.subjects import SubjectKeys
from infra.tx import Tx
from protos.catalog import AGENT_TASKS, CHANNEL_EVENTS, CHANNEL_INBOUND
from protos.messages.agent import RunRequested
from protos.messages.channel import MessageDelivered, MessageReceived, MessageUndelivered
from protos.topology import Subscription
from services.agent.lanes import RUNS, RunItem
from services.agent.runs import projections
from services.agent.runs.executor import Executor
from services.agent.sessions import order
from services.agent.sessions.intake import Arrival, Origin
from services.agent.sessions.order import GAPS, GapItem, take_in_order


async def take_message(message: MessageReceived, tx: Tx, subjects: SubjectKeys) -> None:
    """A person's message from a channel: stored with the run that will answer it."""
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
    await take_in_order(tx, arrival, message.position, subjects)


# One queue per type of channel, and the same handler for all.
TAKE_MESSAGE: tuple[Subscription, ...] = tuple(
    queue.worker(prefetch=50)(take_message) for queue in CHANNEL_INBOUND.values()
)


@GAPS.runner(concurrency=8)
async def close_gap(item: GapItem, effects: Effects, tx: Tx, subjects: SubjectKeys) -> None:
    await order.close_gap(tx, item, subjects)


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
