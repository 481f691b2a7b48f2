"""Which run answers a message: pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal, get_args
from uuid import UUID

from services.agent.sessions.events import Event, MessageAccepted

QueueMode = Literal["collect", "followup", "steer", "interrupt", "reject"]
"""What happens with a message that comes while a run of the session is busy.

collect: all of them are answered together by the next run. followup: each has its own run. steer: the run under way
answers it too. interrupt: that run is cancelled, and the next one begins. reject: it is refused.
"""

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

    new_run_id: of the run, if it needs one. joinable: the session's last run has not begun. steerable: it has, and is
    not over. busy: some run of the session is to be executed. decides: the run that waits for this yes or no.
    """

    message_id: UUID
    subject_id: str
    text: bytes
    at: datetime
    mode: QueueMode
    new_run_id: UUID
    joinable: bool
    steerable: bool
    busy: bool
    decides: UUID | None = None


class Busy(Exception):
    """The session takes no message now."""


def decide(command: Accept, session: Session) -> list[Event]:
    """Raises Busy."""
    mode = command.mode
    if command.decides is None and mode == "reject" and command.busy:
        raise Busy
    collected = mode in ("collect", "steer") and command.joinable and session.messages < CAP
    joins = command.decides is None and (collected or (mode == "steer" and command.steerable))
    run_id = session.run_id if joins else None
    return [
        MessageAccepted(
            message_id=command.message_id,
            run_id=command.decides or run_id or command.new_run_id,
            opens=command.decides is None and run_id is None,
            waits=session.waits if joins else mode == "collect" and command.busy,
            subject_id=command.subject_id,
            text=command.text,
            at=command.at,
            decides=command.decides is not None,
        )
    ]


def evolve(session: Session, event: Event) -> Session:
    if event.decides:
        return session
    return Session(event.run_id, 1 if event.opens else session.messages + 1, event.waits)


def begins_at(session: Session, now: datetime) -> datetime:
    """When the session's last run may begin: when nothing more has come for a moment, or when it is full."""
    return now + DEBOUNCE if session.waits and session.messages < CAP else now
