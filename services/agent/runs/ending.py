"""How a run ends without an answer, and what the person is told."""

from __future__ import annotations

from services.agent.runs.events import Ending

# For people in a chat; the reason is for the operator, on the run.
FAILED = "Sorry, something went wrong and I could not answer. Please try again in a while."
NO_CREDIT = "Sorry, I cannot answer at the moment: the credit for this assistant is used up. Please try again later."
UNCERTAIN = "Sorry, I could not finish: it is not certain whether a step took effect. Somebody has to look at it first."

CANCELLED = "cancelled on request"


class Ended(Exception):
    """The run ends here. `error`: for the operator. `notice`: what the person is told, if anything."""

    def __init__(self, status: Ending, error: str, notice: str | None = None) -> None:
        super().__init__(error)
        self.status = status
        self.error = error
        self.notice = notice
