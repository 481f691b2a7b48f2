"""Agent: public facts about the life of a run.

`session_key` is opaque: one per channel and conversation. The tenant is in the envelope. `n` counts the facts of a run
from 1 without a gap, so that a reader notices missing facts; it is 0 in records from before this field was added.
"""

from __future__ import annotations

from typing import Literal
from uuid import UUID

import msgspec

from protos.envelope import Message
from protos.messages import Count


class RunRequested(Message, frozen=True, kw_only=True):
    """A hint that a session has work. The worker that reads it claims the next fair session, maybe another one."""

    run_id: UUID
    session_key: str


class LearningRequested(Message, frozen=True, kw_only=True):
    """A run has ended whose agent wants facts about the person to be found by its model."""

    run_id: UUID
    session_key: str
    subject_id: str
    """Runs of one person are learned from one after the other."""


class RunStarted(Message, frozen=True, kw_only=True):
    """A worker has begun a run. A worker that resumes the run publishes it again with a higher `attempt`."""

    run_id: UUID
    session_key: str
    agent_id: UUID
    attempt: int
    n: Count = 0


class StepStarted(Message, frozen=True, kw_only=True):
    """A step of a run has begun. Fields as in `StepCompleted`."""

    run_id: UUID
    session_key: str
    n: Count
    step: int
    kind: Literal["retrieve", "model", "tool"]
    name: str
    attempt: int
    """From 1; higher if the step has begun again."""


class StepRetried(Message, frozen=True, kw_only=True):
    """An attempt of a step has failed; `StepStarted` announces the next one."""

    run_id: UUID
    session_key: str
    n: Count
    step: int
    attempt: int


class StepCompleted(Message, frozen=True, kw_only=True):
    """One step of a run has ended."""

    run_id: UUID
    session_key: str
    step: int
    """From 1 without a gap within the run."""
    kind: Literal["retrieve", "model", "tool"]
    name: str
    """The name of the model or the tool; empty for a retrieval."""
    status: Literal["completed", "failed"]
    attempts: int
    """How often the step has begun, at least 1."""
    duration_ms: int
    """Milliseconds of the last attempt."""
    n: Count = 0


class RunForked(Message, frozen=True, kw_only=True):
    """A run continues a finished run from one of its steps; the facts about earlier steps are published for it too."""

    run_id: UUID
    session_key: str
    n: Count
    origin_run_id: UUID


class MessagesTaken(Message, frozen=True, kw_only=True):
    """A running run will answer further messages."""

    run_id: UUID
    session_key: str
    n: Count
    step: int
    """The first step that sees them."""
    messages: Count
    """The number of all messages of the run from this step on."""


class RunWaiting(Message, frozen=True, kw_only=True):
    """A run waits: for a person to approve step `step`, which calls the tool `tool`, or for the agent that it calls."""

    run_id: UUID
    session_key: str
    n: Count
    step: int
    tool: str


class RunIndeterminate(Message, frozen=True, kw_only=True):
    """A run waits for an operator: it is not known whether step `step`, a call of `tool`, took effect.

    The run goes on or ends by the operator's decision.
    """

    run_id: UUID
    session_key: str
    n: Count
    step: int
    tool: str
    error: str
    """A text for operators, without personal content."""


class StepSettled(Message, frozen=True, kw_only=True):
    """The decision for which a run waited; the run goes on."""

    run_id: UUID
    session_key: str
    n: Count
    step: int
    decision: Literal["approve", "deny", "retry", "skip", "answer"]
    """approve, deny: whether the tool may be called. retry, skip: for a step that may or may not have taken effect.
    answer: the other agent has answered."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of a tool that the platform does not have."""

    id: str
    name: str
    arguments: str
    """As the model wrote them; personal content."""


class RunCompleted(Message, frozen=True, kw_only=True):
    """A run has answered."""

    run_id: UUID
    session_key: str
    reply: str
    """The whole text; personal content."""
    n: Count = 0
    tool_calls: tuple[ToolCall, ...] = ()
    """Calls of the client's own tools: the client makes them and asks again. Then the reply is the text that the model
    wrote before them, or empty."""
    finish_reason: Literal["stop", "length"] = "stop"
    """length: the reply is cut off, because the model reached its token limit or for the reason in `filtered`."""
    subject_id: str = ""
    """The person whose run this is, and with whom the reply is erased; empty in messages from before this field was
    added."""
    said: str = ""
    """The beginning of that person's message, personal content. Empty if other people's messages are among those of
    the run, or if another agent asked."""
    channel_id: UUID | None = None
    """The channel in which that message came. None: it came by the API, or the run is older than this field."""
    message_id: str | None = None
    """The last of that person's messages. None for several people, and in messages from before this field."""
    learning: Literal["rules", "model"] = "rules"
    """How facts about the person are found in `said`. model: the agent's model is asked, so memory leaves it alone."""
    filtered: bool = False
    """The model's provider cut the reply off by its content filter."""


class RunMessageDeleted(Message, frozen=True, kw_only=True):
    """A person deleted a message that a run had begun to answer. Memory forgets the facts that it learned from it."""

    run_id: UUID
    session_key: str
    message_id: UUID
    subject_id: str
    """The person."""
    channel_id: UUID
    said: str
    """The beginning of that person's other messages of the run, personal content. Empty under the same conditions as in
    `RunCompleted`."""


class RunFailed(Message, frozen=True, kw_only=True):
    """A run has ended without an answer."""

    run_id: UUID
    session_key: str
    status: Literal["failed", "cancelled", "refused", "indeterminate"]
    """`indeterminate` stands only in older messages: `RunIndeterminate` has replaced it."""
    error: str
    """A text for operators, without personal content."""
    n: Count = 0
