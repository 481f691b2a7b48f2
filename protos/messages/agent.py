"""Agent's public facts: the life of a run.

`session_key` is opaque: one per channel and conversation. The tenant is in the envelope. `n` counts the facts of
a run from 1 without a gap, so a reader knows what it has missed; 0 in records from before it was there.
"""

from __future__ import annotations

from typing import Literal
from uuid import UUID

import msgspec

from protos.envelope import Message
from protos.messages import Count


class RunRequested(Message, frozen=True, kw_only=True):
    """A hint that a session has work. Whoever takes it claims the next fair session, maybe another one."""

    run_id: UUID
    session_key: str


class RunStarted(Message, frozen=True, kw_only=True):
    """A worker has begun a run. Said again, with a higher `attempt`, by the worker that resumes it."""

    run_id: UUID
    session_key: str
    agent_id: UUID
    attempt: int
    n: Count = 0


class StepStarted(Message, frozen=True, kw_only=True):
    """A step of a run is begun, or begun again with a higher `attempt` (from 1). Fields as in `StepCompleted`."""

    run_id: UUID
    session_key: str
    n: Count
    step: int
    kind: Literal["retrieve", "model", "tool"]
    name: str
    attempt: int


class StepRetried(Message, frozen=True, kw_only=True):
    """An attempt of a step came to nothing; `StepStarted` tells of the next one."""

    run_id: UUID
    session_key: str
    n: Count
    step: int
    attempt: int


class StepCompleted(Message, frozen=True, kw_only=True):
    """One step of a run has ended.

    step: from 1, gapless within the run.
    name: of the model or the tool; empty for a retrieval.
    attempts: how often it was begun, at least 1.
    duration_ms: of the last attempt, milliseconds.
    """

    run_id: UUID
    session_key: str
    step: int
    kind: Literal["retrieve", "model", "tool"]
    name: str
    status: Literal["completed", "failed"]
    attempts: int
    duration_ms: int
    n: Count = 0


class RunForked(Message, frozen=True, kw_only=True):
    """A run takes up another one that is over, from one of its steps on; the steps before are told as its own."""

    run_id: UUID
    session_key: str
    n: Count
    origin_run_id: UUID


class MessagesTaken(Message, frozen=True, kw_only=True):
    """A run under way answers further messages. messages: how many in all, from step `step` on."""

    run_id: UUID
    session_key: str
    n: Count
    step: int
    messages: Count


class RunWaiting(Message, frozen=True, kw_only=True):
    """A run waits: for a person to say whether step `step` may call the tool `tool`, or for the agent it calls so."""

    run_id: UUID
    session_key: str
    n: Count
    step: int
    tool: str


class StepSettled(Message, frozen=True, kw_only=True):
    """What a run waited for is decided, and it goes on.

    approve, deny: whether the tool may be called. retry, skip: a step of which nobody knows whether it took effect.
    answer: the other agent has answered.
    """

    run_id: UUID
    session_key: str
    n: Count
    step: int
    decision: Literal["approve", "deny", "retry", "skip", "answer"]


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool that is not the platform's. `arguments`: as the model wrote them, personal content."""

    id: str
    name: str
    arguments: str


class RunCompleted(Message, frozen=True, kw_only=True):
    """A run has answered. `reply` is the whole text, personal content.

    tool_calls: of tools of whoever asked, who is to make them and ask again; then the reply is what the model wrote
    before them, or empty.
    """

    run_id: UUID
    session_key: str
    reply: str
    n: Count = 0
    tool_calls: tuple[ToolCall, ...] = ()


class RunFailed(Message, frozen=True, kw_only=True):
    """A run has ended without an answer. `error` is what an operator reads; it holds no personal content.

    indeterminate: it has not ended for good; an operator decides about the step that may have taken effect.
    """

    run_id: UUID
    session_key: str
    status: Literal["failed", "cancelled", "refused", "indeterminate"]
    error: str
    n: Count = 0
