"""Runs as HTTP shows them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from services.agent.runs.events import Reason

Status = Literal["queued", "running", "waiting", "completed", "failed", "cancelled", "refused", "indeterminate"]


class UsageView(BaseModel):
    """Sums over the run's model calls; cached tokens are part of the input; null: not reported."""

    input_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None


class StepView(BaseModel):
    """A step. `ms`: of its last attempt; null while it is under way."""

    n: int
    kind: Literal["retrieve", "model", "tool"]
    name: str
    status: Literal["running", "completed", "failed"]
    attempts: int
    ms: int | None
    error: str | None


class Waiting(BaseModel):
    """What the run waits for: a person who decides whether step `step` may call `tool`, or what has become of it, or
    another agent, which is called as `tool`.

    arguments: what it is to be called with, as the model wrote them; null where they cannot be read.
    run_id: of the other agent's run.
    """

    reason: Reason
    step: int
    tool: str
    arguments: str | None
    run_id: UUID | None
    since: datetime


class Approval(BaseModel):
    """The body of ``POST /api/v1/runs/{id}/approval``."""

    model_config = ConfigDict(extra="forbid")

    approved: bool


class Resolution(BaseModel):
    """The body of ``POST /api/v1/runs/{id}/resolution``. result: of the tool, where the step is skipped; any JSON."""

    model_config = ConfigDict(extra="forbid")

    action: Literal["retry", "skip", "fail"]
    result: Any = None


class ForkFrom(BaseModel):
    """The body of ``POST /api/v1/runs/{id}/fork``. step: the last to be taken over; null: all that were completed."""

    model_config = ConfigDict(extra="forbid")

    step: int | None = None


class ToolCallView(BaseModel):
    """A call of one of the caller's tools. arguments: as the model wrote them; a JSON object, if it did well."""

    id: str
    name: str
    arguments: str


class RunView(BaseModel):
    """A run. cost_nanos: what was charged for it, 10⁻⁹ of `currency`; null until all that it used is charged.

    tool_calls: of tools of whoever asked, who is to come again with what they gave back; then the reply is what the
    model wrote before them, or empty. waiting: null where it waits for nobody. parent_run_id: of the run that asked,
    where another agent did. forked_from: the run that it has taken up.
    """

    id: UUID
    session_key: str
    agent_id: UUID
    status: Status
    reply: str | None
    tool_calls: list[ToolCallView]
    error: str | None
    trace_id: str | None
    usage: UsageView
    cost_nanos: int | None
    currency: str | None
    steps: list[StepView]
    waiting: Waiting | None
    parent_run_id: UUID | None
    forked_from: UUID | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None


class TimelineItem(BaseModel):
    """Something that happened in a run. `ms`: how long it took; null: a moment."""

    at: datetime
    ms: int | None
    kind: Literal["inbound", "queued", "retrieve", "model", "tool", "reply", "delivery", "usage", "charge"]
    service: str
    summary: str
    span_id: str | None = None
    data: dict[str, Any]


class Timeline(BaseModel):
    items: list[TimelineItem]


class Fact(BaseModel):
    """A public fact of a run, as on the topic ``agent.events``. `n` counts them from 1."""

    n: int
    type: str
    time: datetime
    data: dict[str, Any]


class Facts(BaseModel):
    items: list[Fact]
