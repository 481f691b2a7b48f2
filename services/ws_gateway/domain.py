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
    "agent.v1.RunCompleted": "run.completed",
}
# Besides, `RunFailed` has its status in its name. An indeterminate run may go on.
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
    """What the client gets. `id`: from where a stream goes on; None: from the one before."""

    name: str
    data: Any
    id: int | None

    def encoded(self) -> bytes:
        id_ = b"" if self.id is None else b"id: %d\n" % self.id
        return b"event: %s\n%bdata: %b\n\n" % (self.name.encode(), id_, msgspec.json.encode(self.data))


class Follow:
    """Where one stream is. `last`: the n of the last fact that the client has; `ended`: nothing more will come."""

    def __init__(self, last: int) -> None:
        self.last = last
        self.ended = False
        self._attempts: dict[int, int] = {}

    def has_end(self, facts: Iterable[Fact]) -> bool:
        """True where one of these is the run's end, and the client has it."""
        return any(fact.n <= self.last and fact.event in ENDINGS for fact in facts)

    def misses(self, fact: Fact) -> bool:
        """True where a fact between the last one and this one is not here."""
        return fact.n > self.last + 1

    def fact(self, fact: Fact) -> list[Event]:
        """The events of the next fact; none for one that the client has, and after the end."""
        if fact.n <= self.last or self.ended:
            return []
        self.last = fact.n
        if fact.type == "agent.v1.StepStarted":
            self._attempt(fact.data["step"], fact.data["attempt"])
        if (name := fact.event) is None:
            return []
        self.ended = name in ENDINGS
        body = {key: value for key, value in fact.data.items() if key not in ("n", "session_key", "reply")}
        event = Event(name, {**body, "time": fact.time}, fact.n)
        if name != "run.completed":
            return [event]
        # Without an id: who is cut off behind it comes again with the one before, and gets the end too.
        reply = Event("reply", {"run_id": fact.data["run_id"], "text": fact.data["reply"]}, None)
        return [reply, event]

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
