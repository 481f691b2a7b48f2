"""Events of a session. Each session is a stream."""

from __future__ import annotations

from datetime import datetime
from uuid import UUID

import msgspec


class MessageAccepted(msgspec.Struct, frozen=True, kw_only=True):
    """A person's message was stored and assigned to a run."""

    message_id: UUID
    run_id: UUID
    opens: bool
    """The run is new."""
    waits: bool
    """The run starts a moment later because more messages may come."""
    subject_id: str
    text: bytes
    """Sealed under the subject's key; empty if the message was deleted."""
    at: datetime
    decides: bool = False
    """The message is about the decision that the run waits for. The run does not answer it."""


class MessagesRequeued(msgspec.Struct, frozen=True, kw_only=True):
    """A run failed that other messages had joined after its start. A new run answers those messages."""

    failed_run_id: UUID
    run_id: UUID
    messages: int


class MessageWithdrawn(msgspec.Struct, frozen=True, kw_only=True):
    """A person deleted a message. Its text is removed everywhere."""

    message_id: UUID
    run_id: UUID
    leaves: bool
    """The run had not begun, and has other messages, which it answers without this one."""


Event = MessageAccepted | MessagesRequeued | MessageWithdrawn
