"""Handlers of all messages that the agent receives, and of the items in its lanes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

from infra.errors import InvalidMessage
from infra.lanes.effects import Effects, ItemEnded
from infra.lanes.lane import Lane
from infra.lanes.resequencer import MissingMessages, Resequencer
from infra.postgres.tx import Tx, derived_id
from infra.security.subjects import Erased, SubjectKeys
from protos.catalog import AGENT_TASKS, CHANNEL_ANSWERS, CHANNEL_CHANGES, CHANNEL_EVENTS, CHANNEL_INBOUND
from protos.envelope import read_headers
from protos.messages.agent import LearningRequested, RunRequested
from protos.messages.channel import (
    AnswerByPerson,
    MessageChanged,
    MessageDelivered,
    MessageReceived,
    MessageUndelivered,
)
from protos.topology import Subscription
from services.agent.definitions import approvers
from services.agent.execution.executor import Executor
from services.agent.execution.group_write import LARGEST_GROUP
from services.agent.lanes import LEARNING, RUNS, LearningItem, RunItem
from services.agent.learning.learner import Learner
from services.agent.models.contract import Image
from services.agent.runs import projections
from services.agent.sessions import changes, sealed_arrivals, takeover
from services.agent.sessions.arrivals import Arrival, Context, Origin
from services.agent.sessions.group_intake import Incoming, take_group

# One lane per conversation, for its missing messages.
GAPS = Lane("message gaps", MissingMessages)
_RESEQUENCER = Resequencer(GAPS)


async def take_messages(messages: list[MessageReceived], tx: Tx, subjects: SubjectKeys) -> None:
    """Stores persons' messages from channels, in the order of their conversations, with the runs that answer them."""
    # A single message is handled in its own trace already.
    of_many = len(messages) > 1
    group = [
        _incoming(message, tx, partial(tx.follow, message, "take message") if of_many else nullcontext)
        for message in messages
    ]
    await take_group(tx, subjects, GAPS.name, group, partial(_take_one, tx, subjects))


def _incoming(message: MessageReceived, tx: Tx, trace: Callable[[], object]) -> Incoming:
    envelope = read_headers(dict(tx.origins[id(message)]))
    if envelope.tenant_id is None:
        raise InvalidMessage("header tenant_id", "missing")
    images = tuple(Image(image.path, image.content_type) for image in message.images)
    arrival = Arrival(
        message_id=envelope.id,
        agent_id=message.agent_id,
        session_key=message.session_key,
        subject_id=message.subject_id,
        text=message.text,
        received_at=message.received_at,
        origin=Origin(message.channel_id, message.conversation_id, message.vendor_message_id),
        parent=message.parent_session_key,
        thread_run_id=message.thread_run_id,
        names=approvers.of_person(message.subject_id, is_admin=message.by_admin),
        context=Context((), images=images, approvers=message.approvers, is_complete=False)
        if images or message.approvers
        else None,
        words=message.words,
        for_others=message.for_others,
        in_album=message.in_album,
    )
    return Incoming(envelope.tenant_id, message.position, arrival, trace)


async def _take_one(tx: Tx, subjects: SubjectKeys, one: Incoming) -> None:
    tx.tenant_id = one.tenant_id
    try:
        sealed = await sealed_arrivals.seal(tx, subjects, one.arrival)
    except Erased:
        sealed = sealed_arrivals.ERASED
    key, handle = one.arrival.session_key, partial(sealed_arrivals.take_in, tx, subjects)
    await _RESEQUENCER.accept(tx, key, one.position, sealed, handle)


# One queue per type of channel, all with the same handler.
TAKE_MESSAGES: tuple[Subscription, ...] = tuple(
    queue.batch_worker(most=200)(take_messages) for queue in CHANNEL_INBOUND.values()
)


@CHANNEL_CHANGES.worker(prefetch=20)
async def change_message(message: MessageChanged, tx: Tx, subjects: SubjectKeys) -> None:
    await changes.change(tx, subjects, message, GAPS.name)


@CHANNEL_ANSWERS.worker(prefetch=20)
async def keep_answer(message: AnswerByPerson, tx: Tx, subjects: SubjectKeys) -> None:
    await takeover.keep_answer(tx, subjects, message)


@GAPS.runner(concurrency=8)
async def skip_gap(gap: MissingMessages, effects: Effects, tx: Tx, subjects: SubjectKeys) -> None:
    await _RESEQUENCER.skip_gap(tx, gap, partial(sealed_arrivals.take_in, tx, subjects))


@AGENT_TASKS.each(RunRequested, group="agent", hint=True)
async def wake(hint: RunRequested, tx: Tx) -> None:
    """A process has queued a run. This process looks whether it can claim a lane."""
    tx.woken.add(RUNS.name)


async def give_up_run(item: RunItem, error: str, tx: Tx, executor: Executor) -> None:
    """Ends the run and tells the person. The dead letter of the item holds the error."""
    await executor.give_up(item.run_id, error, tx)


@RUNS.runner(concurrency=2 * LARGEST_GROUP, per_tenant=48, dead=give_up_run)
async def execute_run(item: RunItem, effects: Effects, tx: Tx, executor: Executor) -> ItemEnded | None:
    return await executor.execute(item.run_id, effects, tx)


@AGENT_TASKS.each(LearningRequested, group="agent")
async def take_learning(request: LearningRequested, tx: Tx) -> None:
    tx.enqueue(
        LEARNING,
        lane=request.subject_id,
        item=LearningItem(request.run_id),
        item_id=derived_id(request.run_id, "learning"),
    )


@LEARNING.runner(concurrency=8, per_tenant=4)
async def learn_from_run(item: LearningItem, effects: Effects, tx: Tx, learner: Learner) -> None:
    await learner.learn(item.run_id, effects)


@CHANNEL_EVENTS.each(MessageDelivered, group="agent")
async def on_message_delivered(event: MessageDelivered, tx: Tx) -> None:
    assert tx.cause
    await projections.delivery_ended(tx, event.delivery_id, "delivered", None, tx.cause.time)


@CHANNEL_EVENTS.each(MessageUndelivered, group="agent")
async def on_message_undelivered(event: MessageUndelivered, tx: Tx) -> None:
    assert tx.cause
    await projections.delivery_ended(tx, event.delivery_id, event.outcome, event.reason, tx.cause.time)
