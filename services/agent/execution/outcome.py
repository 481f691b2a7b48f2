"""The outcomes of one execution of a run: it answers, it ends without an answer, or it waits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from uuid import UUID

from services.agent.execution.conversation import SessionSummary
from services.agent.models.contract import ToolCall
from services.agent.runs.content import StoredFile
from services.agent.runs.domain import Suspend
from services.agent.runs.events import Ending


@dataclass(frozen=True)
class Reply:
    """The run answers."""

    text: str
    summary: SessionSummary | None
    """Of the older part of the conversation, made by this run for later runs."""
    calls: tuple[ToolCall, ...] = ()
    """Calls of the caller's own tools. The caller makes them and sends the results with its next request."""
    finish_reason: Literal["stop", "length"] = "stop"
    """length: the text is cut off."""
    files: tuple[StoredFile, ...] = ()
    """For the person of the channel."""
    filtered: bool = False
    """The provider's content filter cut the text off."""


class Ended(Exception):
    """The run ends without an answer."""

    def __init__(self, status: Ending, error: str, notice: str | None = None) -> None:
        """`error` is for the operator. `notice` is sent to the person; None: nothing is sent."""
        super().__init__(error)
        self.status = status
        self.error = error
        self.notice = notice


@dataclass(frozen=True)
class ChildRun:
    """A run of another agent, to be opened for a step of this run."""

    step: int
    agent_id: UUID
    text: str
    limit_nanos: int | None
    """The most that it may cost; None: no limit."""


class Suspended(Exception):
    """The run stops until a person decides or another agent has answered."""

    def __init__(self, command: Suspend, notice: str | None, children: Sequence[ChildRun] = ()) -> None:
        """`notice` is sent to the conversation; None: nothing is sent. `children` are the runs to be opened."""
        super().__init__(command.text)
        self.command = command
        self.notice = notice
        self.children = children
