"""How a run ends without an answer, and what the person is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from services.agent.runs.domain import Suspend
from services.agent.runs.events import Ending

# For people in a chat; the reason is for the operator, on the run.
FAILED = "Sorry, something went wrong and I could not answer. Please try again in a while."
NO_CREDIT = "Sorry, I cannot answer at the moment: the credit for this assistant is used up. Please try again later."
UNCERTAIN = "Sorry, I could not finish: it is not certain whether a step took effect. Somebody has to look at it first."

BUSY = "I am still busy with your last message. Please write again when I have answered it."

CANCELLED = "cancelled on request"
INTERRUPTED = "interrupted by a newer message"


class Ended(Exception):
    """The run ends here. `error`: for the operator. `notice`: what the person is told, if anything."""

    def __init__(self, status: Ending, error: str, notice: str | None = None) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.notice = notice


@dataclass(frozen=True)
class Child:
    """Another agent's run, to be opened for a step. limit_nanos: what it may cost; None: without limit."""

    step: int
    agent_id: UUID
    text: str
    limit_nanos: int | None


class Suspended(Exception):
    """The run stops here until a person decides, or another agent has answered. notice: what is said in the
    conversation, if anything. children: the runs to be opened."""

    def __init__(self, command: Suspend, notice: str | None, children: Sequence[Child] = ()) -> None:
        super().__init__(command.text)
        self.command = command
        self.notice = notice
        self.children = children


def approval_notice(tool: str, arguments: str) -> str:
    """The question that a person in the chat is asked."""
    return f"May I use {tool} with {arguments}? Please answer yes or no."
