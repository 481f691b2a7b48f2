"""The journal of a run, one stream each. `n` counts its facts from 1 without a gap; what a person or a model said is
sealed under the key of the run's subject.
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
    """A worker has begun, or goes on with, the run. The agent's version is that of the first start.

    messages: how many of the run's messages it then had; None, in older facts: all of them.
    """

    n: int
    session_key: str
    agent_id: UUID
    agent_version: int
    attempt: int
    at: datetime
    messages: int | None = None


class RunForked(msgspec.Struct, frozen=True, kw_only=True):
    """The run takes up another one: what follows, before it starts, are the other's first steps, taken over."""

    n: int
    session_key: str
    origin: UUID
    messages: int | None
    agent_version: int | None


class MessagesTaken(msgspec.Struct, frozen=True, kw_only=True):
    """What came meanwhile is answered too: from `step` on the run has the first `messages` of its messages."""

    n: int
    session_key: str
    step: int
    messages: int


class StepStarted(msgspec.Struct, frozen=True, kw_only=True):
    """A step is begun, or begun again with a higher `attempt`.

    digest: of what goes into it; code: the version that began it. Both empty in older facts.
    """

    n: int
    session_key: str
    step: int
    kind: StepKind
    name: str
    attempt: int
    digest: str = ""
    code: str = ""


class AttemptFailed(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt of a step came to nothing, and another will be made. error: for the operator."""

    n: int
    session_key: str
    step: int
    attempt: int
    error: str


class StepCompleted(msgspec.Struct, frozen=True, kw_only=True):
    """A step has ended for good; it is never made again.

    content: what came out, sealed; None where it failed. error: for the operator. tokens: used, as reported.
    nanos: what was reserved for it.
    """

    n: int
    session_key: str
    step: int
    kind: StepKind
    name: str
    status: Literal["completed", "failed"]
    attempts: int
    duration_ms: int
    content: bytes | None
    error: str | None = None
    tokens: int = 0
    nanos: int = 0


class RunSuspended(msgspec.Struct, frozen=True, kw_only=True):
    """The run waits for a person or another agent, and holds nothing meanwhile.

    approval: whether step `step`, not begun yet, may call the tool `name`. indeterminate: nobody knows whether that
    step took effect. agent: for the run that answers what the step has asked. text: for the operator. arguments: what
    the tool is to be called with, sealed.
    """

    n: int
    session_key: str
    reason: Reason
    step: int
    name: str
    text: str
    at: datetime
    arguments: bytes | None = None


class StepSettled(msgspec.Struct, frozen=True, kw_only=True):
    """What the run waited for is decided. content: of the step that is skipped, sealed."""

    n: int
    session_key: str
    step: int
    decision: Decision
    by: str
    content: bytes | None = None


class RunCompleted(msgspec.Struct, frozen=True, kw_only=True):
    """The run has answered. `reply` is sealed, and so are `calls`, of tools of the caller; None: there are none."""

    n: int
    session_key: str
    reply: bytes
    calls: bytes | None = None


class RunFailed(msgspec.Struct, frozen=True, kw_only=True):
    """The run has ended without an answer. `error`: for the operator, nothing that a person wrote."""

    n: int
    session_key: str
    status: Ending
    error: str


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
