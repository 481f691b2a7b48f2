"""Deliveries and names: pure."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import UUID

import pytest

from services.channel.domain import (
    Command,
    Delivery,
    MarkFailed,
    MarkSent,
    MarkUnknown,
    Pseudonyms,
    Queue,
    decide,
    evolve,
    seen_as,
)
from services.channel.events import DeliveryEvent, DeliveryFailed, DeliveryQueued, DeliverySent, DeliveryUnknown

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
        (MarkSent("7"), SENT, "sent"),
        (MarkFailed("blocked"), FAILED, "failed"),
        (MarkUnknown("no answer"), UNKNOWN, "unknown"),
    ],
)
def test_a_queued_delivery_ends_in_one_way(command: Command, event: DeliveryEvent, state: str) -> None:
    assert decide(command, after(QUEUED)) == [event]
    assert after(QUEUED, event).state == state


@pytest.mark.parametrize("settled", [SENT, FAILED, UNKNOWN])
@pytest.mark.parametrize("command", [Queue(QUEUED), MarkSent("8"), MarkFailed("expired"), MarkUnknown("no answer")])
def test_what_is_settled_stays_as_it_is(command: Command, settled: DeliveryEvent) -> None:
    assert decide(command, after(QUEUED, settled)) == []


def test_the_same_is_queued_once_and_nothing_ends_that_was_not_queued() -> None:
    nothing: Sequence[DeliveryEvent] = []
    assert decide(Queue(QUEUED), after()) == [QUEUED]
    assert decide(Queue(QUEUED), after(QUEUED)) == nothing
    assert decide(MarkSent("7"), after()) == nothing


def test_names_are_the_same_each_time_and_differ_by_account_kind_and_id() -> None:
    one, other = Pseudonyms(b"1" * 32), Pseudonyms(b"2" * 32)
    names = [one.session("42"), one.subject("42"), one.session("43"), other.session("42"), other.subject("42")]
    assert len(set(names)) == len(names)
    assert one.session("42") == Pseudonyms(b"1" * 32).session("42")


def test_a_vendors_id_is_another_on_another_channel() -> None:
    assert seen_as(CHANNEL, "update/1") != seen_as(RUN, "update/1")
