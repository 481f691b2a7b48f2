"""Which run answers a message: pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, get_args
from uuid import UUID

from services.agent.sessions.events import Event, MessageAccepted

QueueMode = Literal["collect", "followup", "steer", "interrupt", "reject"]
"""collect: what comes while a run is busy is answered together by the next. followup: each message has its own run."""

QUEUE_MODES: tuple[str, ...] = get_args(QueueMode)
# So many messages one run answers together, and so long it waits for the next of them.
CAP = 20
DEBOUNCE = timedelta(milliseconds=500)


@dataclass(frozen=True)
class Session:
    """The last run that was opened, how many messages it answers, and whether it waits for more."""

    run_id: UUID | None = None
    messages: int = 0
    waits: bool = False


@dataclass(frozen=True)
class Accept:
    """A message has come. text: sealed.

    new_run_id: of the run, if it needs one. joinable: the session's last run has not begun. busy: another run of the
    session is not over.
    """

    message_id: UUID
    subject_id: str
    text: bytes
    at: datetime
    mode: QueueMode
    new_run_id: UUID
    joinable: bool
    busy: bool


def decide(command: Accept, session: Session) -> list[Event]:
    joins = command.mode == "collect" and command.joinable and session.messages < CAP and session.run_id is not None
    run_id = session.run_id if joins and session.run_id else command.new_run_id
    return [
        MessageAccepted(
            message_id=command.message_id,
            run_id=run_id,
            opens=not joins,
            waits=session.waits if joins else command.mode == "collect" and command.busy,
            subject_id=command.subject_id,
            text=command.text,
            at=command.at,
        )
    ]


def evolve(session: Session, event: Event) -> Session:
    return Session(event.run_id, 1 if event.opens else session.messages + 1, event.waits)


def begins_at(session: Session, now: datetime) -> datetime:
    """When the session's last run may begin: when nothing more has come for a moment, or when it is full."""
    return now + DEBOUNCE if session.waits and session.messages < CAP else now
