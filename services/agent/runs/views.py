"""Runs in HTTP requests and responses."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from services.agent.runs.events import Reason, StepKind

Status = Literal["queued", "running", "waiting", "completed", "failed", "cancelled", "refused", "indeterminate"]
Phase = Literal["queued", "running", "waiting", "over"]


class UsageView(BaseModel):
    """Sums over the run's model calls. Cached tokens are part of the input. Null: not reported."""

    input_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None


class StepView(BaseModel):
    """A step. `ms`: duration of its last attempt, null while it is running."""

    n: int
    kind: Literal["retrieve", "model", "tool"]
    name: str
    status: Literal["running", "completed", "failed"]
    attempts: int
    ms: int | None
    error: str | None


class Waiting(BaseModel):
    """The decision or answer that the run waits for.

    approval: a person decides whether step `step` may call `tool`. indeterminate: an operator decides about a call
    whose effect is not known. agent: the other agent `tool` answers.
    """

    reason: Reason
    step: int
    tool: str
    arguments: str | None
    """Of the call, as the model wrote them; null if they cannot be read."""
    run_id: UUID | None
    """The other agent's run."""
    since: datetime


class Approval(BaseModel):
    """The body of ``POST /api/v1/runs/{id}/approval``."""

    model_config = ConfigDict(extra="forbid")

    approved: bool
    step: int | None = None
    """The step that the client has seen in `waiting`. If the run waits for another one now, the answer is 409."""


class StepResolution(BaseModel):
    """The body of ``POST /api/v1/runs/{id}/resolution``."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["retry", "skip", "fail"]
    result: Any = None
    """The tool's result if the step is skipped; any JSON."""


class ForkFrom(BaseModel):
    """The body of ``POST /api/v1/runs/{id}/fork``."""

    model_config = ConfigDict(extra="forbid")

    step: int | None = None
    """The last step to be copied; null: all steps completed in a row."""


class ToolCallView(BaseModel):
    """A call of one of the caller's tools."""

    id: str
    name: str
    arguments: str
    """As the model wrote them, normally a JSON object."""


FinishReason = Literal["stop", "length", "content_filter"]


class RunView(BaseModel):
    """A run."""

    id: UUID
    session_key: str
    agent_id: UUID
    status: Status
    reply: str | None
    """With `tool_calls`: the text that the model wrote before the calls, or empty."""
    finish_reason: FinishReason | None
    """length: the reply is cut off at the limit of tokens. content_filter: the model's provider cut it off. Null: no
    reply."""
    tool_calls: list[ToolCallView]
    """Calls of the caller's tools. The caller makes them and sends their results with its next request."""
    error: str | None
    trace_id: str | None
    usage: UsageView
    cost_nanos: int | None
    """Charged for the run, in 10⁻⁹ of `currency`; null until all its usage is charged."""
    currency: str | None
    steps: list[StepView]
    waiting: Waiting | None
    """Null if the run waits for no decision."""
    parent_run_id: UUID | None
    """The run of another agent that asked for this run."""
    forked_from: UUID | None
    """The run that this one is a fork of."""
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class TimelineItem(BaseModel):
    """An event in the timeline. `ms`: its duration; null: none."""

    at: datetime
    ms: int | None
    kind: Literal["inbound", "queued", "retrieve", "model", "tool", "reply", "delivery", "usage", "charge"]
    service: str
    summary: str
    span_id: str | None = None
    data: dict[str, Any]


class Timeline(BaseModel):
    items: list[TimelineItem]


class StateEvent(BaseModel):
    """An event in the journal of a run. `n` counts them from 1."""

    n: int
    type: str
    recorded_at: datetime


class StateStep(BaseModel):
    """A step, as the run knew it after an event."""

    n: int
    kind: StepKind
    name: str
    status: Literal["started", "completed", "failed"]
    attempt: int
    error: str | None


class RunState(BaseModel):
    """The state of a run after its event `at`, folded from its journal."""

    run_id: UUID
    at: int
    events: list[StateEvent]
    """All events of the run, also those after `at`."""
    status: Phase
    attempts: int
    """How often a worker has started the run."""
    tokens: int
    reserved_nanos: int
    """Reserved for model calls, in 10⁻⁹ of the tenant's currency."""
    steps: list[StateStep]
    waits_for: Reason | None
    fork_step: int
    """The last of the steps that had ended in a row: the `step` of a fork from here."""


class Fact(BaseModel):
    """A public event of a run, as on the topic ``agent.events``. `n` counts them from 1."""

    n: int
    type: str
    time: datetime
    data: dict[str, Any]


class Facts(BaseModel):
    items: list[Fact]
