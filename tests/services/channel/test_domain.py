"""The pure rules of deliveries and pseudonyms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal
from uuid import UUID

import msgspec
import pytest
from msgspec.structs import replace

from protos.messages.channel import MessageDelivered, Sender
from services.channel.domain import (
    MAX_CHANGE_BYTES,
    MAX_CHANGES,
    Changes,
    Command,
    Delivery,
    MarkFailed,
    MarkReceived,
    MarkSent,
    MarkUnknown,
    Pseudonyms,
    QueueDelivery,
    change,
    changed,
    decide,
    dedupe_hash,
    evolve,
)
from services.channel.events import (
    DeliveryEvent,
    DeliveryFailed,
    DeliveryQueued,
    DeliveryReceived,
    DeliveryResumed,
    DeliverySent,
    DeliveryUnknown,
    MessageChange,
    MessageDeleted,
    MessageEdited,
    MessageReacted,
)
from services.channel.publishing import DELIVERY

CHANNEL, RUN = UUID(int=1), UUID(int=2)
QUEUED = DeliveryQueued(CHANNEL, "session", RUN, "subject", b"sealed")
SENT = DeliverySent(CHANNEL, "session", RUN, "7")
FAILED = DeliveryFailed(CHANNEL, "session", RUN, "blocked")
UNKNOWN = DeliveryUnknown(CHANNEL, "session", RUN, "no answer")


def after(*events: DeliveryEvent) -> Delivery:
    delivery = Delivery()
    for event in events:
        delivery = evolve(delivery, event)
    return delivery


@pytest.mark.parametrize(
    ("command", "event", "state"),
    [
        (MarkSent(("7",)), SENT, "sent"),
        (MarkSent(("6", "7", None)), DeliverySent(CHANNEL, "session", RUN, "7", ("6", "7", None)), "sent"),
        (MarkFailed("blocked"), FAILED, "failed"),
        (MarkUnknown("no answer"), UNKNOWN, "unknown"),
    ],
)
def test_a_queued_delivery_ends_in_one_way(command: Command, event: DeliveryEvent, state: str) -> None:
    assert decide(command, after(QUEUED)) == [event]
    assert after(QUEUED, event).state == state


def test_a_delivered_message_names_its_sender() -> None:
    sender = Sender(agent_id=RUN, tag="Sales")
    [sent] = decide(MarkSent(("7",)), after(msgspec.structs.replace(QUEUED, sender=sender)))
    [published] = DELIVERY.publish(str(RUN), sent)
    assert isinstance(published.message, MessageDelivered)
    assert published.message.sender == sender


@pytest.mark.parametrize("settled", [SENT, FAILED, UNKNOWN])
@pytest.mark.parametrize(
    "command", [QueueDelivery(QUEUED), MarkSent(("8",)), MarkFailed("expired"), MarkUnknown("no answer")]
)
def test_an_ended_delivery_does_not_change(command: Command, settled: DeliveryEvent) -> None:
    assert decide(command, after(QUEUED, settled)) == []


DELIVERED, READ = DeliveryReceived("delivered"), DeliveryReceived("read")
NOT_DELIVERED = DeliveryFailed(CHANNEL, "session", RUN, "131026")


@pytest.mark.parametrize(
    ("events", "state", "event"),
    [
        ((SENT,), "delivered", DELIVERED),
        ((SENT,), "read", READ),
        ((SENT,), "failed", NOT_DELIVERED),
        ((SENT, DELIVERED), "read", READ),
        ((SENT, DELIVERED), "delivered", None),
        ((SENT, DELIVERED), "failed", None),
        ((SENT, READ), "delivered", None),
        ((SENT, READ), "read", None),
        ((), "delivered", None),
        ((FAILED,), "delivered", None),
        ((UNKNOWN,), "read", None),
    ],
)
def test_only_a_receipt_that_says_more_counts(
    events: Sequence[DeliveryEvent], state: Literal["delivered", "read", "failed"], event: DeliveryEvent | None
) -> None:
    delivery = after(QUEUED, *events)
    assert decide(MarkReceived(state, "131026"), delivery) == ([event] if event else [])
    if event:
        assert evolve(delivery, event).state == state


def test_the_last_part_tells_that_all_arrived_and_each_part_can_fail() -> None:
    sent, arrived = after(QUEUED, SENT), after(QUEUED, SENT, DELIVERED)
    nothing: Sequence[DeliveryEvent] = []
    assert decide(MarkReceived("delivered", "", of_last=False), sent) == nothing
    assert decide(MarkReceived("read", "", of_last=False), arrived) == nothing
    for delivery in (sent, arrived):
        assert decide(MarkReceived("failed", "131026", of_last=False), delivery) == [NOT_DELIVERED]


def test_each_part_is_sent_once_more_if_it_was_too_late() -> None:
    sent = DeliverySent(CHANNEL, "session", RUN, "7", ("6", "7"))
    resumed = after(QUEUED, sent, DeliveryResumed(0))
    assert (resumed.state, resumed.due) == ("queued", (0,))
    refusals = {id_: MarkReceived("failed", "131047", late=id_) for id_ in ("6", "7", "8")}
    nothing: Sequence[DeliveryEvent] = []
    # The vendor repeats the first receipt. That of the other part comes before the first part was sent again.
    assert decide(refusals["6"], resumed) == nothing
    assert decide(refusals["7"], resumed) == [DeliveryResumed(1)]
    again = DeliverySent(CHANNEL, "session", RUN, "7", ("8", "7"), again=True)
    assert decide(MarkSent(("8", "7"), (0,)), resumed) == [again]
    # The item of the other part ends the delivery: otherwise that part would not be sent.
    both = after(QUEUED, sent, DeliveryResumed(0), DeliveryResumed(1))
    assert decide(MarkSent(("8", "7"), (0,)), both) == nothing
    assert len(decide(MarkSent(("8", "9"), (0, 1)), both)) == 1
    assert after(QUEUED, sent, DeliveryResumed(0), again).due == ()
    # A message is not sent a third time.
    refused = DeliveryFailed(CHANNEL, "session", RUN, "131047")
    assert decide(refusals["8"], after(QUEUED, sent, DeliveryResumed(0), again)) == [refused]


def test_a_delivery_is_queued_once_and_cannot_end_before_it_was_queued() -> None:
    nothing: Sequence[DeliveryEvent] = []
    assert decide(QueueDelivery(QUEUED), after()) == [QUEUED]
    assert decide(QueueDelivery(QUEUED), after(QUEUED)) == nothing
    assert decide(MarkSent(("7",)), after()) == nothing


def test_pseudonyms_are_stable_and_differ_by_account_kind_and_id() -> None:
    one, other = Pseudonyms(b"1" * 32), Pseudonyms(b"2" * 32)
    names = [one.session("42"), one.subject("42"), one.session("43"), other.session("42"), other.subject("42")]
    assert len(set(names)) == len(names)
    assert one.session("42") == Pseudonyms(b"1" * 32).session("42")


def test_a_vendors_id_has_a_different_dedupe_hash_on_each_channel() -> None:
    assert dedupe_hash(CHANNEL, "update/1") != dedupe_hash(RUN, "update/1")


def test_nothing_follows_a_deletion_and_the_changes_of_a_message_are_bounded() -> None:
    edit, reaction = MessageEdited("s", b"sealed", 1), MessageReacted("s", b"sealed", "added", 1)
    events: list[MessageChange] = [edit, reaction]
    state, taken = Changes(), list[MessageChange]()
    for event in events * MAX_CHANGES:
        for new in change(event, state):
            taken.append(new)
            state = changed(state, new)
    assert len(taken) == MAX_CHANGES
    assert change(MessageDeleted(), state) == [MessageDeleted()]
    state = changed(state, MessageDeleted())
    assert [change(event, state) for event in (*events, MessageDeleted())] == [[], [], []]


def test_the_texts_of_a_messages_changes_are_bounded_together() -> None:
    long = MessageEdited("s", bytes(MAX_CHANGE_BYTES // 2), 1)
    state = changed(changed(Changes(), long), long)
    assert change(MessageReacted("s", b"sealed", "added", 1), state) == []
    assert change(MessageDeleted(), state) == [MessageDeleted()]
    # A deletion removes the stored texts: the state is the same with them and without.
    emptied = replace(long, content=b"")
    assert changed(state, MessageDeleted()) == changed(changed(changed(Changes(), emptied), emptied), MessageDeleted())
