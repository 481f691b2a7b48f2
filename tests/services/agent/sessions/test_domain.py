"""Which run answers a message."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import get_args
from uuid import UUID

import pytest

from infra.postgres.lane_items import AT_ONCE
from services.agent.definitions.queue_modes import QueueMode
from services.agent.sessions.domain import ALBUM, CAP, DEBOUNCE, Accept, Busy, Session, begins_after, decide, evolve

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
OLD, NEW = UUID(int=1), UUID(int=2)
MODES: tuple[QueueMode, ...] = get_args(QueueMode)


def accept(
    session: Session,
    *,
    mode: QueueMode = "collect",
    joinable: bool = False,
    steerable: bool = False,
    busy: bool,
    decides: UUID | None = None,
    in_album: bool = False,
) -> Session:
    command = Accept(
        message_id=UUID(int=3),
        subject_id="p",
        text=b"",
        at=NOON,
        mode=mode,
        new_run_id=NEW,
        joinable=joinable,
        steerable=steerable,
        busy=busy,
        decides=decides,
        in_album=in_album,
    )
    [event] = decide(command, session)
    return evolve(session, event)


def test_an_idle_session_answers_at_once() -> None:
    session = accept(Session(OLD, 4, waits=True), joinable=False, busy=False)
    assert session == Session(NEW, 1, waits=False)
    assert begins_after(session) == AT_ONCE


def test_what_comes_during_a_run_waits_for_more() -> None:
    session = accept(Session(OLD, 1), joinable=False, busy=True)
    assert session == Session(NEW, 1, waits=True)
    assert begins_after(session) == DEBOUNCE


@pytest.mark.parametrize("waits", [True, False])
def test_a_run_that_has_not_begun_takes_more_and_waits_as_it_did(waits: bool) -> None:
    assert accept(Session(OLD, 1, waits), joinable=True, busy=True) == Session(OLD, 2, waits)


def test_a_full_run_begins_at_once_and_the_next_message_opens_another() -> None:
    full = accept(Session(OLD, CAP - 1, waits=True), joinable=True, busy=True)
    assert full == Session(OLD, CAP, waits=True)
    assert begins_after(full) == AT_ONCE
    assert accept(full, joinable=True, busy=True) == Session(NEW, 1, waits=True)


def test_followup_gives_each_message_a_run_without_waiting() -> None:
    session = accept(Session(OLD, 1), mode="followup", joinable=True, busy=True)
    assert session == Session(NEW, 1, waits=False)


def test_steering_joins_the_run_under_way() -> None:
    assert accept(Session(OLD, 1), mode="steer", steerable=True, busy=True) == Session(OLD, 2)
    assert accept(Session(OLD, 1), mode="steer", joinable=True, busy=True) == Session(OLD, 2)
    assert accept(Session(OLD, 1), mode="steer", busy=False) == Session(NEW, 1)


def test_an_interruption_has_a_run_of_its_own() -> None:
    assert accept(Session(OLD, 1), mode="interrupt", joinable=True, busy=True) == Session(NEW, 1)
    assert accept(Session(OLD, 1), mode="interrupt", steerable=True, busy=True) == Session(NEW, 1)


def test_a_busy_session_may_reject() -> None:
    with pytest.raises(Busy):
        accept(Session(OLD, 1), mode="reject", steerable=True, busy=True)
    assert accept(Session(OLD, 1), mode="reject", busy=False) == Session(NEW, 1)


@pytest.mark.parametrize("mode", MODES)
def test_one_run_answers_the_parts_of_an_album_whatever_the_mode(mode: QueueMode) -> None:
    first = accept(Session(OLD, 1), mode=mode, busy=False, in_album=True)
    assert (first, begins_after(first, in_album=True)) == (Session(NEW, 1, waits=True), ALBUM)
    both = accept(first, mode=mode, joinable=True, busy=True, in_album=True)
    assert (both, begins_after(both)) == (Session(NEW, 2, waits=True), DEBOUNCE)


@pytest.mark.parametrize("mode", MODES)
def test_a_decision_is_no_question_whatever_the_mode(mode: QueueMode) -> None:
    before = Session(OLD, 3, waits=True)
    assert accept(before, mode=mode, joinable=True, steerable=True, busy=True, decides=UUID(int=9)) == before
