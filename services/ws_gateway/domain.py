"""One run as one client sees it: facts in their order, each once, and the text that is being written. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec

_EVENTS = {
    "agent.v1.RunStarted": "run.started",
    "agent.v1.StepStarted": "step.started",
    "agent.v1.StepCompleted": "step.completed",
    "agent.v1.RunWaiting": "run.waiting",
    "agent.v1.RunIndeterminate": "run.indeterminate",
    "agent.v1.RunCompleted": "run.completed",
}
# The event's name of a `RunFailed` is its status, in older messages also `indeterminate`. Such a run may go on.
ENDINGS = frozenset(("run.completed", "run.failed", "run.cancelled", "run.refused"))


class Fact(msgspec.Struct, frozen=True):
    """A public fact of a run. `n` counts them from 1; `type`: the message's wire name; `data`: its body."""

    n: int
    type: str
    time: str
    data: dict[str, Any]

    @property
    def event(self) -> str | None:
        """What it is called in a stream; None for one that this version does not know."""
        if self.type == "agent.v1.RunFailed":
            return f"run.{self.data['status']}"
        return _EVENTS.get(self.type)


class Delta(msgspec.Struct, frozen=True):
    """A piece of the text that a step's model writes; `n` counts those of the attempt from 1."""

    step: int
    attempt: int
    n: int
    text: str


class Event(NamedTuple):
    """What the client gets. `id`: from where a stream goes on; None for a delta, which is told once."""

    name: str
    data: Any
    id: int | None

    def encoded(self) -> bytes:
        id_ = b"" if self.id is None else b"id: %d\n" % self.id
        return b"event: %s\n%bdata: %b\n\n" % (self.name.encode(), id_, msgspec.json.encode(self.data))


class Follow:
    """Where one stream is. `last`: the id of the last event that the client has; `ended`: nothing more will come.

    An event's id is the n of its fact. The end of a run that has answered is one fact and two events: the reply has its
    n, and the end, behind which nothing comes, the number after it.
    """

    def __init__(self, last: int) -> None:
        self.last = last
        self.ended = False
        self._attempts: dict[int, int] = {}

    def has_end(self, facts: Iterable[Fact]) -> bool:
        """True where one of these is the run's end, and the client has it."""
        return any(_last_id(fact) <= self.last and fact.event in ENDINGS for fact in facts)

    def is_known(self, facts: Iterable[Fact]) -> bool:
        """False where no event of these facts has the id of the client's last one."""
        return self.last == 0 or any(fact.n <= self.last <= _last_id(fact) for fact in facts)

    @property
    def read_from(self) -> int:
        """After which n the facts are to be read, so that the client's last event is among them: it may have been the
        run's end."""
        return max(self.last - 2, 0)

    def misses(self, fact: Fact) -> bool:
        """True where a fact between the last one and this one is not here."""
        return fact.n > self.last + 1

    def fact(self, fact: Fact) -> list[Event]:
        """The events of the next fact; none for one that the client has, and after the end."""
        if _last_id(fact) <= self.last or self.ended:
            return []
        has_reply = fact.n <= self.last
        self.last = _last_id(fact)
        if fact.type == "agent.v1.StepStarted":
            self._attempt(fact.data["step"], fact.data["attempt"])
        if (name := fact.event) is None:
            return []
        self.ended = name in ENDINGS
        hidden = ("n", "session_key", "reply", "tool_calls")
        body = {key: value for key, value in fact.data.items() if key not in hidden}
        event = Event(name, {**body, "time": fact.time}, self.last)
        if name != "run.completed" or has_reply:
            return [event]
        reply = {"run_id": fact.data["run_id"], "text": fact.data["reply"]}
        if calls := fact.data.get("tool_calls"):
            reply["tool_calls"] = calls
        return [Event("reply", reply, fact.n), event]

    def delta(self, delta: Delta) -> list[Event]:
        """The piece, unless it is of an attempt that has been given up."""
        if self.ended or not self._attempt(delta.step, delta.attempt):
            return []
        return [Event("delta", delta, None)]

    def _attempt(self, step: int, attempt: int) -> bool:
        """Notes it. False where a later one is known."""
        latest = max(attempt, self._attempts.get(step, 0))
        self._attempts[step] = latest
        return attempt == latest


def _last_id(fact: Fact) -> int:
    return fact.n + (fact.event == "run.completed")
