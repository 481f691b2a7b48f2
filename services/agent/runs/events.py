"""Events of a run. Each run is a stream, its journal.

`n` counts a run's events from 1 without a gap. Texts of persons and models are sealed with the subject's key.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal
from uuid import UUID

import msgspec

StepKind = Literal["retrieve", "model", "tool"]
Ending = Literal["failed", "cancelled", "refused"]
Reason = Literal["approval", "indeterminate", "agent"]
Decision = Literal["approve", "deny", "retry", "skip", "answer"]


class RunStarted(msgspec.Struct, frozen=True, kw_only=True):
    """A worker has started the run or goes on with it. `agent_version` is that of the first start."""

    n: int
    session_key: str
    agent_id: UUID
    agent_version: int
    attempt: int
    at: datetime
    messages: int | None = None
    """How many messages the run had at its first start; None in older events: all."""


class RunForked(msgspec.Struct, frozen=True, kw_only=True):
    """The run is a fork of `origin`. The events before its start are copies of the origin's first steps."""

    n: int
    session_key: str
    origin: UUID
    messages: int | None
    agent_version: int | None


class MessagesTaken(msgspec.Struct, frozen=True, kw_only=True):
    """Messages came during the run: from `step` on the run answers its first `messages` messages."""

    n: int
    session_key: str
    step: int
    messages: int


class StepStarted(msgspec.Struct, frozen=True, kw_only=True):
    """A step has begun, or has begun again with a higher `attempt`."""

    n: int
    session_key: str
    step: int
    kind: StepKind
    name: str
    attempt: int
    digest: str = ""
    """Of the step's input; empty in older events."""
    code: str = ""
    """The version that began the step; empty in older events."""


class AttemptFailed(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt of a step has failed, and another one follows."""

    n: int
    session_key: str
    step: int
    attempt: int
    error: str
    """For the operator."""


class StepCompleted(msgspec.Struct, frozen=True, kw_only=True):
    """A step has ended. It is never made again."""

    n: int
    session_key: str
    step: int
    kind: StepKind
    name: str
    status: Literal["completed", "failed"]
    attempts: int
    duration_ms: int
    content: bytes | None
    """The result, sealed; None if the step failed."""
    error: str | None = None
    """For the operator."""
    tokens: int = 0
    """Tokens used, as the model reported them."""
    nanos: int = 0
    """Nano-units that were reserved for the step."""


class RunSuspended(msgspec.Struct, frozen=True, kw_only=True):
    """The run waits for a person or another agent. It has no lane item meanwhile.

    The reasons: approval: a person has to decide whether step `step`, not begun yet, may call the tool `name`.
    indeterminate: it is not known whether that step took effect, and an operator has to decide. agent: another run has
    to answer the step.
    """

    n: int
    session_key: str
    reason: Reason
    step: int
    name: str
    text: str
    """For the operator."""
    at: datetime
    arguments: bytes | None = None
    """Of the tool, sealed."""


class StepSettled(msgspec.Struct, frozen=True, kw_only=True):
    """The decision that the run waited for."""

    n: int
    session_key: str
    step: int
    decision: Decision
    by: str
    content: bytes | None = None
    """Of a step that is skipped, sealed."""


class RunCompleted(msgspec.Struct, frozen=True, kw_only=True):
    """The run has answered."""

    n: int
    session_key: str
    reply: bytes
    """Sealed."""
    calls: bytes | None = None
    """Calls of the caller's tools, sealed; None if there are none."""
    finish_reason: Literal["stop", "length"] = "stop"
    """length: the reply is cut off."""
    filtered: bool = False
    """The provider's content filter cut the reply off."""


class RunFailed(msgspec.Struct, frozen=True, kw_only=True):
    """The run has ended without an answer."""

    n: int
    session_key: str
    status: Ending
    error: str
    """For the operator. It contains no text of a person."""


Event = (
    RunStarted
    | RunForked
    | MessagesTaken
    | StepStarted
    | AttemptFailed
    | StepCompleted
    | RunSuspended
    | StepSettled
    | RunCompleted
    | RunFailed
)
