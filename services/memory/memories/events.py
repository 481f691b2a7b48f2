"""The facts that memory stores about memories, and the state that follows from them. Pure.

Each memory is a stream. Its state is its row in the table ``memory``, which can be rebuilt from the events alone.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, assert_never
from uuid import UUID

import msgspec

from services.memory.memories.extraction import Kind

Scope = Literal["tenant", "agent", "user", "session"]
MAX_IMPORTANCE = 10
# A fact that is said again gains so much importance.
REINFORCEMENT = 1


class MemoryLearned(msgspec.Struct, frozen=True, kw_only=True):
    """A person said a fact, a client noted it, or several memories became this one."""

    scope: Scope
    scope_id: str
    subject_id: str
    kind: Kind
    text: bytes
    """Sealed under the subject's key."""
    digest: bytes = b""
    """Of the text in its normal form, under the subject's key; empty in older events."""
    topic: bytes | None = None
    """Digest; None also in older events."""
    importance: int
    confidence: float
    speaker: str
    learned_by: str = ""
    """``rules``, or the name of the model that found the fact; empty: a client wrote it, or the event is older."""
    run_id: UUID | None
    message_id: str | None
    at: datetime
    expires_at: datetime | None
    channel_id: UUID | None = None
    parts: tuple[UUID, ...] = ()
    """The memories that became this one."""


class MemoryRepeated(msgspec.Struct, frozen=True, kw_only=True):
    """The same fact was said again, in the same words or in others."""

    run_id: UUID | None
    at: datetime
    topic: bytes | None = None
    """Digest of the topic that a memory without one has from now on."""


class MemoryChanged(msgspec.Struct, frozen=True, kw_only=True):
    """A client corrected the memory."""

    by: str
    text: bytes
    """Sealed."""
    digest: bytes = b""
    """As in `MemoryLearned`."""
    topic: bytes | None = b""
    """Digest; empty in older events, which left the topic as it was."""
    importance: int
    confidence: float
    expires_at: datetime | None


class MemoryReplaced(msgspec.Struct, frozen=True, kw_only=True):
    """A newer fact contradicts it, or it became part of another memory."""

    by: UUID


class MemoryArchived(msgspec.Struct, frozen=True, kw_only=True):
    """A client put the memory away: agents do not get it any more."""

    by: str
    at: datetime


class MemoryRestored(msgspec.Struct, frozen=True, kw_only=True):
    """A client took the memory back from the archive, or undid that a newer fact replaced it."""

    by: str


class MemoryParted(msgspec.Struct, frozen=True, kw_only=True):
    """The memory that it was a part of is gone: it stands for itself again."""


class MemoryWithdrawn(msgspec.Struct, frozen=True, kw_only=True):
    """The message in which this run said the fact was deleted. The fact was said elsewhere, too."""

    run_id: UUID
    importance: int | None = None
    """Without this run; None in older events, which left it as it was."""


class MemoryForgotten(msgspec.Struct, frozen=True, kw_only=True):
    """A client deleted the memory, or it was divided into its parts."""

    by: str


Event = (
    MemoryLearned
    | MemoryRepeated
    | MemoryChanged
    | MemoryReplaced
    | MemoryArchived
    | MemoryRestored
    | MemoryParted
    | MemoryWithdrawn
    | MemoryForgotten
)


class State(msgspec.Struct, frozen=True, kw_only=True):
    """A memory as its events have left it. The fields are columns of its row."""

    scope: Scope
    scope_id: str
    subject_id: str
    kind: Kind
    sealed: bytes
    digest: bytes
    topic: bytes | None
    importance: int
    confidence: float
    speaker: str
    learned_by: str
    run_id: UUID | None
    message_id: str | None
    said_at: datetime
    uses: int
    """How often it was said again."""
    used_at: datetime
    """When it was said last."""
    expires_at: datetime | None
    replaced_by: UUID | None
    archived_at: datetime | None
    channel_id: UUID | None
    parts: tuple[UUID, ...]


def evolve(state: State | None, event: Event) -> State | None:
    """The state after the event; None before the first one and after the last."""
    if isinstance(event, MemoryLearned):
        return _learned(event)
    if state is None:
        return None
    match event:
        case MemoryRepeated():
            return msgspec.structs.replace(
                state,
                uses=state.uses + 1,
                importance=min(MAX_IMPORTANCE, state.importance + REINFORCEMENT),
                used_at=max(state.used_at, event.at),
                # A newer fact on one topic would replace all that a memory of several parts says.
                topic=state.topic or (None if state.parts else event.topic),
                archived_at=None,
                # An expired one would stay hidden although it was said again.
                expires_at=None if state.expires_at and state.expires_at <= event.at else state.expires_at,
            )
        case MemoryChanged():
            return msgspec.structs.replace(
                state,
                sealed=event.text,
                digest=event.digest,
                topic=state.topic if event.topic == b"" else event.topic,
                importance=event.importance,
                confidence=event.confidence,
                expires_at=event.expires_at,
            )
        case MemoryReplaced():
            return msgspec.structs.replace(state, replaced_by=event.by)
        case MemoryArchived():
            return msgspec.structs.replace(state, archived_at=event.at)
        case MemoryRestored():
            # Only one memory in force has the topic: the newer one.
            topic = None if state.replaced_by else state.topic
            return msgspec.structs.replace(state, archived_at=None, topic=topic, replaced_by=None)
        case MemoryParted():
            return msgspec.structs.replace(state, replaced_by=None)
        case MemoryWithdrawn():
            return msgspec.structs.replace(
                state, uses=max(0, state.uses - 1), importance=event.importance or state.importance
            )
        case MemoryForgotten():
            return None
        case _:
            assert_never(event)


def _learned(event: MemoryLearned) -> State:
    return State(
        scope=event.scope,
        scope_id=event.scope_id,
        subject_id=event.subject_id,
        kind=event.kind,
        sealed=event.text,
        digest=event.digest,
        topic=event.topic,
        importance=event.importance,
        confidence=event.confidence,
        speaker=event.speaker,
        learned_by=event.learned_by,
        run_id=event.run_id,
        message_id=event.message_id,
        said_at=event.at,
        uses=0,
        used_at=event.at,
        expires_at=event.expires_at,
        replaced_by=None,
        archived_at=None,
        channel_id=event.channel_id,
        parts=event.parts,
    )
