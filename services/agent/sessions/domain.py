"""Decides which run answers a message. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from services.agent.definitions.queue_modes import QueueMode
from services.agent.sessions.events import Event, MessageAccepted, MessagesRequeued, MessageWithdrawn

# The most messages that one run answers together, and how long it waits for the next of them.
CAP = 20
DEBOUNCE = timedelta(milliseconds=500)
# For the next part of an album: its files are fetched one after the other.
ALBUM = timedelta(seconds=3)


@dataclass(frozen=True)
class Session:
    """A session's state."""

    run_id: UUID | None = None
    """The last run that was opened."""
    messages: int = 0
    """How many messages that run answers."""
    waits: bool = False
    """That run starts a moment later because more messages may come."""


@dataclass(frozen=True)
class Accept:
    """A message has come."""

    message_id: UUID
    subject_id: str
    text: bytes
    """Sealed."""
    at: datetime
    mode: QueueMode
    new_run_id: UUID
    """Id of the run that is opened if the message needs a run of its own."""
    joinable: bool
    """The session's last run has not started."""
    steerable: bool
    """The session's last run has started and is not over."""
    busy: bool
    """At least one run of the session is queued or running."""
    decides: UUID | None = None
    """The run that waits for the decision that this message is about."""
    in_album: bool = False
    """More parts of its album may come. One run answers them in each mode."""


class Busy(Exception):
    """The session is busy and its agent rejects messages meanwhile."""


def decide(command: Accept, session: Session) -> list[MessageAccepted]:
    """Raises Busy."""
    mode = command.mode
    collects = mode in ("collect", "steer") or (command.in_album and session.waits)
    collected = collects and command.joinable and session.messages < CAP
    joins = command.decides is None and (collected or (mode == "steer" and command.steerable))
    if command.decides is None and mode == "reject" and command.busy and not joins:
        raise Busy
    run_id = session.run_id if joins else None
    return [
        MessageAccepted(
            message_id=command.message_id,
            run_id=command.decides or run_id or command.new_run_id,
            opens=command.decides is None and run_id is None,
            waits=session.waits if joins else command.in_album or (mode == "collect" and command.busy),
            subject_id=command.subject_id,
            text=command.text,
            at=command.at,
            decides=command.decides is not None,
        )
    ]


def evolve(session: Session, event: Event) -> Session:
    if isinstance(event, MessagesRequeued):
        return Session(event.run_id, event.messages)
    if isinstance(event, MessageWithdrawn):
        left = event.leaves and event.run_id == session.run_id
        return Session(session.run_id, session.messages - left, session.waits)
    if event.decides:
        return session
    return Session(event.run_id, 1 if event.opens else session.messages + 1, event.waits)


def begins_after(session: Session, *, in_album: bool = False) -> timedelta:
    """The time after which the session's last run may start: a moment after its last message, or none if it is full.

    in_album: of that message.
    """
    if not session.waits or session.messages >= CAP:
        return timedelta()
    return ALBUM if in_album else DEBOUNCE
